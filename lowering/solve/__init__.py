"""Solves predicates for one position: which values fulfil it, the first, the last."""
