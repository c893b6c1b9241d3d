"""A pytest plugin: Flax's attention layers and functions run on ``attention_fn``.

Every place where Flax's dense ``dot_product_attention`` is a default or a public name
gets ``attention_fn("full()")`` instead: what a user does by one argument.
"""

import inspect
from typing import Any

import flax.linen
import flax.linen.attention
import flax.nnx
import flax.nnx.nn.attention

from sadsl.layers import attention_fn

OURS = attention_fn("full()")
MODULES = flax.linen, flax.linen.attention, flax.nnx, flax.nnx.nn.attention


def pytest_configure() -> None:
    """Swaps before Flax's tests are imported."""
    for dense in {
        id(m.dot_product_attention): m.dot_product_attention for m in MODULES
    }.values():
        swap(dense)


def swap(dense: Any) -> None:
    """Puts our function where ``dense`` is."""
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if value is dense:
                setattr(module, name, OURS)
            elif inspect.isclass(value):
                swap_in_class(value, dense)


def swap_in_class(value: type, dense: Any) -> None:
    """Puts our function where ``dense`` is a default of a class or of its methods."""
    for name, held in list(vars(value).items()):
        if held is dense:
            setattr(value, name, OURS)
        function = inspect.unwrap(held) if callable(held) else None
        for layer in (held, function):
            swap_defaults(layer, dense)
    for field in getattr(value, "__dataclass_fields__", {}).values():
        if field.default is dense:
            field.default = OURS


def swap_defaults(function: Any, dense: Any) -> None:
    """Puts our function where ``dense`` is the default of a parameter."""
    defaults = getattr(function, "__defaults__", None)
    if defaults and dense in defaults:
        function.__defaults__ = tuple(OURS if x is dense else x for x in defaults)
    for name, x in (getattr(function, "__kwdefaults__", None) or {}).items():
        if x is dense:
            function.__kwdefaults__[name] = OURS
