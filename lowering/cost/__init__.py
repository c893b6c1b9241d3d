"""Costs of a call: FLOPs, bytes and time on a chip; and the code made for a chip."""
