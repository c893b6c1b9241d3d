"""One attention call on a chosen backend, with its gradient.

The XLA backend has derivatives of its own, of both modes. Those of the kernels are
here, as are those of learned scores (each custom_vjp's forward rule calls the
custom_vjp itself, never the raw kernel, so that a second derivative finds a rule):
``attend`` is differentiated by ``backward`` and ``score_gradient``, and these by
``jax.vjp`` of twins in plain JAX. Forward mode they do not have.
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
from pallas_kernels.varying import alike, vary
from pallas_kernels.xla import primitive
from pallas_kernels.xla.score_gradient import score_gradient

BACKENDS: dict[str, Backend] = {"xla": xla, "tpu": tpu, "triton": triton}


def attend(
    inputs: Inputs, vectors: Vectors, masks: Masks, call: Call, *, impl: str
) -> Outputs:
    """Attention over the blocks of ``masks``: values, lse, and gradients of both.

    ``jit``, ``vmap``, ``jax.checkpoint`` and ``shard_map`` hold; the last with a kernel
    in Pallas' interpreter needs ``check_vma=False``. The residuals are named
    ``attn_out`` and ``attn_lse`` for checkpoint policies.
    """
    lists = BACKENDS[impl].prepare(masks, call)
    tests = masks.forward.test_of_head
    if impl == "xla":
        found = primitive.attend(call, *alike((inputs, vectors, tests, lists)))
        return found.outputs
    walk = xla.prepare(masks, call) if call.learned_scores else None
    plan = CallPlan(lists, tests, walk)
    return _attend(impl, call, *alike((inputs, vectors, plan))).outputs


class CallPlan(NamedTuple):
    """The lists of a backend, the tests of the heads, and a walk for learned scores."""

    lists: Any
    tests: Any
    walk: Any = None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, plan: CallPlan
) -> Kept:
    return BACKENDS[impl].forward(inputs, vectors, plan.lists, call)


def _attend_fwd(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, plan: CallPlan
) -> tuple[Kept, Any]:
    kept = named(_attend(impl, call, inputs, vectors, plan))
    return kept, (inputs, vectors, plan, kept)


def _attend_bwd(impl: str, call: Call, residuals: Any, cotangent: Kept) -> Any:
    inputs, vectors, plan, kept = residuals
    inputs, cotangents = to_backward(inputs, kept, cotangent.outputs)
    cotangents = vary(cotangents, inputs.q)
    gradients = _backward(impl, call, inputs, cotangents, vectors, plan)
    if not call.learned_scores:
        return Inputs(*gradients), None, None
    # The walk of its own is dropped where nobody asks for what it finds.
    scores = _score_gradient(call, inputs, cotangents, vectors, plan)
    return Inputs(*gradients), _of_scores(scores), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _of_scores(scores: ScoreValues) -> Any:
    """The cotangent of ``Vectors``: None for the integer arrays."""
    return Vectors(None, None, None, scores, None)  # type: ignore[arg-type]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    plan: CallPlan,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    return BACKENDS[impl].backward(inputs, cotangents, vectors, plan.lists, call)


def _backward_fwd(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors,
    plan: CallPlan,
) -> tuple[Any, Any]:  # fmt: skip
    gradients = _backward(impl, call, inputs, cotangents, vectors, plan)
    return gradients, (inputs, cotangents, vectors, plan.tests)


def _backward_bwd(impl: str, call: Call, residuals: Any, cotangent: Any) -> Any:
    del impl
    return _through_twin(dense.backward, call, residuals, cotangent)


_backward.defvjp(_backward_fwd, _backward_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_gradient(
    call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors, plan: CallPlan
) -> ScoreValues:
    return score_gradient(inputs, cotangents, vectors, plan.walk, call)


def _score_gradient_fwd(
    call: Call, inputs: Inputs, cotangents: Cotangents, vectors: Vectors, plan: CallPlan
) -> tuple[Any, Any]:
    found = _score_gradient(call, inputs, cotangents, vectors, plan)
    return found, (inputs, cotangents, vectors, plan.tests)


def _score_gradient_bwd(call: Call, residuals: Any, cotangent: Any) -> Any:
    return _through_twin(dense.score_backward, call, residuals, cotangent)


_score_gradient.defvjp(_score_gradient_fwd, _score_gradient_bwd)


def _through_twin(twin: Callable, call: Call, residuals: Any, cotangent: Any) -> Any:
    """The cotangents of a backward pass, by the one in plain JAX."""
    inputs, cotangents, vectors, tests = residuals

    def run(inputs: Inputs, cotangents: Cotangents, scores: ScoreValues) -> Any:
        own = vectors._replace(scores=scores)
        return twin(inputs, cotangents, own, tests, call)

    _, pull = jax.vjp(run, inputs, cotangents, vectors.scores)
    *found, scores = pull(cotangent)
    return *found, _of_scores(scores), None
