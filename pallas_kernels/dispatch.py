"""Runs one attention call on a chosen backend and defines its gradient.

The XLA backend defines its own derivatives, in both modes (``xla/primitive.py``). This
module defines those of the TPU and Triton kernels, in reverse mode only:

- the gradient of ``_attend`` is ``_backward``, and ``_score_gradient`` for learned
  scores;
- the gradient of these two is ``jax.vjp`` of the same passes in plain JAX
  (``dense.py``).

The forward rule of each ``custom_vjp`` calls the ``custom_vjp`` itself, not the raw
kernel, so that a second derivative finds a rule.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from pallas_kernels import dense, tpu, triton, xla
from pallas_kernels.call import (
    Backend,
    Call,
    Cotangents,
    Inputs,
    Kept,
    Masks,
    Outputs,
    ScoreValues,
    Vectors,
    named,
    to_backward,
)
from pallas_kernels.shared_values import of_keys
from pallas_kernels.varying import alike, vary
from pallas_kernels.xla import primitive
from pallas_kernels.xla.score_gradient import score_gradient

BACKENDS: dict[str, Backend] = {"xla": xla, "tpu": tpu, "triton": triton}


def attend(
    inputs: Inputs, vectors: Vectors, masks: Masks, call: Call, *, impl: str
) -> Outputs:
    """Attention over the blocks of ``masks``: outputs and lse, both differentiable.

    It works under ``jit``, ``vmap``, ``jax.checkpoint`` and ``shard_map``. A kernel in
    Pallas' interpreter needs ``check_vma=False`` under ``shard_map``. The residuals
    are named "attn_out" and "attn_lse" for checkpoint policies.
    """
    if call.values is not None:
        # Passes in plain JAX read v: all of them on a CPU, and the gradient of scores.
        inputs = inputs._replace(v=of_keys(inputs.k, call.values))
    lists = BACKENDS[impl].prepare(masks, call, inputs)
    tests = masks.forward.test_of_head
    if impl == "xla":
        found = primitive.attend(call, *alike((inputs, vectors, tests, lists)))
        return found.outputs
    scores = xla.prepare(masks, call, inputs) if call.learned_scores else None
    every = CallLists(lists, tests, scores)
    return _attend(impl, call, *alike((inputs, vectors, every))).outputs


class CallLists(NamedTuple):
    """The plans that the passes of one call read."""

    kernels: Any  # the lists of the backend
    tests: Any  # int32 [heads] or [batch * heads]: the test of each head
    scores: Any = None  # XlaLists for the gradient of learned scores


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, lists: CallLists
) -> Kept:
    return BACKENDS[impl].forward(inputs, vectors, lists.kernels, call)


def _attend_fwd(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, lists: CallLists
) -> tuple[Kept, Any]:
    kept = named(_attend(impl, call, inputs, vectors, lists), call.residual_name)
    return kept, (inputs, vectors, lists, kept)


def _attend_bwd(impl: str, call: Call, residuals: Any, cotangent: Kept) -> Any:
    inputs, vectors, lists, kept = residuals
    inputs, cotangents = to_backward(inputs, kept, cotangent.outputs)
    cotangents = vary(cotangents, inputs.q)
    gradients = _backward(impl, call, inputs, cotangents, vectors, lists)
    if not call.learned_scores:
        return Inputs(*gradients), None, None
    # A separate pass over the blocks: XLA removes it if its result is not used.
    scores = _score_gradient(call, inputs, cotangents, vectors, lists)
    return Inputs(*gradients), _of_scores(scores), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _of_scores(scores: ScoreValues) -> Any:
    """The cotangent of ``Vectors``: None for the integer arrays."""
    return Vectors(None, None, None, scores, None)  # type: ignore[arg-type]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    lists: CallLists,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    return BACKENDS[impl].backward(inputs, cotangents, vectors, lists.kernels, call)


def _backward_fwd(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    lists: CallLists,
) -> tuple[Any, Any]:  # fmt: skip
    gradients = _backward(impl, call, inputs, cotangents, vectors, lists)
    return gradients, (inputs, cotangents, vectors, lists.tests)


def _backward_bwd(impl: str, call: Call, residuals: Any, cotangent: Any) -> Any:
    del impl
    return _through_twin(dense.backward, call, residuals, cotangent)


_backward.defvjp(_backward_fwd, _backward_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_gradient(
    call: Call,
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: CallLists,
) -> ScoreValues:  # fmt: skip
    return score_gradient(inputs, cotangents, vectors, lists.scores, call)


def _score_gradient_fwd(
    call: Call,
    inputs: Inputs,
    cotangents: Cotangents,
    vectors: Vectors,
    lists: CallLists,
) -> tuple[Any, Any]:  # fmt: skip
    found = _score_gradient(call, inputs, cotangents, vectors, lists)
    return found, (inputs, cotangents, vectors, lists.tests)


def _score_gradient_bwd(call: Call, residuals: Any, cotangent: Any) -> Any:
    return _through_twin(dense.score_backward, call, residuals, cotangent)


_score_gradient.defvjp(_score_gradient_fwd, _score_gradient_bwd)


def _through_twin(twin: Callable, call: Call, residuals: Any, cotangent: Any) -> Any:
    """The cotangents of a backward pass, by ``jax.vjp`` of its plain JAX ``twin``."""
    inputs, cotangents, vectors, tests = residuals

    def run(inputs: Inputs, cotangents: Cotangents, scores: ScoreValues) -> Any:
        own = vectors._replace(scores=scores)
        return twin(inputs, cotangents, own, tests, call)

    _, pull = jax.vjp(run, inputs, cotangents, vectors.scores)
    *found, scores = pull(cotangent)
    return *found, _of_scores(scores), None
