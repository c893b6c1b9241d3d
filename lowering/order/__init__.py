"""Another order of the positions, and whether it pays."""
