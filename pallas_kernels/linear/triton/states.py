"""The states at the starts of all chunks: a loop over chunks, forward and backward."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear.call import ChunkInputs, LinearCall
from pallas_kernels.linear.chunk import State, carried
from pallas_kernels.linear.products import plain_dot
from pallas_kernels.linear.triton import launch
from pallas_kernels.linear.triton.updates import Update
from pallas_kernels.loops import repeat
from pallas_kernels.varying import shape_like

# Values of a state are independent: a program computes this many of them at most.
SLICE = 64


class States(NamedTuple):
    """The results of the loop over chunks.

    Attributes:
      starts: the state at the start of each chunk, f32 ``[heads, chunks, ...]``.
      values: the values that keys write, ``[heads, padded, head_dim_v]``.
      end: the state after all chunks, f32 ``[heads, ...]``.
    """

    starts: State
    values: Any
    end: State


class Own(NamedTuple):
    """The cotangents that the reads of each chunk cause in that chunk.

    Attributes:
      states: of the state at its start, f32 ``[heads, chunks, ...]``.
      values: of the values that its keys write, f32 ``[heads, padded, head_dim_v]``.
    """

    states: State
    values: Any


class Ends(NamedTuple):
    """The cotangents of the loop over chunks.

    Attributes:
      ends: of the state at the end of each chunk, f32 ``[heads, chunks, ...]``.
      values: of the values that keys write, f32 ``[heads, padded, head_dim_v]``.
      start: of the state before all chunks, f32 ``[heads, ...]``.
    """

    ends: State
    values: Any
    start: State


def forward(chunks: ChunkInputs, update: Update, call: LinearCall) -> States:
    """Goes through the chunks in order."""
    heads, padded, features = update.writes.shape
    head_dim_v, steps = update.values.shape[-1], padded // call.chunk
    lead = heads, steps
    shape = shape_like((*lead, features, head_dim_v), jnp.float32, chunks.k)
    erases = update.erased is not None
    starts, values, end = pl.pallas_call(
        partial(_forward_kernel, call=call, steps=steps),
        grid=(heads, head_dim_v // min(SLICE, head_dim_v)),
        in_specs=[_update_specs(update), _sliced(chunks.state.s)],
        out_specs=[
            _sliced(shape),
            _sliced(update.values) if erases else None,
            _sliced(chunks.state.s),
        ],
        out_shape=[
            shape,
            launch.struct(update.values, update.values.dtype) if erases else None,
            launch.struct(chunks.state.s),
        ],
        name="sadsl_linear_states",
        **launch.options(call),
    )(update, chunks.state.s)
    values = update.values if values is None else values
    z = _sums(update, chunks.state.z, steps)
    if z is None:
        return States(State(starts, None), values, State(end, None))
    return States(State(starts, z[:, :-1]), values, State(end, z[:, -1]))


def backward(update: Update, own: Own, cotangent: State, call: LinearCall) -> Ends:
    """Goes through the chunks in the opposite order."""
    heads, padded, _ = update.writes.shape
    steps, head_dim_v = padded // call.chunk, update.values.shape[-1]
    ends, values, start = pl.pallas_call(
        partial(_backward_kernel, call=call, steps=steps),
        grid=(heads, head_dim_v // min(SLICE, head_dim_v)),
        in_specs=[
            _update_specs(update)._replace(values=None),
            _sliced(own.states.s), _sliced(own.values), _sliced(cotangent.s),
        ],
        out_specs=[_sliced(x) for x in (own.states.s, own.values, cotangent.s)],
        out_shape=[
            launch.struct(x) for x in (own.states.s, own.values, cotangent.s)
        ],
        name="sadsl_linear_backward_states",
        **launch.options(call),
    )(update._replace(values=None), own.states.s, own.values, cotangent.s)  # fmt: skip
    if cotangent.z is None:
        return Ends(State(ends, None), values, State(start, None))
    z = _reverse_sums(update, own.states.z, cotangent.z)
    return Ends(State(ends, z[:, 1:]), values, State(start, z[:, 0]))


# --- kernels: a program has one head, and a slice of the values ---


def _forward_kernel(
    update: Update, start_ref: Any, starts_ref: Any, values_ref: Any, end_ref: Any,
    *, call: LinearCall, steps: int,
) -> None:  # fmt: skip
    """Stores the state ``[features, slice]`` at the start of each chunk, and ``U``.

    ``update`` has ``[padded, features]``, ``[padded, slice]`` and ``[steps, 1 or
    features]``. Without an erase vector ``U`` is ``update.values``.
    """
    assert starts_ref.shape == (steps, *start_ref.shape)
    dot = plain_dot(update.values.dtype)

    def step(c: Any, s: Any) -> Any:
        rows = pl.ds(c * call.chunk, call.chunk)
        starts_ref[c] = s
        values = update.values[rows, :].astype(jnp.float32)
        if update.erased is not None:
            values -= dot(update.erased[rows, :], s, (1, 0))
            values_ref[rows, :] = values.astype(values_ref.dtype)
        if update.present is not None:
            # What an earlier document wrote may be NaN, and 0 * nan is NaN.
            values = jnp.where(update.present[rows][:, None], values, 0.0)
        return carried(_whole(update, c), s) + dot(
            update.writes[rows, :], values, (0, 0)
        )

    end_ref[...] = repeat(steps, step, start_ref[...])


def _backward_kernel(
    update: Update, own_ref: Any, dvalues_ref: Any, end_ref: Any,
    ends_ref: Any, values_ref: Any, start_ref: Any, *, call: LinearCall, steps: int,
) -> None:  # fmt: skip
    """Sums the cotangents of states from the last chunk to the first.

    With ``dS`` that of the state at the end of a chunk, shaped as in the forward
    kernel: ``dU = own dU + writes dS``, and at the start ``whole dS + own - W^T dU``.
    """
    assert ends_ref.shape == own_ref.shape == (steps, *end_ref.shape)
    dot = plain_dot(update.writes.dtype)

    def step(i: Any, ds: Any) -> Any:
        c = steps - 1 - i
        rows = pl.ds(c * call.chunk, call.chunk)
        ends_ref[c] = ds
        du = dvalues_ref[rows, :] + dot(update.writes[rows, :], ds, (1, 0))
        values_ref[rows, :] = du
        ds = carried(_whole(update, c), ds) + own_ref[c]
        if update.erased is not None:
            ds -= dot(update.erased[rows, :], du, (0, 0))
        return ds

    start_ref[...] = repeat(steps, step, end_ref[...])


def _whole(update: Update, c: Any) -> Any:
    return None if update.whole is None else update.whole[c][:, None]


def _update_specs(update: Update) -> Update:
    def whole(x: Any) -> pl.BlockSpec:
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda h, s: (h, *rest))

    specs = jax.tree.map(whole, update)
    return specs._replace(values=_sliced(update.values))


def _sliced(x: Any) -> pl.BlockSpec:
    """The spec of a slice of the last axis."""
    shape = *x.shape[1:-1], min(SLICE, x.shape[-1])
    middle = (0,) * (len(shape) - 1)
    return pl.BlockSpec((None, *shape), lambda h, s: (h, *middle, s))


# --- sums of keys, for the normaliser: small, so in XLA ---


def _sums(update: Update, start: Any, steps: int) -> Any:
    """The sum of the keys at the start of each chunk and after the last one."""
    if start is None:
        return None
    heads, _, features = update.writes.shape
    added = update.writes.astype(jnp.float32).reshape(heads, steps, -1, features)
    added = added.sum(axis=2, keepdims=True)
    whole = update.whole
    if whole is not None:
        whole = jnp.concatenate([jnp.ones_like(whole[:, :1]), whole], axis=1)
    return _scan(whole, jnp.concatenate([start[:, None], added], axis=1))


def _reverse_sums(update: Update, own: Any, end: Any) -> Any:
    """The cotangents of the sums of keys at the start of each chunk and at the end."""
    whole = update.whole
    if whole is not None:
        whole = jnp.concatenate([whole, jnp.ones_like(whole[:, :1])], axis=1)
    return _scan(whole, jnp.concatenate([own, end[:, None]], axis=1), reverse=True)


def _scan(whole: Any, x: Any, *, reverse: bool = False) -> Any:
    """``y_i = whole_i y_(i-1) + x_i`` along the second axis, or from its end."""
    if whole is None:
        return jax.lax.cumsum(x, axis=1, reverse=reverse)

    def combine(a: tuple, b: tuple) -> tuple:
        return a[0] * b[0], carried(b[0], a[1]) + b[1]

    pair = jnp.broadcast_to(whole[:, :, None], x.shape), x
    return jax.lax.associative_scan(combine, pair, axis=1, reverse=reverse)[1]
