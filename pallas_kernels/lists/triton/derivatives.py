"""The gradient of attention by lists, in reverse mode.

The kernels compute the first derivative. The second is ``jax.vjp`` of the forward pass
in plain JAX over all pairs (``pallas_kernels/lists/xla.py``). As in
``pallas_kernels/dispatch.py``, the forward rule of a ``custom_vjp`` calls the
``custom_vjp`` itself, so that a second derivative finds a rule.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import softmax
from pallas_kernels.call import (
    Cotangents,
    Inputs,
    Kept,
    Outputs,
    Vectors,
    named,
    to_backward,
)
from pallas_kernels.lists import xla
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton import dkv, dq, forward
from pallas_kernels.lists.triton.launch import arranged, arranged_inputs, sizes_of
from pallas_kernels.lists.triton.tiles import dims_of, tiles
from pallas_kernels.lists.triton.transposed import spans_of
from pallas_kernels.triton.launch import heads_first
from pallas_kernels.varying import vary


def attend_lists(
    inputs: Inputs, vectors: Vectors, index: Array, call: ListCall
) -> Outputs:
    """Outputs and lse, differentiable in reverse mode."""
    return _attend(call, inputs, vectors, index).outputs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: ListCall, inputs: Inputs, vectors: Vectors, index: Array) -> Kept:
    return forward.forward(inputs, vectors, index, call)


def _attend_fwd(
    call: ListCall, inputs: Inputs, vectors: Vectors, index: Array
) -> tuple[Kept, Any]:
    kept = named(_attend(call, inputs, vectors, index), call.residual_name)
    return kept, (inputs, kept, vectors, index)


def _attend_bwd(call: ListCall, residuals: Any, cotangent: Kept) -> Any:
    gradients = _backward(call, *residuals, cotangent.outputs)
    return gradients, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(
    call: ListCall, inputs: Inputs, kept: Kept, vectors: Vectors, index: Array,
    cotangent: Outputs,
) -> Inputs:  # fmt: skip
    """The gradients of the inputs; ``kept`` is what ``_attend`` returns for them."""
    sizes = sizes_of(inputs, index, call)
    dims = dims_of(inputs, call.values)
    chosen = tiles(sizes.members, spans_of(sizes).keys, dims, inputs.q.dtype)
    inputs, (lse, do, delta) = to_backward(inputs, kept, cotangent)
    lse = softmax.lse_for_backward(lse, call.unit)
    cotangents = vary(Cotangents(lse, do, delta), inputs.q)
    given = arranged_inputs(inputs, call.values)
    arrays = given, Cotangents(*map(arranged, cotangents))
    of_q = dq.backward(*arrays, vectors, index, sizes, chosen.dq, call)
    of_keys = dkv.backward(*arrays, vectors, index, sizes, chosen.dkv, call)
    found = [
        heads_first(x, like.shape[2], like.shape[3])
        for x, like in zip((of_q, *of_keys), inputs, strict=False)
    ]
    v: Any = None if call.values else found[2]
    return Inputs(found[0], found[1], v)


def _backward_fwd(
    call: ListCall, inputs: Inputs, kept: Kept, vectors: Vectors, index: Array,
    cotangent: Outputs,
) -> tuple[Inputs, Any]:  # fmt: skip
    gradients = _backward(call, inputs, kept, vectors, index, cotangent)
    return gradients, (inputs, vectors, index, cotangent)


def _backward_bwd(call: ListCall, residuals: Any, moved: Inputs) -> Any:
    inputs, vectors, index, cotangent = residuals

    def gradient(inputs: Inputs, cotangent: Outputs) -> Inputs:
        def run(inputs: Inputs) -> Outputs:
            return xla.over_pairs(inputs, vectors, None, index, call)

        (found,) = jax.vjp(run, inputs)[1](cotangent)
        v: Any = None if call.values else found.v
        return found._replace(v=v)

    # As a function of inputs and cotangent: it computes anew what ``kept`` holds.
    dinputs, dcotangent = jax.vjp(gradient, inputs, cotangent)[1](moved)
    return dinputs, None, None, None, dcotangent


_backward.defvjp(_backward_fwd, _backward_bwd)
