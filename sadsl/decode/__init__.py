"""Decoding: caches that follow from a spec, prompts in pieces, and token by token."""
