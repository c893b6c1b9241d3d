"""Recommendation of the next item from a user's history, with any attention spec."""
