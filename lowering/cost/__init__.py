"""Counts as FLOPs, bytes and time; chips, and the code made for them."""
