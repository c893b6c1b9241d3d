"""``attention`` and ``select``: what a user calls.

Transformations. ``jit``, ``grad``, ``vmap``, ``jax.checkpoint`` and ``shard_map`` over
batch or heads work; with "xla" also forward mode and any second derivative. Lengths
need not be multiples of a block.

Values that are not finite. A key that no query sees, such as padding or an unused slot
of a cache, may hold NaN, and so may a query that sees no key. If some query sees a
value (or a cotangent) that is not finite, it may reach other queries of its block, and
their gradients. A score of ``-inf`` has no weight; any finite score counts.

Operands. Integers of maps; scores, centroids or choices of selections; biases, sinks,
gates and decays, which have gradients; functions that are feature maps.

Dropout. The dropped weights follow from ``dropout_key``, and are the same on every
backend. The others grow by ``1 / (1 - dropout_rate)``; the lse counts all. Part ``i``
of ``average``, ``gated`` and ``heads`` draws from ``jax.random.fold_in(dropout_key,
i)``, and so do the parts of that part; ``joint`` says what it does. Under
``shard_map``, fold the index of the shard into the key.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from pallas_kernels.precision import wide
from sadsl.run import checks, traced_offset
from sadsl.run.attend import attend, choose
from sadsl.run.backends import choose_impl
from sadsl.run.linear_state import LinearState
from sadsl.run.types import QKV, Setting
from sadsl.terms.base import DROPOUT_KEY, STATE, Spec, Term
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.scatter_mean import ScatterMean
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

Queries: TypeAlias = Float[Array, "batch q_seq num_q_heads head_dim"]
Keys: TypeAlias = Float[Array, "batch kv_seq num_kv_heads head_dim"]
Values: TypeAlias = Float[Array, "batch kv_seq num_kv_heads head_dim_v"]
Out: TypeAlias = Float[Array, "batch q_seq num_q_heads head_dim_v"]
Lse: TypeAlias = Float[Array, "batch num_q_heads q_seq"]
Ids: TypeAlias = Integer[Array, "..."]


def attention(
    q: Queries, k: Keys, v: Values, spec: Spec | str, *,
    q_segment_ids: Ids | None = None, kv_segment_ids: Ids | None = None,
    operands: Mapping[str, Any] | None = None, sm_scale: float | Array | None = None,
    q_offset: int | Array = 0, return_lse: bool = False, impl: str | None = None,
    interpret: Any = False, config: KernelConfig | None = None,
    dropout_rate: float = 0.0, dropout_key: Array | None = None,
    state0: LinearState | None = None, return_state: bool = False,
) -> Out | tuple:  # fmt: skip
    """Computes attention over the pairs that ``spec`` selects.

    A query that sees no key yields 0 and ``lse == -inf``. ``sadsl.run.call`` says more
    about transformations, NaN, operands and dropout.

    Args:
      q, k, v: ``[batch, seq, heads, head_dim]``: float32, bfloat16 or float16; with
        "xla" and "reference" float64 too. The heads of q are a multiple of those of k
        and v; v may have another ``head_dim``. Sums are in float32.
      spec: an index map, a term such as ``softmax(map, ...)``, or text.
      q_segment_ids, kv_segment_ids: integers ``[batch, seq]`` for ``segments()``.
      operands: arrays and functions that the spec reads, by name.
      sm_scale: factor before the softmax, ``head_dim ** -0.5`` if None; may be traced.
      q_offset: the position of the first query, for decoding; of softmax over maps of
        positions also an array, traced or not: one integer, or ``[batch]``.
      return_lse: also return the natural log-sum-exp.
      impl: "xla", "tpu", "triton", "reference" (dense), or None for the default device.
      interpret: run Pallas kernels in an interpreter (True, or its parameters).
      config: block sizes and pipelining; never changes the result.
      dropout_rate: the share of the attention weights that is dropped, in [0, 1).
      dropout_key: a key of ``jax.random``.
      state0, return_state: of ``linear`` and ``delta``: the state of earlier tokens;
        whether to return the one after the last token.

    Returns:
      ``out``; or a tuple of it, the lse in float32, and the ``LinearState``.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it.

    >>> import jax.numpy as jnp, sadsl as sa
    >>> x, v = jnp.zeros((1, 4, 1, 2)), jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> sa.attention(x, x, v, sa.causal() & sa.window(1))[0, :, 0, 0].tolist()
    [0.0, 0.5, 1.5, 2.5]
    """
    term = any_term(spec)
    known = 0 if traced_offset.is_traced(q_offset) else cast(int, q_offset)
    checks.problem(q, k, v, known, term)
    given = given_arrays(operands, q_segment_ids, kv_segment_ids)
    rate = checks.dropout(dropout_rate, dropout_key)
    if rate:
        given[DROPOUT_KEY] = dropout_key
    if known is not q_offset:
        term, given = traced_offset.with_offset(term, q_offset, given, q.shape[0])
    if state0 is not None:
        given[STATE] = state0
    scale = checks.scale(sm_scale, q.shape[-1])
    impl, config = choose_impl(impl, interpret, q, k, v), config or KernelConfig()
    setting = Setting(scale, int(known), impl, interpret, config, rate, return_state)
    return _attention((q, k, v), term, given, setting, return_lse=return_lse)


def _attention(
    inputs: QKV,
    term: Term,
    given: Mapping[str, Any],
    setting: Setting,
    *,
    return_lse: bool,
) -> Any:
    """The output, perhaps with the lse, of a call whose arrays fit together."""
    stateful = setting.return_state or STATE in given
    if stateful and not isinstance(term, Recurrent):
        raise NotImplementedError(
            f"state0 or return_state with {term!r}: only linear(...) and delta(...) "
            "have a state: call attention for each part of a mixture, or leave it out"
        )
    check_read(term, given)
    dtype = inputs[0].dtype
    checks.precision(dtype, setting.impl)
    out, lse, state = attend(term, inputs, given, setting)
    states = (state,) if setting.return_state else ()
    if not return_lse:
        return (out, *states) if states else out
    if lse is None:
        raise NotImplementedError(
            f"return_lse=True: {term!r} has more than one normaliser, so a query has "
            "no single log-sum-exp: leave it False"
        )
    return (out, lse.astype(wide(dtype)), *states)


def given_arrays(
    operands: Mapping[str, Any] | None,
    q_segment_ids: Any,
    kv_segment_ids: Any,
) -> dict[str, Any]:
    """All run-time arrays of a call by name.

    Raises:
      ValueError: the ids of queries were given without those of keys, or vice versa.
    """
    ids = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    named = {name: x for name, x in ids.items() if x is not None}
    if len(named) == 1:
        (name,), (other,) = named, set(ids) - set(named)
        raise ValueError(f"{name} was given without {other}: pass both")
    if named:
        named = dict(zip(ids, checks.segment_ids(*ids.values()), strict=True))
    return {**(operands or {}), **named}


def check_read(term: Term, given: Mapping[str, Any]) -> None:
    """Refuses arrays that no part of a mixture reads; maps check their own arrays.

    Raises:
      ValueError: no part reads an array.
    """
    if isinstance(term, Softmax | ScatterMean):
        return
    for name in given:
        if not term.reads(name):
            raise ValueError(
                f"{name!r} was given, but no part of {term!r} reads it: drop it"
            )


def select(
    spec: Spec | str,
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    *,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    q_offset: int = 0,
    lists: bool = False,
) -> dict[str, Array]:
    """Lets the selections of ``spec`` choose keys for these queries, and returns that.

    Pass the result as ``operands=`` to ``attention``, to use one choice in several
    calls. Pass one entry of its batch to ``IndexMap.dense``, to look at it.

    Args:
      spec: an index map, a term, or text.
      q, k: as in ``attention``.
      operands, sm_scale, q_offset: as in ``attention``; selections may read them.
      lists: return choices as lists, int32 ``[batch, groups, rows, size]``, where a
        list can hold them: ascending, and then the number of all cells.

    Returns:
      The chosen arrays by name; empty if content decides nothing in ``spec``.

    Raises:
      ValueError: the arrays and the spec do not fit together.

    Example:
      The query 0.5 scores the keys 2 and 1 highest:

      >>> import jax, jax.numpy as jnp
      >>> import sadsl as sa
      >>> q = jnp.full((1, 1, 1, 1), 0.5)
      >>> k = jnp.array([0.0, 1.0, 2.0, -1.0]).reshape(1, 4, 1, 1)
      >>> top = sa.topk(2, block=1)
      >>> chosen = jax.jit(lambda q, k: sa.select(top, q, k))(q, k)
      >>> top.dense(1, 4, operands={n: x[0] for n, x in chosen.items()}).astype(int)
      array([[[0, 1, 1, 0]]])
    """
    term = any_term(spec)
    problem = checks.problem(q, k, k, q_offset, term)
    given = dict(operands or {})
    check_read(term, given)
    scale = checks.scale(sm_scale, q.shape[-1])
    config = KernelConfig(lists=lists or None)
    setting = Setting(scale, problem.q_offset, "reference", config=config)
    return choose(term, (q, k), given, setting)
