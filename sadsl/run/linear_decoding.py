"""Decodes ``linear`` and ``delta`` token by token, with a state of constant size."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sadsl.run import checks
from sadsl.run.attend import attend
from sadsl.run.linear import state_after
from sadsl.run.linear_operands import segment_ids
from sadsl.run.linear_state import LinearState, empty_state, past_documents
from sadsl.run.types import Setting
from sadsl.terms.base import STATE
from sadsl.terms.recurrent import Recurrent


def linear_state(
    term: Recurrent, batch: int, num_heads: int, features: int, head_dim_v: int
) -> LinearState:
    """The state before the first token.

    Args:
      term: ``linear(...)`` or ``delta(...)`` with a causal map.
      batch: number of batch entries.
      num_heads: heads of k; those of v or of the decays if there are more.
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
    return empty_state(term, batch, num_heads, features, head_dim_v)


def linear_prefill(
    term: Recurrent,
    k: Array,
    v: Array,
    given: Mapping[str, Any] | None = None,
    num_q_heads: int | None = None,
) -> LinearState:
    """The state after the keys and values of a prompt.

    With ``segments()`` it is the state of the document of the last key, with all pieces
    of that document. ``attention(..., return_state=True)`` gives the outputs too.

    Args:
      term: ``linear(...)`` or ``delta(...)`` with a causal map.
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
    given = dict(given or {})
    steps = term.steps
    batch, seq, num_kv_heads, head_dim = k.shape
    heads = num_kv_heads if num_q_heads is None else num_q_heads
    q = jnp.zeros((batch, seq // steps, heads, head_dim), k.dtype)
    past = None
    if term.kind.segments:
        ids = segment_ids("kv_segment_ids", given, k.shape[:2])
        past = past_documents(ids)
        given |= {"q_segment_ids": ids[:, ::steps], "kv_segment_ids": ids}
    state = state_after(term, (q, k, v), given)
    return state._replace(documents=past)


def linear_step(
    term: Recurrent,
    state: LinearState,
    q: Array,
    k: Array,
    v: Array,
    given: Mapping[str, Any] | None = None,
    *,
    sm_scale: float | None = None,
) -> tuple[LinearState, Array]:
    """Adds one token to the state, and returns the new state and the token's output.

    The output is that of ``attention`` over the whole sequence. With ``segments()``, a
    token whose id differs from that of the previous token starts a document. None must
    come back after another one, since a state keeps the sums of one document. For the
    last 64 documents that is an error, or NaN outputs of that piece under ``jit``.

    Args:
      term: ``linear(...)`` or ``delta(...)`` with a causal map.
      state: the state of the previous tokens.
      q, k, v: ``[batch, num_q_heads or num_kv_heads, head_dim]``; k and v ``[batch,
        steps, ...]`` if a token writes several keys.
      given: the operands of the term for this token, without an axis of positions:
        log-decays ``[batch, heads]``, segment ids ``[batch]``; and functions.
      sm_scale: as in ``attention``, for ``delta`` and ``linear(scaled=True)``.

    Returns:
      The new state, and the output ``[batch, num_q_heads, head_dim_v]``.

    Raises:
      ValueError: the arrays or the state do not fit, or a document comes back.

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
    if term.steps == 1:
        k, v = k[:, None], v[:, None]
    now = {name: _of_token(term, name, x) for name, x in (given or {}).items()}
    setting = Setting(checks.scale(sm_scale, q.shape[-1]), return_state=True)
    inputs = q[:, None], k, v
    checks.problem(*inputs, 0, term)
    found = attend(term, inputs, now | {STATE: state}, setting)
    return found.state, found.out[:, 0]


def _of_token(term: Recurrent, name: str, x: Any) -> Any:
    """An operand of one token with an axis of positions."""
    if name not in term.operands or name in term.of_call:
        return x
    if term.steps > 1 and name in term.of_keys:
        return x
    return jnp.asarray(x)[:, None]


def _check_causal(term: Recurrent) -> None:
    if not term.kind.causal:
        raise ValueError(
            f"{term!r} is not causal: later tokens would change the outputs of earlier "
            "ones, so no state can decode it; use map=causal(), or causal() & "
            "segments()"
        )
