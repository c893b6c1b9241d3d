"""Linear attention token by token: the state that a causal term keeps, and a step."""

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

# How many documents a state tells apart: more cost more of every step.
REMEMBERED = 64


class PastDocuments(NamedTuple):
    """The ids of the documents so far, each once, that of the last token first.

    A state keeps the sums of one document, so a document that comes back after another
    has lost its tokens. The ids are kept to notice that.
    """

    ids: Array  # int32 [batch, REMEMBERED]; only the first of each row are used
    count: Array  # int32 [batch]: how many of them

    @property
    def used(self) -> Array:
        """Which ids are those of documents, bool ``[batch, REMEMBERED]``."""
        return jnp.arange(REMEMBERED)[None] < self.count[:, None]


class LinearState(NamedTuple):
    """All that a decoder keeps of the tokens so far; its size never grows."""

    s: Array  # f32 [batch, heads, features, head_dim_v]
    z: Array | None  # f32 [batch, heads, features], with a normaliser
    documents: PastDocuments | None  # with segments()


def linear_state(
    term: Linear, batch: int, num_heads: int, features: int, head_dim_v: int
) -> LinearState:
    """The state of no token.

    Args:
      term: ``linear(...)`` with a causal map.
      batch: entries.
      num_heads: heads of k; those of q if the decays are those of q.
      features: what the feature map yields; ``head_dim`` but for maps that change it.
      head_dim_v: the size of a value.

    Raises:
      ValueError: the map is not causal.
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
    """The state after the keys of a prompt, ``[batch, seq, heads, ...]``.

    With ``segments()`` it is that of the document of the last key, all pieces of it.

    Args:
      term: ``linear(...)`` with a causal map.
      k, v: the keys and values, as in ``attention``.
      given: the operands that the term reads, and the segment ids of the keys.
      num_q_heads: heads of q; those of k if None.

    Raises:
      ValueError: the map is not causal, or arrays do not fit together.
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
    """The documents of a prompt, by their last token."""
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
    """One more token: the state with it, and its output, as the whole sequence has it.

    With ``segments()`` a token whose id is not that of the token before starts a
    document. A state keeps the sums of one document only, so none may come back after
    another: among the last 64 documents that is noticed. It is refused where the ids
    are known, and under ``jit`` the outputs of that piece are NaN; a document from
    further back starts anew.

    Args:
      term: ``linear(...)`` with a causal map.
      state: that of the tokens before; of ``linear_state`` or ``linear_prefill``.
      q, k, v: ``[batch, num_q_heads or num_kv_heads, head_dim]``.
      given: what the term reads, for this token: log-decays ``[batch, heads]``, ids
        ``[batch]``; a feature map that is an operand, as ever.

    Returns:
      The new state, and the output ``[batch, num_q_heads, head_dim_v]``.

    Raises:
      ValueError: the map is not causal, arrays do not fit together, or a document
        comes back.
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

    kept = _kept(term, given, (batch, num_q_heads, num_kv_heads))
    old_s, old_z, past = state
    if past is not None:
        ids = segment_ids("kv_segment_ids", given, (batch,))
        past, start, back = _after(term, past, ids)
        q_ids = segment_ids("q_segment_ids", given, (batch,))
        fq = jnp.where((q_ids == ids)[:, None, None, None], fq, 0.0)
        fresh = jnp.where(back, jnp.nan, 0.0)[:, None, None]
        old_s = jnp.where(start[:, None, None, None], fresh[..., None], old_s)
        if old_z is not None:
            old_z = jnp.where(start[:, None, None], fresh, old_z)
    s = kept[..., None, None] * old_s + fk[..., :, None] * wide_v[..., None, :]
    out = jnp.einsum("bhgd,bhde->bhge", fq, s, precision="highest")
    z = None
    if old_z is not None:
        z = kept[..., None] * old_z + fk
        total = jnp.einsum("bhgd,bhd->bhg", fq, z, precision="highest")
        out, _ = normalised(out, total[..., None], term.eps)
    out = out.reshape(batch, num_q_heads, -1).astype(q.dtype)
    return LinearState(s, z, past), out


def _after(
    term: Linear, past: PastDocuments, ids: Array
) -> tuple[PastDocuments, Array, Array]:
    """The documents with that of one more token; whether it starts, and comes back.

    Raises:
      ValueError: it comes back, as far as ids are known yet.
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


def _kept(term: Linear, given: Mapping[str, Any], sizes: tuple[int, int, int]) -> Array:
    """The factor of the old state, ``[batch or 1, heads or 1]``."""
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
            f"{term!r} is not causal, so that later tokens change what earlier ones "
            "got: no state decodes it; use map=causal(), or causal() & segments()"
        )


def _check_state(
    term: Linear, state: LinearState, k: Array, v: Array, num_q_heads: int
) -> None:
    """Refuses a state that was made for other sizes."""
    batch, num_kv_heads, features = k.shape
    wanted = batch, features, v.shape[-1]
    found = state.s.shape[0], *state.s.shape[2:]
    if found != wanted or state.s.shape[1] not in (num_kv_heads, num_q_heads):
        raise ValueError(
            f"{term!r}: the state has shape {state.s.shape}: it must be [batch, heads, "
            f"features, head_dim_v], here {(batch, num_kv_heads, *wanted[1:])}"
        )
