"""How many examples a law is tried on: few by default, all in the slow run."""

import os

WHOLE = bool(os.environ.get("SADSL_WHOLE"))


def few(number):
    """``number`` examples in ``make test-slow``, an eighth of them in ``make test``.

    Examples follow from the test itself, so that the few are the same in every run.
    """
    return number if WHOLE else min(number, max(10, number // 8))
