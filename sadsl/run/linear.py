"""The rule of ``linear`` and ``delta``: checks a call, and runs its recurrence."""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import linear as kernels
from sadsl.run.attend import attend
from sadsl.run.linear_documents import Documents, documents, kept, present
from sadsl.run.linear_operands import segment_ids
from sadsl.run.linear_state import (
    LinearState,
    lost_tokens,
    next_state,
    start_of,
)
from sadsl.run.recurrence import ABSENT, Arrays, Static, kernel_inputs, run
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import STATE
from sadsl.terms.recurrent import Recurrent


class TokenArrays(NamedTuple):
    """Queries and keys of a call before features, at the positions of the recurrence.

    A token may have become several positions, ``steps``.
    """

    q: Array
    k: Array
    v: Array
    ids: tuple[Array, Array] | None
    q_offset: int
    steps: int = 1


def document_ids(
    term: Recurrent, inputs: QKV, given: Mapping[str, Any]
) -> tuple[Array, Array] | None:
    """The document ids ``[batch, seq]`` of queries and keys; None without documents."""
    if not term.kind.segments:
        return None
    q, k, _ = inputs
    return (
        segment_ids("q_segment_ids", given, q.shape[:2]),
        segment_ids("kv_segment_ids", given, k.shape[:2]),
    )


@singledispatch
def tokens(
    term: Recurrent, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> TokenArrays:
    """The tokens of a call, one position each; ``delta`` may need several."""
    ids = document_ids(term, inputs, given)
    return TokenArrays(*inputs, ids, setting.q_offset)


@singledispatch
def prepared(
    term: Recurrent, found: TokenArrays, given: Mapping[str, Any], setting: Setting
) -> tuple[Arrays, kernels.Recurrence]:
    """The arrays of the recurrence, without ids and state, and its static part."""
    raise NotImplementedError(f"{term!r} has no recurrence")


@attend.register
def _(
    term: Recurrent, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Linear attention on any backend, at a cost linear in the length.

    ``impl="reference"`` is the definition, over all pairs or token by token. On every
    backend, ``full()`` without erasing is two matrix products in XLA.

    Raises:
      ValueError: arrays, sizes and the term do not fit together.
      NotImplementedError: the call has dropout, or no recurrence for it exists.
    """
    if setting.dropout_rate:
        raise NotImplementedError(
            f"dropout_rate={setting.dropout_rate}: {term!r} has no attention weights "
            "to drop: use 0"
        )
    at = tokens(term, inputs, given, setting)
    known, there = _documents(term, at, given)
    # Before the feature map: its slope at such a row may be NaN, and so may 0 times it.
    q, k, v = kept(at.q, there.q), kept(at.k, there.k), kept(at.v, there.k)
    at = at._replace(q=q, k=k, v=v)
    arrays, rule = prepared(term, at, given, setting)
    before: LinearState | None = given.get(STATE)
    stateful = before is not None or setting.return_state
    one_piece = rule.read_before or rule.erase_before or stateful
    if one_piece:
        what = "a call with a state" if stateful else repr(term)
        _check_alignment(what, term, at, known)
    static = Static(
        term.kind, known, term.positive, term.by_channel_sums, one_piece,
        at.q_offset, setting.impl, linear_call(arrays, rule, setting),
    )  # fmt: skip
    state, continues = start_of(term, before, arrays, at)
    arrays = arrays._replace(ids=at.ids, state=state, continues=continues)
    out, lse, end = run(arrays, static=static)
    out = kept(out.astype(v.dtype), there.q)
    if before is not None and before.documents is not None:
        lost = lost_tokens(term, before, at)
        out = jnp.where(lost[:, :, None, None], jnp.nan, out)
    out = out[:, at.steps - 1 :: at.steps]
    after = None
    if setting.return_state:
        after = next_state(term, before, end, at)
    return Outcome(out, lse, after)


def _documents(term: Recurrent, at: TokenArrays, given: Mapping[str, Any]) -> tuple:
    """What is known of documents, and which queries and keys are in a pair."""
    known = None
    if at.ids is not None:
        one_array = given["q_segment_ids"] is given["kv_segment_ids"]
        known = documents(at.ids, at.q_offset, same_ids=one_array)
    there = present(None, (1, 1), 0, causal=False)
    if known is None or not known.same_ids or at.q_offset:
        lengths = at.q.shape[1], at.k.shape[1]
        there = present(at.ids, lengths, at.q_offset, causal=term.kind.causal)
    return known, there


def _check_alignment(
    what: str, term: Recurrent, at: TokenArrays, known: Documents | None
) -> None:
    """Refuses what a recurrence with a state, or with early reads, cannot do.

    Raises:
      ValueError: the call has no such meaning.
    """
    if not term.kind.causal:
        raise ValueError(
            f"{term!r} is not causal: later tokens would change the outputs of earlier "
            "ones, so it has no state: use map=causal(), or causal() & segments()"
        )
    if at.q.shape[1] != at.k.shape[1] or at.q_offset:
        raise ValueError(
            f"{what} has {at.q.shape[1]} queries from position {at.q_offset} and "
            f"{at.k.shape[1]} keys: queries and keys must be the same tokens"
        )
    if known is not None and known.in_order is False:
        raise ValueError(
            f"{what} has documents in several pieces, or queries with other ids than "
            "their keys: sort the tokens by document first"
        )


def linear_call(
    arrays: Arrays, rule: kernels.Recurrence, setting: Setting
) -> kernels.LinearCall:
    """The static part of the kernel call of a recurrence."""
    impl = "xla" if setting.impl == "reference" else setting.impl
    sizes = kernels.LinearSizes(
        length=max(arrays.q.shape[1], arrays.k.shape[1]),
        features=arrays.k.shape[-1],
        head_dim_v=arrays.v.shape[-1],
        erase=arrays.erase is not None,
        by_channel=arrays.log_decay is not None and arrays.log_decay.ndim == 4,
    )
    return kernels.default_call(
        rule, impl, sizes, arrays.k.dtype, setting.config, setting.interpret
    )


def state_after(term: Recurrent, inputs: QKV, given: Mapping[str, Any]) -> LinearState:
    """The state after all keys; with documents, that of the last key's document.

    A document may be in several pieces. The documents of the state are not set.
    """
    setting = Setting(1.0)
    at = tokens(term, inputs, given, setting)
    arrays, rule = prepared(term, at, given, setting)
    logits = term.by_channel_sums
    if at.ids is not None:
        ids = at.ids[1]
        last = ids == ids[:, -1:]
        absent = ABSENT if logits else 0.0
        k, v, erase = arrays.k, arrays.v, arrays.erase
        arrays = arrays._replace(
            k=kept(k, last, absent), v=kept(v, last),
            erase=None if erase is None else kept(erase, last),
        )  # fmt: skip
    found, sums = kernel_inputs(arrays, None, logits=logits)
    end = kernels.final_state(found, linear_call(arrays, rule, setting))
    end = end if sums is None else end._replace(z=sums)
    return next_state(term, None, end, at._replace(ids=None))
