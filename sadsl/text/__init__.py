"""Specs as text, as JSON and as files."""
