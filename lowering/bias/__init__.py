"""Biases: expressions for the numbers that are added to attention scores."""
