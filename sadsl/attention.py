"""``attention`` and ``plan``: check, build nodes, lower, call."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Integer

from lowering import pipeline
from lowering.counts import Plan
from lowering.pipeline import Problem, Stages
from pallas_kernels import dispatch
from pallas_kernels.config import KernelConfig
from pallas_kernels.precision import wide
from sadsl import by_heads, checks, mixtures, routing
from sadsl.evaluate import evaluate, options_of, traced_scale
from sadsl.execution import call_arrays, chosen_parts
from sadsl.maps import IndexMap
from sadsl.term import DROPOUT_KEY, Setting, Spec, Term, read_by, reads
from sadsl.terms import Heads, ScatterMean, Softmax
from sadsl.text import parse

IMPLS = ("reference", *dispatch.BACKENDS)
PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "tpu": ("tpu",), "triton": ("gpu",)}
DEFAULT_IMPL = {"cpu": "xla", "tpu": "tpu", "gpu": "triton"}


def attention(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    v: Float[Array, "batch kv_seq num_kv_heads head_dim_v"],
    spec: Spec | str,
    *,
    q_segment_ids: Integer[Array, "..."] | None = None,
    kv_segment_ids: Integer[Array, "..."] | None = None,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | Array | None = None,
    q_offset: int = 0,
    return_lse: bool = False,
    impl: str | None = None,
    interpret: Any = False,
    config: KernelConfig | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> (
    Float[Array, "batch q_seq num_q_heads head_dim_v"]
    | tuple[
        Float[Array, "batch q_seq num_q_heads head_dim_v"],
        Float[Array, "batch num_q_heads q_seq"],
    ]
):
    """Attention over the pairs that ``spec`` selects.

    ``jit``, ``grad``, ``vmap``, ``jax.checkpoint`` and ``shard_map`` over batch or
    heads work (with ``interpret`` as ``shard_map(check_vma=False)``), and with "xla"
    forward mode and any second derivative. A query that selects no key yields 0, and
    ``lse == -inf``. Lengths need not be multiples of a block.

    A key that no query sees, such as padding or an unused slot of a cache, and a query
    that sees no key may hold anything, NaN too. A value (or a cotangent) that is not
    finite and that some query sees may reach other queries of its block, and their
    gradients. A score of ``-inf`` has no weight; any finite score counts.

    Args:
      q, k, v: float32, bfloat16 or float16, all of one dtype; the number of heads of q
        is a multiple of that of k and v. Products accumulate in float32. With "xla" and
        "reference" also float64, which everything but a choice is then computed in;
        without ``jax_enable_x64``, JAX itself makes float32 of it.
      spec: an index map, a term such as ``softmax(map, ...)`` or ``joint(a, b)``, or
        their text.
      q_segment_ids, kv_segment_ids: integers ``[batch, seq]`` for ``segments()``. Those
        that int32 does not hold (NumPy int64) are ranked, and keep their order.
      operands: what the spec reads by name: integers for maps made of
        ``operand(name)``; what a selection asks for, or parts that ``select`` chose
        before; biases, sinks, gates and decays, which have gradients; functions, where
        a term names a feature map. What ``a | full()`` and its like leave without a
        reader may be passed all the same, and need not be.
      sm_scale: factor before the softmax; ``head_dim ** -0.5`` if None. It may be
        traced, and has a gradient: then q, k and v are multiplied in float32.
      q_offset: the position of the first query, as decoding needs.
      return_lse: also return the natural log-sum-exp, f32 (f64 for f64); it has a
        gradient.
      impl: "xla", "tpu", "triton", "reference" (dense), or None for the default device.
      interpret: run Pallas kernels in an interpreter (True, or its parameters).
      config: block sizes and pipelining; never changes the result.
      dropout_rate: the part of the attention weights that is dropped; the others grow
        by ``1 / (1 - dropout_rate)``, and the lse is that of all.
      dropout_key: what decides on it, a key of ``jax.random``; the same weights are
        dropped on every backend. Parts of a spec that may weigh one pair twice drop it
        apart: part ``i`` of ``average``, ``gated`` and ``heads`` draws from
        ``jax.random.fold_in(dropout_key, i)``, a part of that part likewise, and a
        ``joint`` as it says. Under ``shard_map``, fold the shard into it.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it; nothing falls back silently.
    """
    term = any_term(spec)
    checks.problem(q, k, v, q_offset)
    given = _given(operands, q_segment_ids, kv_segment_ids)
    rate = checks.dropout(dropout_rate, dropout_key)
    if rate:
        given[DROPOUT_KEY] = dropout_key
    _check_read(term, given)
    setting = Setting(
        sm_scale=checks.scale(sm_scale, q.shape[-1]),
        q_offset=int(q_offset),
        impl=choose_impl(impl, interpret, q, k, v),
        interpret=interpret,
        config=config or KernelConfig(),
        dropout_rate=rate,
    )
    checks.precision(q.dtype, setting.impl)
    out, lse = evaluate((q, k, v), term, given, setting)
    if not return_lse:
        return out
    if lse is None:
        raise NotImplementedError(
            f"return_lse=True: {term!r} has more than one normaliser, so that no "
            "single log-sum-exp belongs to a query: leave it False"
        )
    return out, lse.astype(wide(q.dtype))


def _given(
    operands: Mapping[str, Any] | None,
    q_segment_ids: Any,
    kv_segment_ids: Any,
) -> dict[str, Any]:
    """All run-time arrays of a call by name.

    Raises:
      ValueError: one kind of segment ids without the other.
    """
    ids = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    named = {name: x for name, x in ids.items() if x is not None}
    if len(named) == 1:
        (name,), (other,) = named, set(ids) - set(named)
        raise ValueError(f"{name} was given without {other}: pass both")
    if named:
        named = dict(zip(ids, checks.segment_ids(*ids.values()), strict=True))
    return {**(operands or {}), **named}


def _check_read(term: Term, given: Mapping[str, Any]) -> None:
    """Refuses arrays that no part of a mixture reads; maps check their own."""
    if isinstance(term, Softmax | ScatterMean):
        return
    for name in given:
        if not term.reads(name):
            raise ValueError(
                f"{name!r} was given, but no part of {term!r} reads it: drop it"
            )


def choose_impl(impl: str | None, interpret: Any, *arrays: Any) -> str:
    """The backend of a call.

    Raises:
      ValueError: it does not exist, or concrete arrays lie where it cannot run.
    """
    if impl is None:
        impl = DEFAULT_IMPL.get(jax.default_backend(), "xla")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be None or one of {', '.join(IMPLS)}")
    concrete = not any(isinstance(x, jax.core.Tracer) for x in arrays)
    platform = jax.default_backend()
    runs_on = PLATFORMS.get(impl, (platform,))
    real = all(isinstance(x, jax.Array) for x in arrays)
    if concrete and real and not interpret and platform not in runs_on:
        raise ValueError(
            f"impl={impl!r} cannot run on the default device, which is of platform "
            f"{platform!r}: pass interpret=True to run its kernels in an interpreter, "
            "impl=None for a backend that fits, or use sadsl.lower(..., target=...) to "
            "compile it for another chip"
        )
    return impl


def any_term(spec: Spec | str) -> Term:
    """The term that a spec stands for."""
    if isinstance(spec, str):
        spec = parse(spec)
    if isinstance(spec, IndexMap):
        return Softmax(spec)
    if isinstance(spec, Term):
        return spec
    raise TypeError(
        f"spec={spec!r} must be an index map, a term such as softmax(map, ...), or the "
        "text of one"
    )


def as_term(spec: Spec | str) -> Softmax:
    """The one softmax that a spec stands for.

    Raises:
      NotImplementedError: it has several, or scores that are not those of a softmax.
    """
    term = any_term(spec)
    if isinstance(term, Softmax):
        return term
    found = mixtures.one_softmax(term)
    if found is not None:
        return found
    raise NotImplementedError(
        f"spec={term!r} is more than one softmax over a map, and this takes a map or "
        "softmax(map, ...): ask it of a part; joint(...).resolved(n) are those of a "
        "joint"
    )


def map_of(spec: Spec | str) -> IndexMap:
    """The pairs on which the output of a spec depends, as one map.

    Raises:
      NotImplementedError: no map says that.
    """
    term = any_term(spec)
    if term.seen is None:
        raise NotImplementedError(
            f"spec={term!r} has a part whose pairs no map describes: ask for those of "
            "the other parts"
        )
    return term.seen


def select(
    spec: Spec | str,
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    *,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    q_offset: int = 0,
) -> dict[str, Array]:
    """What the selections of ``spec`` choose for these queries and keys, by name.

    Pass it as ``operands=`` to ``attention`` to use one choice for several calls, and
    an entry of its batch to ``IndexMap.dense``, to look at it. Empty for a static map.
    """
    term = any_term(spec)
    checks.problem(q, k, k, q_offset)
    choose = partial(select, sm_scale=sm_scale, q_offset=q_offset)
    given = dict(operands or {})
    _check_read(term, given)
    scale = checks.scale(sm_scale, q.shape[-1])
    setting = Setting(scale, q_offset, "reference")
    match term:
        case Heads():
            return by_heads.select((q, k), term, given, choose)
        case ScatterMean():
            options = options_of((q, k), Softmax(term.rest), setting)
            return routing.select(q, k, term, given, options)
        case Softmax():
            options = options_of((q, k), Softmax(term.map), setting)
            extra = [name for name in term.operands if not reads(term.map, name)]
            mine = {name: x for name, x in given.items() if name not in extra}
            arrays = call_arrays(options, mine, (None, None), q.shape[0])
            arrays |= traced_scale(setting)
            return chosen_parts(q, k, arrays, options)
    found: dict[str, Array] = {}
    for part in term.parts:
        found |= choose(part, q, k, operands=read_by(part, given))
    return found


def plan(
    spec: Spec | str,
    q_seq_len: int,
    kv_seq_len: int | None = None,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    num_heads: int = 1,
    q_offset: int = 0,
    exact: bool = False,
    relayout: bool = True,
) -> Plan:
    """Which blocks a spec visits, computed from its expression: no arrays, no jit.

    The plan never misses a pair and never calls a block full that is not. Blocks that
    the analysis leaves open are looked into up to a budget; past it they count as
    partial, and ``exact=True`` looks into all of them. Where another order of the
    positions visits enough fewer blocks to pay for it, the plan is in that order, and
    ``plan.layouts`` says which.

    Args:
      spec: an index map, a term, or text.
      q_seq_len, kv_seq_len: numbers of queries and keys (``q_seq_len`` if None).
      block_q, block_kv: block sizes, any positive integers.
      num_heads: heads; maps that differ by head are planned once each.
      q_offset: the position of the first query.
      exact: settle every block, whatever it costs.
      relayout: look for a better order of positions; False keeps the given one.
    """
    kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
    sizes = {"q_seq_len": q_seq_len, "kv_seq_len": kv_seq_len, "block_q": block_q}
    sizes |= {"block_kv": block_kv, "num_heads": num_heads}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    problem = Problem(q_seq_len, kv_seq_len, num_heads, q_offset)
    given = pipeline.run(as_term(spec).map.node, problem)
    stages = pipeline.arrange(given, block_q, block_kv) if relayout else given
    return plan_of(stages, given, block_q, block_kv, exact=exact)


def plan_of(
    stages: Stages, given: Stages, block_q: int, block_kv: int, *, exact: bool = False
) -> Plan:
    """The plan of lowered stages, beside the counts of the given order."""
    found = _counted(stages, block_q, block_kv, exact)
    if stages.layouts is None:
        return found
    plain = _counted(given, block_q, block_kv, exact)
    counts = plain.num_full, plain.num_partial
    return replace(found, layouts=stages.layouts, given=counts, given_maps=plain.maps)


def _counted(stages: Stages, block_q: int, block_kv: int, exact: bool) -> Plan:
    # Spelt as the other callers do, so that all share one cached plan.
    options = (True,) if exact else ()
    mask = pipeline.block_mask(stages, block_q, block_kv, "q", *options)
    return Plan(stages.planned.maps, mask, stages.planned.problem.num_heads)
