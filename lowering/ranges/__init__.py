"""Interval analysis: is a predicate true on all, some or no pairs of a rectangle?"""
