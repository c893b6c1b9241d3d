"""Unknowns eliminated from an expression: the first, the last, whether there is one."""
