"""Numbers that are added to scores."""
