"""Converts specs and plans to text, JSON and files, and back."""
