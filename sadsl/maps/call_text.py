"""Writes the ``repr`` of a map, a term or an option as the call that builds it."""

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
    """The call ``name(...)`` that builds a dataclass; defaults are left out.

    The parameters of the function have the names and the defaults of the fields; a test
    calls every function to check that.

    Args:
      value: the dataclass.
      name: the name of the function; if None, that of the class in snake case.
      by_position: how many leading fields are written without their names, until one is
        left out; if None, those without a default.
      spread: the first field holds the ``*args`` of the function.

    Example:
      >>> import sadsl as sa
      >>> call_text(sa.window(4), by_position=2)
      'window(4)'
    """
    cls = type(value)
    name = name or re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    every = fields(value)
    # A keyword-only field with a default may stand before a field without one.
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
    """``repr(value)``, but NumPy numbers as Python numbers and infinity as ``1e999``.

    Example:
      >>> text_of((0.5, float("-inf")))
      '(0.5, -1e999)'
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    if type(value) is tuple:
        inside = ", ".join(map(text_of, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
