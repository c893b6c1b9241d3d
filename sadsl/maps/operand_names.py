"""Checks names that a caller gives to run-time arrays."""

from lowering import ir


def check_operand_name(what: str, value: object, *others: str) -> None:
    """Checks the name of an operand, a run-time array.

    Args:
      what: what the error calls the argument, as ``"gated: gates"``.
      value: the argument.
      *others: what else the argument may be, for the error, as ``"None"``.

    Raises:
      ValueError: the name is not a Python identifier.

    Example:
      >>> check_operand_name("gated: gates", "a b", "None")
      Traceback (most recent call last):
      ValueError: gated: gates='a b' must be None or the name of an operand, a Python
        identifier; its value is passed as operands={name: value}
    """
    if not ir.is_name(value):
        known = f"{', '.join(others)} or " if others else ""
        raise ValueError(
            f"{what}={value!r} must be {known}the name of an operand, a Python "
            "identifier; its value is passed as operands={name: value}"
        )
