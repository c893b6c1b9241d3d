"""One description of the layers whose indexer chooses keys, for both Flax APIs.

An ``IndexedLayer`` is a frozen value: the spec, the core around the attention, and the
indexer. The spec says what the indexer makes: the arrays that its score reads. A spec
that reuses a choice has no indexer, and takes the choice of an earlier layer; see
``run_stack``. The functions of ``indexed_models`` describe the published layers.

The indexer learns from its own loss, and the rest of the layer from its output: no
gradient goes from one to the other. The names of the indexer's parameters begin with
"index_", so that an optimizer can freeze all others in the dense warm-up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lists.call import num_blocks
from sadsl.layers.entry_core import EntryCore
from sadsl.layers.indexed_cores import CoreInputs, GroupedCore, LatentCore
from sadsl.layers.indexed_loss import Attention, choice_loss
from sadsl.layers.indexers import Indexer
from sadsl.layers.learned import started
from sadsl.layers.linear import Running
from sadsl.layers.linear_gates import Parameter, Params, constant, kernel, projected
from sadsl.maps.named import full
from sadsl.run.call import attention, select
from sadsl.selections.base import selections_of, with_choice
from sadsl.selections.budgets import TopK
from sadsl.selections.dot_scores import Dot
from sadsl.selections.reused import Reused
from sadsl.terms.base import Spec, Term, read_by
from sadsl.text.specs import any_term

Core: TypeAlias = GroupedCore | LatentCore | EntryCore
Loss: TypeAlias = Literal["dense", "sparse"]
LOSSES = (None, "dense", "sparse")


class LayerOutput(NamedTuple):
    """What a layer gives.

    Attributes:
      out: ``[batch, seq, out_features]``.
      choices: the choice that the layer made, for layers that reuse it, if asked for.
      loss: the loss of its indexer, if asked for; 0 without an indexer.
    """

    out: Array
    choices: Mapping[str, Array]
    loss: Array | None


@dataclass(frozen=True)
class IndexedLayer:
    """A layer around a spec that chooses by an indexer; see ``indexed_models``.

    Attributes:
      spec: a map or a term with at most one choice, by a ``dot`` score or reused.
      features, out_features: of the input and of the result.
      core: the projections and norms around the attention.
      indexer: makes the arrays of the score, if the spec has one.
      gate: whether each channel of the output has a sigmoid gate of the input.
      starts: where learned arrays of the spec start, if not at 0.
    """

    spec: Spec
    features: int
    out_features: int
    core: Core
    indexer: Indexer | None = None
    gate: bool = False
    starts: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        chosen = selections_of(self.spec)
        scored = [
            x for x in chosen if isinstance(x, TopK) and isinstance(x.score.by, Dot)
        ]
        reused = [x for x in chosen if isinstance(x, Reused)]
        if len(chosen) > 1 or len(scored) + len(reused) < len(chosen):
            raise ValueError(
                f"spec={self.spec!r} must have one choice at most, topk(score=dot(...))"
                " or reused(...): SparseAttention takes other selections"
            )
        if scored and self.indexer is None:
            raise ValueError(
                f"spec={self.spec!r} scores keys by {scored[0].score.by!r}, but "
                "indexer=None makes no arrays for it: give an Indexer"
            )
        for name, array in self.term.learned(self.core.sizes).items():
            if array.per_query:
                raise ValueError(
                    f"spec={self.spec!r} learns {name!r}, one for each query: this "
                    "layer learns arrays of heads only; SparseAttention projects others"
                )

    @property
    def term(self) -> Term:
        """The spec as a term."""
        return any_term(self.spec)

    @property
    def choice(self) -> TopK | None:
        """The choice that this layer makes, by its indexer."""
        return next((x for x in selections_of(self.spec) if isinstance(x, TopK)), None)

    @property
    def reused(self) -> Reused | None:
        """The choice that this layer takes from an earlier one."""
        found = selections_of(self.spec)
        return next((x for x in found if isinstance(x, Reused)), None)

    @property
    def dense_term(self) -> Term:
        """The spec of the dense warm-up: all pairs that might be chosen."""
        spec = self.term
        for choice in selections_of(spec):
            spec = with_choice(spec, choice, full())
        return spec

    def parameters(self) -> dict[str, Parameter]:
        """The arrays that the layer learns, by name."""
        core = self.core
        found = core.parameters(self.features, self.out_features)
        starts = dict(self.starts)
        for name, array in self.term.learned(core.sizes).items():
            start = started(array)
            if name in starts:
                start = constant(starts[name]).start
            found[name] = Parameter(array.shape, start)
        if self.gate:
            sizes = core.sizes
            found["gate"] = kernel(self.features, sizes.num_q_heads, sizes.head_dim_v)
        if self.choice is not None and self.indexer is not None:
            width = core.latent_width(self.features)
            found |= self.indexer.parameters(_score(self.choice), self.features, width)
        return found

    def __call__(
        self,
        params: Params,
        x: Float[Array, "batch seq features"],
        *,
        choices: Mapping[str, Array] | None = None,
        return_choices: bool = False,
        loss: Loss | None = None,
        running: Running | None = None,
    ) -> LayerOutput:
        """The outputs, and the choice and the loss if asked for.

        Args:
          params: an array for each of ``parameters()``.
          x: the inputs.
          choices: choices of earlier layers, if the spec reuses one.
          return_choices: whether to return the choice that this layer makes, as lists.
          loss: "dense" attends to all keys and trains the indexer on all of them;
            "sparse" on the chosen ones. None for no loss.
          running: the dtype and the backend.

        Raises:
          ValueError: the choice that the spec reuses is missing or of another length,
            or there is no such loss.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} must be one of {LOSSES}")
        running = Running() if running is None else running
        dtype = running.dtype
        if dtype is None:
            dtype = jnp.promote_types(x.dtype, params["out"].dtype)
        x = x.astype(dtype)
        made = self.core.inputs(params, x)
        spec = self.dense_term if loss == "dense" else self.term
        index = self._index(params, x, made)
        operands = {**made.operands, **index, **self._learned(params)}
        found: dict[str, Array] = {}
        if self.reused is not None and loss != "dense":
            operands |= _taken(self.reused, choices, x.shape[1])
        elif made.num_keys and (return_choices or loss == "sparse"):
            found = select(
                spec, made.q, made.k, operands=read_by(spec, operands), lists=True
            )
            operands |= found
        attended = attention(
            made.q, made.k, made.v, spec, operands=read_by(spec, operands),
            return_lse=loss is not None, impl=running.impl,
            interpret=running.interpret, config=running.config,
        )  # fmt: skip
        out, value = attended, None
        if loss is not None:
            out, lse = attended
            call = Attention(*self.core.scored(made, spec, operands), lse, _scale(made))
            value = self._loss(loss, call, index, found)
        y = self._output(params, x, cast(Array, out))
        return LayerOutput(y, found if return_choices else {}, value)

    def _index(self, params: Params, x: Array, made: CoreInputs) -> dict[str, Array]:
        """The arrays of the score of the choice that this layer makes."""
        choice = self.choice
        if choice is None or self.indexer is None:
            return {}
        cells = None
        if self.indexer.keys.length > 1:
            # Pooled keys are those of cells: a cell without a whole pool gets zeros.
            assert isinstance(choice.block, int)
            cells = num_blocks(made.num_keys, choice.block)
        return self.indexer.operands(_score(choice), params, x, made.latent, cells)

    def _learned(self, params: Params) -> dict[str, Array]:
        """The parameters that the spec reads itself, such as sinks."""
        return {name: params[name] for name in self.term.learned(self.core.sizes)}

    def _loss(self, loss: Loss, call: Attention, index: Params, found: Params) -> Array:
        """The loss of the indexer; 0 without one, or with nothing to choose from."""
        if self.choice is None or not call.k.shape[1]:
            return jnp.zeros((), jnp.float32)
        listed = None
        if loss == "sparse":
            listed = found[self.choice.key("listed")]
        return choice_loss(self.choice, index, call, listed)

    def _output(self, params: Params, x: Array, out: Array) -> Array:
        if self.gate:
            opened = jax.nn.sigmoid(projected(x, params["gate"]))
            out = out * opened
        return self.core.output(params, out)


def _score(choice: TopK) -> Dot:
    score = choice.score.by
    assert isinstance(score, Dot)
    return score


def _scale(made: CoreInputs) -> float:
    return made.q.shape[-1] ** -0.5


def _taken(
    reused: Reused, choices: Mapping[str, Array] | None, length: int
) -> dict[str, Any]:
    """The arrays of a choice of an earlier layer.

    Raises:
      ValueError: they are missing, or for another number of queries.
    """
    found = {name: x for name, x in (choices or {}).items() if reused.owns(name)}
    if not found:
        raise ValueError(
            f"the layer reuses {reused.choice!r}, which was not given: pass choices= of"
            " the layer that makes it (return_choices=True), or run both by run_stack"
        )
    for name, x in found.items():
        if x.shape[-2] != length:
            raise ValueError(
                f"the shared choice {name!r} is for {x.shape[-2]} queries, this layer "
                f"has {length}: share a choice only between layers of one pass"
            )
    return found
