"""Exact facts of a map: pairs, hops, live ranges of keys."""
