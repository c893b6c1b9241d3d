"""Terms say how pairs are scored and normalised, and how several terms combine.

They are values only; ``sadsl.run`` computes with them.
"""
