"""A byte-level language model, trained with any attention spec given as text."""
