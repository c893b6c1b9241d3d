"""The NaN watch: a number that is not finite ends the training."""

from typing import Any

import numpy as np


class NotFinite(ValueError):
    """Training has diverged: a number is infinite or NaN."""


def check_finite(step: int, what: str, value: Any) -> None:
    """Makes sure that a number, or every number of an array, is finite.

    Raises:
      NotFinite: some number is not; the text names the step.
    """
    value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.floating) or np.isfinite(value).all():
        return
    said = f"is {value}" if not value.ndim else "holds numbers that are not finite"
    raise NotFinite(f"{what} of step {step:,} {said}")
