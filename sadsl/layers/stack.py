"""A spec for each layer of a stack: dense first, alternating, or as a plan says."""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

from typing_extensions import TypeIs

from sadsl.layers.transforms import HeadTransforms, Transforms
from sadsl.maps.base import PerHead
from sadsl.terms.base import Spec, Term
from sadsl.terms.heads import Heads
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

# One spec for all layers, or one for each; each may be text.
Specs: TypeAlias = Spec | str | Sequence[Spec | str]
Item = TypeVar("Item")


def per_layer(
    period: Specs,
    num_layers: int,
    *,
    first: Sequence[Spec | str] = (),
    last: Sequence[Spec | str] = (),
) -> tuple[Term, ...]:
    """Lists the specs of ``num_layers`` layers: ``first``, then ``period`` in turns.

    ``SparseAttention(spec=specs, layer=i)`` takes the spec of its layer::

        per_layer(moba(), 24, last=["causal()"] * 3)    # MoBA, 2025, section 3.2
        per_layer(radial(21, 1560), 40, first=["full()"])    # Radial Attention, 2025
        per_layer([s2_attention(), "causal()"], 32)     # Phi-3-small, 2024: in turns

    Args:
      period: one spec, or several that take turns. They begin after ``first`` and may
        stop anywhere.
      num_layers: the layers of the stack.
      first, last: specs of the first and of the last layers, in order.

    Raises:
      ValueError: a text is not a spec, ``period`` is empty, or ``first`` and ``last``
        have more specs than there are layers.

    Example:
      >>> from sadsl.layers import per_layer
      >>> for term in per_layer(["window(64)", "linear()"], 4, last=["full()"]):
      ...     print(term)
      softmax(window(64))
      linear()
      softmax(window(64))
      softmax(full())
    """
    turns = period if _is_list(period) else (period,)
    if not turns:
        raise ValueError("period=() must have at least one spec")
    between = num_layers - len(first) - len(last)
    if between < 0 or num_layers < 1:
        raise ValueError(
            f"num_layers={num_layers} with {len(first)} first and {len(last)} last "
            "layers: give at least as many layers as specs"
        )
    middle = [turns[i % len(turns)] for i in range(between)]
    return tuple(any_term(spec) for spec in (*first, *middle, *last))


def of_layer(
    spec: Specs, layer: int | None, transforms: Transforms = None
) -> tuple[Term, HeadTransforms]:
    """The spec and the transforms of one layer.

    Raises:
      TypeError: ``layer`` is not an integer.
      ValueError: a list without ``layer``, ``layer`` without a list, a list that is too
        short, or two lists that differ in length.
    """
    listed = isinstance(transforms, Sequence)
    if not _is_list(spec) and not listed and layer is not None:
        raise ValueError(
            f"layer={layer} chooses from a list of specs, but spec={spec!r} is one "
            "for all layers: leave layer=None, or give a list"
        )
    if _is_list(spec) and listed and len(spec) != len(transforms):
        raise ValueError(
            f"spec is a list of {len(spec)}, and transforms of {len(transforms)}: give "
            "one of each for every layer"
        )
    found = _chosen("spec", spec, layer) if _is_list(spec) else spec
    around = _chosen("transforms", transforms, layer) if listed else transforms
    return any_term(found), HeadTransforms() if around is None else around


def _chosen(name: str, values: Sequence[Item], layer: int | None) -> Item:
    """The entry of a layer in a list with one for each."""
    if layer is None:
        raise ValueError(
            f"{name} is a list of {len(values)}, one for each layer: choose with "
            "layer=..."
        )
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer={layer!r} must be an integer")
    if not 0 <= layer < len(values):
        what = "specs" if name == "spec" else name
        raise ValueError(
            f"layer={layer} of a list of {len(values)} {what}, which are counted from "
            "0: make the list as long as the stack, by per_layer(specs, num_layers)"
        )
    return values[layer]


def check_heads(term: Term, num_heads: int) -> None:
    """Refuses specs of heads that are not those of the layer.

    Raises:
      ValueError: ``heads`` or ``per_head`` is for another number of heads.
    """
    if isinstance(term, Heads) and term.num_heads != num_heads:
        fits, has = False, f"{term.num_heads} heads"
    elif isinstance(term, Softmax) and isinstance(term.map, PerHead):
        count = len(term.map.maps)
        fits, has = num_heads % count == 0, f"{count} groups of heads"
    else:
        return
    if not fits:
        raise ValueError(
            f"spec={term!r} is for {has}, but the layer has {num_heads} query heads: "
            "give the head plan of this model, or change num_heads"
        )


def _is_list(spec: Specs) -> TypeIs[Sequence[Spec | str]]:
    return isinstance(spec, Sequence) and not isinstance(spec, str)
