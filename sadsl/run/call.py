"""``attention`` and ``select``: what a user calls."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from pallas_kernels.precision import wide
from sadsl.run import checks
from sadsl.run.attend import attend, choose
from sadsl.run.backends import choose_impl
from sadsl.run.types import Setting
from sadsl.terms.base import DROPOUT_KEY, Spec, Term
from sadsl.terms.scatter_mean import ScatterMean
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term


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
    """Computes attention over the pairs that ``spec`` selects.

    ``jit``, ``grad``, ``vmap``, ``jax.checkpoint`` and ``shard_map`` over batch or
    heads work (with ``interpret`` as ``shard_map(check_vma=False)``). With "xla",
    forward mode and any second derivative work too. A query that sees no key yields 0
    and ``lse == -inf``. Lengths need not be multiples of a block.

    A key that no query sees, such as padding or an unused slot of a cache, may hold
    NaN, and so may a query that sees no key. If some query sees a value (or a
    cotangent) that is not finite, it may reach other queries of its block, and their
    gradients. A score of ``-inf`` has no weight; any finite score counts.

    Args:
      q, k, v: ``[batch, seq, heads, head_dim]``, float32, bfloat16 or float16, all of
        one dtype; v may have its own ``head_dim_v``. The number of heads of q is a
        multiple of that of k and v. Products accumulate in float32. With "xla" and
        "reference" also float64, in which everything but a selection is computed then;
        without ``jax_enable_x64``, JAX itself makes float32 of it.
      spec: an index map, a term such as ``softmax(map, ...)`` or ``joint(a, b)``, or
        their text.
      q_segment_ids, kv_segment_ids: integers ``[batch, seq]`` for ``segments()``. Ids
        that do not fit int32 (NumPy int64) are replaced by their ranks.
      operands: the arrays that the spec reads, by name: integers for maps made of
        ``operand(name)``; scores or centroids for selections, or the choices that
        ``select`` made before; biases, sinks, gates and decays, which have gradients;
        functions, where a term names a feature map. An operand that the spec names but
        simplification removes, as in ``a | full()``, may be passed or left out.
      sm_scale: factor before the softmax; ``head_dim ** -0.5`` if None. It may be
        traced, and has a gradient: then q, k and v are multiplied in float32.
      q_offset: the position of the first query, for decoding.
      return_lse: also return the natural log-sum-exp, f32 (f64 for f64); it has a
        gradient.
      impl: "xla", "tpu", "triton", "reference" (dense), or None for the default device.
      interpret: run Pallas kernels in an interpreter (True, or its parameters).
      config: block sizes and pipelining; never changes the result.
      dropout_rate: the share of the attention weights that is dropped, in [0, 1). The
        others grow by ``1 / (1 - dropout_rate)``. The lse counts all weights.
      dropout_key: a key of ``jax.random``, from which the dropped weights are drawn;
        they are the same on every backend. Part ``i`` of ``average``, ``gated`` and
        ``heads`` draws from ``jax.random.fold_in(dropout_key, i)``, and so do the parts
        of that part; ``joint`` says what it does. Under ``shard_map``, fold the index
        of the shard into the key.

    Returns:
      ``out``, ``[batch, q_seq, num_q_heads, head_dim_v]``, in the dtype of q; with
      ``return_lse``, ``(out, lse)``, and ``lse`` is ``[batch, num_q_heads, q_seq]``.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it; nothing falls back silently.

    Example:
      Queries and keys of 0 give equal weights, so ``exp(lse)`` counts the keys:

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x, v = jnp.zeros((1, 4, 1, 2)), jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> spec = sa.causal() & sa.window(1)  # or its text, "causal() & window(1)"
      >>> out, lse = sa.attention(x, x, v, spec, return_lse=True)
      >>> [round(float(y), 3) for y in out[0, :, 0, 0]]
      [0.0, 0.5, 1.5, 2.5]
      >>> [round(float(y), 3) for y in jnp.exp(lse[0, 0])]
      [1.0, 2.0, 2.0, 2.0]
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
    out, lse = attend(term, (q, k, v), given, setting)
    if not return_lse:
        return out
    if lse is None:
        raise NotImplementedError(
            f"return_lse=True: {term!r} has more than one normaliser, so a query has "
            "no single log-sum-exp: leave it False"
        )
    return out, lse.astype(wide(q.dtype))


def _given(
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


def _check_read(term: Term, given: Mapping[str, Any]) -> None:
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
) -> dict[str, Array]:
    """Lets the selections of ``spec`` choose keys for these queries, and returns that.

    Pass the result as ``operands=`` to ``attention``, to use one choice in several
    calls. Pass one entry of its batch to ``IndexMap.dense``, to look at it.

    Args:
      spec: an index map, a term, or text.
      q, k: as in ``attention``.
      operands, sm_scale, q_offset: as in ``attention``; selections may read them.

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
    checks.problem(q, k, k, q_offset)
    given = dict(operands or {})
    _check_read(term, given)
    setting = Setting(checks.scale(sm_scale, q.shape[-1]), q_offset, "reference")
    return choose(term, (q, k), given, setting)
