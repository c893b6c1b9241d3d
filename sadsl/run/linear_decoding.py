"""Decodes linear attention token by token, with a state of constant size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import linear as kernels
from pallas_kernels.config import KernelConfig
from pallas_kernels.linear.algebra import normalised
from sadsl.run import linear as linear_run
from sadsl.run.linear import Arrays
from sadsl.run.linear_documents import padded, starts_of
from sadsl.run.linear_operands import (
    check_decay_heads,
    clipped,
    features_of,
    given_log_decay,
    log_decays,
    segment_ids,
)
from sadsl.terms.linear import Linear

# How many past documents a state remembers. Each step compares its id with all of them.
REMEMBERED = 64


class PastDocuments(NamedTuple):
    """The ids of the last documents, each once, the document of the last token first.

    A state keeps the sums of one document only. If a document comes back after another
    one, its sums are lost; the ids are kept to notice that.
    """

    ids: Array  # int32 [batch, REMEMBERED]; only the first of each row are used
    count: Array  # int32 [batch]: how many of them

    @property
    def used(self) -> Array:
        """Which entries of ``ids`` are used, bool ``[batch, REMEMBERED]``."""
        return jnp.arange(REMEMBERED)[None] < self.count[:, None]


class LinearState(NamedTuple):
    """The state of a decoder of linear attention; its size does not grow with tokens.

    Attributes:
      s: the sums of features times values, f32 ``[batch, heads, features,
        head_dim_v]``.
      z: the sums of features, f32 ``[batch, heads, features]``; None without a
        normaliser.
      documents: the ids of past documents; None without ``segments()``.
    """

    s: Array
    z: Array | None
    documents: PastDocuments | None


def linear_state(
    term: Linear, batch: int, num_heads: int, features: int, head_dim_v: int
) -> LinearState:
    """The state before the first token: all zeros.

    Args:
      term: ``linear(...)`` with a causal map.
      batch: number of batch entries.
      num_heads: heads of k; those of q if there is one decay for each head of q.
      features: the number of features; ``head_dim``, unless the feature map changes it.
      head_dim_v: the size of a value.

    Raises:
      ValueError: the map is not causal.

    Example:
      >>> import sadsl as sa
      >>> state = sa.linear_state(sa.linear(), 1, num_heads=2, features=4, head_dim_v=8)
      >>> state.s.shape, state.z.shape
      ((1, 2, 4, 8), (1, 2, 4))
    """
    _check_causal(term)
    z = jnp.zeros((batch, num_heads, features), jnp.float32)
    return LinearState(
        s=jnp.zeros((batch, num_heads, features, head_dim_v), jnp.float32),
        z=z if term.normalise else None,
        documents=PastDocuments(
            jnp.zeros((batch, REMEMBERED), jnp.int32), jnp.zeros(batch, jnp.int32)
        )
        if term.kind.segments
        else None,
    )


def linear_prefill(
    term: Linear,
    k: Array,
    v: Array,
    given: Mapping[str, Any] | None = None,
    num_q_heads: int | None = None,
) -> LinearState:
    """The state after the keys and values of a prompt.

    With ``segments()`` it is the state of the document of the last key, with all pieces
    of that document.

    Args:
      term: ``linear(...)`` with a causal map.
      k, v: keys and values ``[batch, seq, heads, ...]``, as in ``attention``.
      given: the operands that the term reads, and "kv_segment_ids".
      num_q_heads: heads of q; those of k if None.

    Raises:
      ValueError: the map is not causal, or arrays do not fit together.

    Example:
      With features of 1, the state counts tokens and sums their values:

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> term = sa.linear("identity")
      >>> k, v = jnp.ones((1, 4, 1, 1)), jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> state = sa.linear_prefill(term, k, v)
      >>> float(state.z[0, 0, 0]), float(state.s[0, 0, 0, 0])
      (4.0, 6.0)
    """
    _check_causal(term)
    given = given or {}
    batch, seq, num_kv_heads, head_dim = k.shape
    num_q_heads = num_kv_heads if num_q_heads is None else num_q_heads
    q = jax.ShapeDtypeStruct((batch, seq, num_q_heads, head_dim), k.dtype)
    phi = features_of(term, given)(k, "k")
    heads_of_q = jnp.zeros((*q.shape[:3], phi.shape[-1]), phi.dtype)
    past = None
    if term.kind.segments:
        ids = segment_ids("kv_segment_ids", given, k.shape[:2])
        last = (ids == ids[:, -1:])[:, :, None, None]
        phi, v = jnp.where(last, phi, 0), jnp.where(last, v, 0)
        past = _past_documents(ids)
    arrays = Arrays(heads_of_q, phi, v, log_decays(term, given, (q, k), 0))
    rule = kernels.scalar(term.eps if term.normalise else None)
    sizes = seq, phi.shape[-1], v.shape[-1]
    call = kernels.default_call(rule, "xla", sizes, v.dtype, KernelConfig())
    s, z = kernels.final_state(linear_run.kernel_inputs(arrays, None), call)
    return LinearState(s, None if z is None else z[:, :, 0], past)


def _past_documents(ids: Array) -> PastDocuments:
    """The documents of a prompt, ordered by their last tokens, the latest first."""
    seq = ids.shape[1]
    order = jnp.argsort(ids, axis=1, stable=True)
    together = jnp.take_along_axis(ids, order, axis=1)
    ends = jnp.roll(starts_of(together), -1, axis=1)
    at, _ = jax.lax.top_k(jnp.where(ends, order, -1), min(REMEMBERED, seq))
    found = jnp.take_along_axis(ids, jnp.maximum(at, 0), axis=1)
    count = jnp.sum(at >= 0, axis=1, dtype=jnp.int32)
    return PastDocuments(padded(found, 0, REMEMBERED - found.shape[1]), count)


def linear_step(
    term: Linear,
    state: LinearState,
    q: Array,
    k: Array,
    v: Array,
    given: Mapping[str, Any] | None = None,
) -> tuple[LinearState, Array]:
    """Adds one token to the state, and returns the new state and the token's output.

    The output is that of ``attention`` over the whole sequence. With ``segments()``, a
    token whose id differs from that of the previous token starts a document. A document
    must not come back after another one, since a state keeps the sums of one document.
    That is noticed for the last 64 documents: it is an error if the ids are known, and
    under ``jit`` the outputs of that piece are NaN. An earlier document starts anew.

    Args:
      term: ``linear(...)`` with a causal map.
      state: the state of the previous tokens.
      q, k, v: ``[batch, num_q_heads or num_kv_heads, head_dim]``.
      given: the operands of the term for this token: log-decays ``[batch, heads]``,
        segment ids ``[batch]``, and functions by their names.

    Returns:
      The new state, and the output ``[batch, num_q_heads, head_dim_v]``.

    Raises:
      ValueError: the map is not causal, arrays do not fit, or a document comes back.

    Example:
      The first token sees itself only, so its output is its value:

      >>> import jax, jax.numpy as jnp
      >>> import sadsl as sa
      >>> term = sa.linear()
      >>> state = sa.linear_state(term, 1, num_heads=1, features=2, head_dim_v=2)
      >>> x = jnp.array([[[1.0, 2.0]]])
      >>> state, out = jax.jit(lambda s: sa.linear_step(term, s, x, x, x))(state)
      >>> [round(float(y), 3) for y in out[0, 0]]
      [1.0, 2.0]
    """
    _check_causal(term)
    given = given or {}
    phi = features_of(term, given)
    fq, fk = (phi(x[:, None], n)[:, 0] for x, n in ((q, "q"), (k, "k")))
    batch, num_q_heads, num_kv_heads = *q.shape[:2], k.shape[1]
    _check_state(term, state, fk, v, num_q_heads)
    fq, fk, wide_v = (x.astype(jnp.float32) for x in (fq, fk, v))
    heads = state.s.shape[1]
    fk, wide_v = (jnp.repeat(x, heads // num_kv_heads, axis=1) for x in (fk, wide_v))
    fq = fq.reshape(batch, heads, num_q_heads // heads, -1)
    factor = _factor(term, given, (batch, num_q_heads, num_kv_heads))
    before = state
    if state.documents is not None:
        before, sees = _in_document(term, state, state.documents, given)
        fq = jnp.where(sees[:, None, None, None], fq, 0.0)
    s = factor[..., None, None] * before.s + fk[..., :, None] * wide_v[..., None, :]
    z = None if before.z is None else factor[..., None] * before.z + fk
    out = _output(term, fq, s, z).reshape(batch, num_q_heads, -1)
    return LinearState(s, z, before.documents), out.astype(q.dtype)


def _output(term: Linear, fq: Array, s: Array, z: Array | None) -> Array:
    """The output of features ``[batch, heads, group, features]`` on a state, f32."""
    out = jnp.einsum("bhgd,bhde->bhge", fq, s, precision="highest")
    if z is None:
        return out
    total = jnp.einsum("bhgd,bhd->bhg", fq, z, precision="highest")
    return normalised(out, total[..., None], term.eps)[0]


def _in_document(
    term: Linear, state: LinearState, past: PastDocuments, given: Mapping[str, Any]
) -> tuple[LinearState, Array]:
    """The state that a token is added to, and whether its query sees its key.

    The sums are 0 where the token starts a document, and NaN where its document comes
    back after another one. The query sees nothing if its id is not that of the key;
    the answer is bool ``[batch]``.
    """
    batch = state.s.shape[:1]
    ids = segment_ids("kv_segment_ids", given, batch)
    past, starts, comes_back = _with_document(term, past, ids)
    q_ids = segment_ids("q_segment_ids", given, batch)
    fresh = jnp.where(comes_back, jnp.nan, 0.0)[:, None, None]
    s = jnp.where(starts[:, None, None, None], fresh[..., None], state.s)
    z = state.z
    if z is not None:
        z = jnp.where(starts[:, None, None], fresh, z)
    return LinearState(s, z, past), q_ids == ids


def _with_document(
    term: Linear, past: PastDocuments, ids: Array
) -> tuple[PastDocuments, Array, Array]:
    """Adds the document of one more token to those of the past.

    Returns:
      The documents; whether the token starts one, and whether that one was there
      before, bool ``[batch]`` each.

    Raises:
      ValueError: a document comes back, if the ids are not traced.
    """
    known = (past.ids == ids[:, None]) & past.used
    start = ~known[:, 0]
    back = start & known.any(axis=1)
    if not isinstance(back, jax.core.Tracer) and back.any():
        row = int(back.argmax())
        raise ValueError(
            f"kv_segment_ids of batch entry {row}: document {int(ids[row])} comes back "
            f"after another, but {term!r} keeps the sums of one document: decode each "
            "document in one piece"
        )
    pushed = jnp.concatenate([ids[:, None], past.ids[:, :-1]], axis=1)
    count = jnp.minimum(past.count + 1, REMEMBERED)
    past = PastDocuments(
        jnp.where(start[:, None], pushed, past.ids),
        jnp.where(start, count, past.count),
    )
    return past, start, back


def _factor(
    term: Linear, given: Mapping[str, Any], sizes: tuple[int, int, int]
) -> Array:
    """The factor by which the old state decays, f32 ``[batch or 1, heads or 1]``."""
    batch, num_q_heads, num_kv_heads = sizes
    if term.decay is None:
        return jnp.ones((1, 1), jnp.float32)
    if isinstance(term.decay, str):
        decay = given_log_decay(term, given, (batch,))
    else:
        decay = jnp.asarray(np.log(np.atleast_1d(term.decay))[None], jnp.float32)
    check_decay_heads(term, decay.shape[1], num_q_heads, num_kv_heads)
    return jnp.exp(clipped(decay.astype(jnp.float32)))


def _check_causal(term: Linear) -> None:
    if not term.kind.causal:
        raise ValueError(
            f"{term!r} is not causal: later tokens would change the outputs of earlier "
            "ones, so no state can decode it; use map=causal(), or causal() & "
            "segments()"
        )


def _check_state(
    term: Linear, state: LinearState, k: Array, v: Array, num_q_heads: int
) -> None:
    """Refuses a state whose sizes do not fit the token."""
    batch, num_kv_heads, features = k.shape
    wanted = batch, features, v.shape[-1]
    found = state.s.shape[0], *state.s.shape[2:]
    if found != wanted or state.s.shape[1] not in (num_kv_heads, num_q_heads):
        raise ValueError(
            f"{term!r}: the state has shape {state.s.shape}: it must be [batch, heads, "
            f"features, head_dim_v], here {(batch, num_kv_heads, *wanted[1:])}; make "
            "one with linear_state or linear_prefill"
        )
