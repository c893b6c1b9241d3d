"""How many examples a law is tried on: few by default, all in the slow run."""

import os

WHOLE = bool(os.environ.get("SADSL_WHOLE"))


def few(number, least=10):
    """``number`` examples in ``make test-slow``, an eighth of them in ``make test``.

    At least ``least`` of them, if there are as many. Examples follow from the test
    itself, so that the few are the same in every run.
    """
    return number if WHOLE else min(number, max(least, number // 8))
