"""One attention call on a chosen backend, with its gradient.

Structure (each custom_vjp's forward rule calls the custom_vjp itself, never the raw
kernel, so that a second derivative finds a rule): ``attend`` is differentiated by
``backward``, and ``backward`` by ``jax.vjp`` of a twin in plain JAX.
"""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dense, tpu, triton, xla
from pallas_kernels.call import Call, Cotangents, Inputs, Masks, Outputs, Vectors

BACKENDS: dict[str, ModuleType] = {"xla": xla, "tpu": tpu, "triton": triton}


def attend(
    inputs: Inputs, vectors: Vectors, masks: Masks, call: Call, *, impl: str
) -> Outputs:
    """Attention over the blocks of ``masks``: values, lse, and gradients of both.

    ``jit``, ``vmap``, ``jax.checkpoint`` and ``shard_map(check_vma=False)`` hold. The
    residuals are named ``attn_out`` and ``attn_lse`` for checkpoint policies.
    """
    lists = BACKENDS[impl].prepare(masks, call)
    return _attend(impl, call, inputs, vectors, masks.forward.test_of_head, lists)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, tests: Any, lists: Any
) -> Outputs:
    del tests
    return BACKENDS[impl].forward(inputs, vectors, lists, call)


def _attend_fwd(
    impl: str, call: Call, inputs: Inputs, vectors: Vectors, tests: Any, lists: Any
) -> tuple[Outputs, Any]:
    o, lse = _attend(impl, call, inputs, vectors, tests, lists)
    o, lse = checkpoint_name(o, "attn_out"), checkpoint_name(lse, "attn_lse")
    return Outputs(o, lse), (inputs, vectors, tests, lists, o, lse)


def _attend_bwd(impl: str, call: Call, residuals: Any, cotangent: Outputs) -> Any:
    inputs, vectors, tests, lists, o, lse = residuals
    do, dlse = cotangent
    # An empty row has a constant lse of -inf: nothing flows back through it.
    dlse = jnp.where(jnp.isneginf(lse), 0.0, dlse)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - dlse
    cotangents = Cotangents(lse, do, delta)
    gradients = _backward(impl, call, inputs, cotangents, vectors, tests, lists)
    return Inputs(*gradients), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents,
    vectors: Vectors, tests: Any, lists: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    del tests
    return BACKENDS[impl].backward(inputs, cotangents, vectors, lists, call)


def _backward_fwd(
    impl: str, call: Call, inputs: Inputs, cotangents: Cotangents,
    vectors: Vectors, tests: Any, lists: Any,
) -> tuple[Any, Any]:  # fmt: skip
    gradients = _backward(impl, call, inputs, cotangents, vectors, tests, lists)
    return gradients, (inputs, cotangents, vectors, tests)


def _backward_bwd(impl: str, call: Call, residuals: Any, cotangent: Any) -> Any:
    del impl
    inputs, cotangents, vectors, tests = residuals
    twin = partial(dense.backward, vectors=vectors, tests=tests, call=call)
    _, pull = jax.vjp(twin, inputs, cotangents)
    return *pull(cotangent), None, None, None


_backward.defvjp(_backward_fwd, _backward_bwd)
