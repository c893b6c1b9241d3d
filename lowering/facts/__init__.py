"""Exact facts about a map: number of pairs, hops, live ranges of keys."""
