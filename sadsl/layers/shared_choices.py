"""Runs a stack whose layers share choices: made once, handed to those that reuse them.

A spec names what its layer makes, ``topk(...)``, and what it takes, ``reused(...)`` of
an equal selection. A layer takes the choice of the last layer before it that makes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.layers.indexed import IndexedLayer, Loss
from sadsl.selections.base import Selection, selections_of
from sadsl.selections.reused import Reused
from sadsl.terms.base import Spec
from sadsl.text.specs import any_term

# What is around the attention of layer i: (i, x, attend) to the next x.
Around: TypeAlias = Callable[[int, Array, Callable[[Array], Array]], Array]


class StackOutput(NamedTuple):
    """What a stack gives: its output, and the sum of the losses of its indexers."""

    out: Array
    loss: Array


def choice_sources(specs: Sequence[Spec | str]) -> tuple[int | None, ...]:
    """For each layer the layer whose choice it reuses; None if it reuses none.

    Raises:
      ValueError: a layer reuses a choice that no layer before it makes.

    Example:
      >>> from sadsl.catalog import models
      >>> from sadsl.layers import choice_sources
      >>> choice_sources(models.glm_5(7, every=4))
      (None, None, 1, 1, 1, None, 5)
    """
    made: dict[Selection, int] = {}
    found: list[int | None] = []
    for i, spec in enumerate(specs):
        source = None
        for choice in selections_of(any_term(spec)):
            if not isinstance(choice, Reused):
                made[choice] = i
            elif choice.choice in made:
                source = made[choice.choice]
            else:
                others = ", ".join(map(repr, made)) or "none"
                raise ValueError(
                    f"layer {i} reuses {choice.choice!r}, which no layer before it "
                    f"makes; the choices before it are: {others}. Begin the stack with "
                    "the layer that makes it, and give both the same selection"
                )
        found.append(source)
    return tuple(found)


def run_stack(
    layers: Sequence[Any],
    x: Float[Array, "batch seq features"],
    around: Around | None = None,
    *,
    loss: Loss | None = None,
) -> StackOutput:
    """Runs layers one after the other, and hands on the choices that they share.

    A choice that a later layer reuses is made once, as lists. Other layers choose in
    whatever form the planner takes.

    Args:
      layers: modules with a ``spec``: ``IndexedAttention``, and any others, such as
        ``KimiDelta``, which are called with ``x`` only.
      x: the inputs.
      around: ``(i, x, attend)`` to the inputs of the next layer: norms, residuals and
        MLPs. ``x + attend(x)`` if None. It calls ``attend`` once, and not inside of a
        transformation such as ``jax.checkpoint``, out of which no choice could come.
      loss: "dense" or "sparse": the loss of each indexer; see ``IndexedLayer``. In the
        dense warm-up nothing is shared, since no layer chooses.

    Raises:
      ValueError: a layer reuses a choice that no layer before it makes, or one of
        another length.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.catalog import models
      >>> from sadsl.layers import indexed_models, run_stack
      >>> from sadsl.layers.nnx import IndexedAttention
      >>> dims = indexed_models.LatentDims(4, 4, 4, 2, 4)
      >>> def model(x):  # [batch, seq, features]
      ...     layers = [
      ...         IndexedAttention(
      ...             indexed_models.glm_5(8, 2, spec=spec, dims=dims, index_dim=4),
      ...             rngs=nnx.Rngs(i),
      ...         )
      ...         for i, spec in enumerate(models.glm_5(3, k=4, every=4))
      ...     ]
      ...     return run_stack(layers, x, loss="sparse")
      >>> jax.eval_shape(model, jax.ShapeDtypeStruct((1, 6, 8), "float32")).out.shape
      (1, 6, 8)
    """
    sources = choice_sources([layer.spec for layer in layers])
    around = _residual if around is None else around
    total, choices = jnp.zeros((), jnp.float32), {}
    for i, layer in enumerate(layers):
        attend = _Attend(layer, choices, i in sources and loss != "dense", loss)
        x = around(i, x, attend)
        if attend.count != 1:
            raise ValueError(
                f"around called attend {attend.count} times for layer {i}: it must "
                "call it once"
            )
        total = total + attend.loss
        choices = {**choices, **attend.choices}
    return StackOutput(x, total)


class _Attend:
    """The attention of a layer, as a function; it keeps what the stack needs of it."""

    def __init__(
        self, layer: Any, taken: Mapping[str, Array], keep: bool, loss: Loss | None
    ) -> None:
        self.call = layer, taken, keep, loss
        self.choices: Mapping[str, Array] = {}
        self.loss = jnp.zeros((), jnp.float32)
        self.count = 0

    def __call__(self, x: Array) -> Array:
        layer, taken, keep, loss = self.call
        self.count += 1
        if not isinstance(getattr(layer, "description", None), IndexedLayer):
            return layer(x)
        found = layer.attend(x, choices=taken, return_choices=keep, loss=loss)
        self.choices = found.choices
        if found.loss is not None:
            self.loss = found.loss
        return found.out


def _residual(i: int, x: Array, attend: Callable[[Array], Array]) -> Array:
    del i
    return x + attend(x)
