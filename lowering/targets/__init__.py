"""Chips by name, and the code that their compilers make without such a chip."""
