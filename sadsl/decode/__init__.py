"""Decoding: caches that follow from a spec, prompts in pieces, and token by token.

Importing this package registers the rule of every kind of term with ``advance``.
"""

from sadsl.decode import regions as regions
from sadsl.decode import states as states
