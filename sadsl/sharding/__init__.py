"""Attention over arrays whose sequence, heads and batch are dealt to devices."""
