"""The text of a value that a function makes: the call that makes it again."""

import math
import re
from dataclasses import MISSING, fields
from typing import Any

import numpy as np


def call_text(
    value: Any,
    name: str | None = None,
    *,
    by_position: int | None = None,
    spread: bool = False,
) -> str:
    """``name(...)`` with the fields of a dataclass that differ from its defaults.

    Parameters of the function are named as the fields are, and have the same defaults;
    a test calls every function to see that.

    Args:
      value: the dataclass.
      name: the function; the class in snake case, if None.
      by_position: how many leading fields stand by position, as long as none of them is
        left out; those without a default, if None. The others stand by name.
      spread: the first field is the ``*args`` of the function.
    """
    cls = type(value)
    name = name or re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    every = fields(value)
    # Fields that only take keywords may have a default before one that has none.
    every = sorted(every, key=lambda f: f.default is not MISSING)
    if by_position is None:
        by_position = sum(f.default is MISSING for f in every)
    shown: list[str] = []
    for place, each in enumerate(every):
        held = getattr(value, each.name)
        if each.default is not MISSING and held == each.default:
            continue
        if spread and place == 0:
            shown += map(text_of, held)
            continue
        bare = not spread and place < by_position and len(shown) == place
        shown.append(text_of(held) if bare else f"{each.name}={text_of(held)}")
    return f"{name}({', '.join(shown)})"


def text_of(value: Any) -> str:
    """``repr``, with NumPy's numbers as Python's and infinities as literals."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    if type(value) is tuple:
        inside = ", ".join(map(text_of, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
