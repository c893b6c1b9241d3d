"""Attention by lists: each row of queries has a list of the key blocks that it sees."""
