"""Costs of a call: FLOPs, bytes and time on a chip."""
