"""``attention_fn``: puts a spec in the place of Flax's dense attention function."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lowering import ir
from pallas_kernels.config import KernelConfig
from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal
from sadsl.run.dense_masks import PairSizes, bias_of, pairs_of
from sadsl.sharding.call import attention_over
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.terms.base import Spec, Term
from sadsl.terms.changed import Change, changed
from sadsl.terms.needed import needed
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

# What a mask of Flax means: what the spec says already, padding, the slots of a cache,
# or any pairs.
MaskMeaning = Literal["implied", "padding", "cache"]
MASK, QUERIES, BIAS = "mask", "mask_of_queries", "bias"
IDS = "q_segment_ids", "kv_segment_ids"

# Arguments of Flax that cannot be honoured, why, and what to do instead. Any value but
# None is refused.
WEIGHTS = "the kernels keep no array of weights, which it would store"
PRODUCTS = "the products run inside of the kernels, so none can be replaced"
REFUSED: Mapping[str, tuple[str, str]] = {
    "module": (WEIGHTS, "leave sow_weights=False"),
    "einsum_dot_general": (PRODUCTS, "leave it None"),
    "qk_attn_weights_einsum": (PRODUCTS, "leave qk_attn_weights_einsum_cls=None"),
    "attn_weights_value_einsum": (PRODUCTS, "leave attn_weights_value_einsum_cls=None"),
}
UNKNOWN = "this function does not know it, and would drop it silently", "leave it out"


class SegmentIds:
    """The ids of ``segments()``; two are equal if they are the same object.

    Their values may be traced, so they cannot be compared.
    """

    def __init__(self, q: Any, kv: Any) -> None:
        self.q, self.kv = q, kv


@dataclass(frozen=True)
class AttentionFn:
    """A callable with the signature of Flax's ``dot_product_attention``, for one spec.

    Two are equal if their contents are, so two models built alike share one
    compilation. Segment ids are compared by identity.
    """

    term: Term
    mask: MaskMeaning | None = None
    check_mask: bool = False
    ids: SegmentIds | None = None
    sm_scale: float | None = None
    impl: str | None = None
    interpret: Any = False
    config: KernelConfig | None = None
    mesh_axes: MeshAxes | None = None

    # Flax Linen passes only the arguments that the signature names, and drops
    # the others silently. So the signature names even those that are refused.
    def __call__(
        self,
        query: Float[Array, "*batch q_seq num_q_heads head_dim"],
        key: Float[Array, "*batch kv_seq num_kv_heads head_dim"],
        value: Float[Array, "*batch kv_seq num_kv_heads head_dim_v"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        **others: Any,
    ) -> Float[Array, "*batch q_seq num_q_heads head_dim_v"]:
        """Attends to the pairs of the spec; ``is_causal=True`` adds ``k <= q``.

        A mask limits the pairs further; ``attention_fn`` says how. A query that sees no
        key yields 0, where Flax gives the mean of the values. Products accumulate in
        float32 whatever ``precision`` says, and the softmax is in float32 whatever
        ``force_fp32_for_softmax`` says. Each batch entry and head drops its own
        weights, even if ``broadcast_dropout`` asks for one mask for all. For one key,
        ``sadsl.attention`` drops the same weights, Flax others.

        Raises:
          NotImplementedError: sown weights, an argument that this function does not
            know, or a mask, bias or ``is_causal=True`` that the spec cannot take.
          ValueError: the batch axes of query, key and value differ, or a mask or bias
            does not broadcast to ``[batch..., heads, q_seq, kv_seq]``.
        """
        del broadcast_dropout, force_fp32_for_softmax, precision
        others["module"] = module
        others["qk_attn_weights_einsum"] = qk_attn_weights_einsum
        others["attn_weights_value_einsum"] = attn_weights_value_einsum
        for name, given in others.items():
            if given is not None:
                _refuse(name, given)
        batch = query.shape[:-3]
        q, k, v = _one_batch_axis(query, key, value, dtype)
        given = {MASK: mask, BIAS: bias}
        dense = {n: _flat(n, x, batch) for n, x in given.items() if x is not None}
        sizes = PairSizes(len(q), q.shape[2], q.shape[1], k.shape[1])
        call = self._limited(dense, sizes, is_causal=is_causal)
        rate = 0.0 if deterministic else dropout_rate
        dropout_key = dropout_rng if rate else None
        out = self._run((q, k, v), call, dropout_rate=rate, dropout_key=dropout_key)
        return out.reshape(*batch, *out.shape[1:])

    def _run(
        self, qkv: tuple[Array, Array, Array], call: "Limited", **dropout: Any
    ) -> Array:
        ids = {} if self.ids is None else {IDS[0]: self.ids.q, IDS[1]: self.ids.kv}
        at = {"q_offset": call.q_offset} if self.mesh_axes is None else {}
        if not (at or isinstance(call.q_offset, int)):
            raise NotImplementedError(
                "mesh_axes with a mask of a cache: decoding is not dealt over devices: "
                "leave mesh_axes=None"
            )
        found = attention_over(self.mesh_axes)(
            *qkv, call.term, operands=call.operands, sm_scale=self.sm_scale, **at,
            impl=self.impl, interpret=self.interpret,
            config=self.config, **dropout, **ids,
        )  # fmt: skip
        return cast(Array, found)

    def _limited(
        self, dense: Mapping[str, Array], sizes: PairSizes, *, is_causal: bool
    ) -> "Limited":
        """The spec with what the call asks for, and what it then reads."""
        found = Limited(self.term, {})
        if is_causal:
            found = found.and_pairs("is_causal=True", causal())
        if MASK in dense and (self.mask == "cache" or _is_cached(sizes)):
            found = _cached(found, dense[MASK], sizes)
        elif MASK in dense and self.mask == "implied":
            if self.check_mask:
                _check_implied(dense[MASK], found.term, sizes)
        elif MASK in dense:
            found = _masked(found, dense[MASK], self.mask, sizes)
        return found.and_bias(dense[BIAS], sizes) if BIAS in dense else found


@dataclass(frozen=True)
class Limited:
    """A spec and what a call with it reads."""

    term: Term
    operands: Mapping[str, Array]
    q_offset: Any = 0

    def and_pairs(self, asked: str, pairs: IndexMap, **arrays: Array) -> "Limited":
        """Only the pairs that ``pairs`` has too."""
        change = Change(asked, lambda map_: map_ & pairs)
        term = any_term(changed(self.term, change))
        return Limited(term, {**self.operands, **arrays}, self.q_offset)

    def and_bias(self, array: Array, sizes: PairSizes) -> "Limited":
        """A bias more."""
        if not isinstance(self.term, Softmax):
            raise NotImplementedError(
                f"bias of shape {array.shape} with {self.term!r}, which is not one "
                "softmax over a map: put a bias into its parts"
            )
        more, array = bias_of(BIAS, array, sizes)
        bias = more if self.term.bias is None else self.term.bias + more
        term = replace(self.term, bias=bias)
        return Limited(term, {**self.operands, BIAS: array}, self.q_offset)


def _is_cached(sizes: PairSizes) -> bool:
    """Whether a call looks like a step with a cache: one query, more keys."""
    return sizes.q_seq == 1 and sizes.kv_seq > 1


def _cached(call: Limited, mask: Array, sizes: PairSizes) -> Limited:
    """The call where the last query stands at the last slot that its mask shows."""
    slots = jnp.arange(mask.shape[3], dtype=jnp.int32)
    shown = jnp.where(mask[:, :, -1:].astype(bool), slots, 0)
    last = jnp.broadcast_to(jnp.max(shown, axis=(1, 2, 3)), (sizes.batch,))
    first = jnp.maximum(last - (sizes.q_seq - 1), 0)
    return _masked(replace(call, q_offset=first), mask, None, sizes)


def _masked(
    call: Limited, mask: Array, meaning: MaskMeaning | None, sizes: PairSizes
) -> Limited:
    """The call with the pairs of a mask; its axes may be 1."""
    asked = f"mask of shape {mask.shape}"
    if meaning == "padding":
        seen = jnp.any(mask.astype(bool), axis=(1, 3), keepdims=True)
        pairs, array = pairs_of(QUERIES, seen, sizes)
        call = call.and_pairs(asked, pairs, **{QUERIES: array})
        mask = jnp.any(mask.astype(bool), axis=(1, 2), keepdims=True)
    pairs, array = pairs_of(MASK, mask, sizes)
    return call.and_pairs(asked, pairs, **{MASK: array})


def _check_implied(mask: Array, term: Term, sizes: PairSizes) -> None:
    """Compares a concrete mask with the pairs of a spec.

    Raises:
      ValueError: they differ.
    """
    pairs = term.map if isinstance(term, Softmax) else term.seen
    if pairs is None or ir.operand_names(pairs.node):
        return
    if isinstance(mask, jax.core.Tracer) or sizes.q_seq != sizes.kv_seq:
        return
    shape = sizes.heads, sizes.q_seq, sizes.kv_seq
    said = np.broadcast_to(pairs.dense(*shape[1:], num_heads=sizes.heads), shape)
    differ = np.argwhere(
        np.broadcast_to(np.asarray(mask, bool), (len(mask), *shape)) != said
    )
    if len(differ):
        _, h, q, k = differ[0].tolist()
        raise ValueError(
            f"mask of shape {mask.shape} is not implied by {term!r}: {len(differ)} "
            f"pairs differ, the first at head {h}, query {q}, key {k}: leave mask=None "
            "in attention_fn, which adds the mask to the spec"
        )


def _one_batch_axis(
    query: Array, key: Array, value: Array, dtype: DTypeLike | None
) -> tuple[Array, ...]:
    """q, k and v in the dtype of the computation, with one batch axis.

    Raises:
      ValueError: the batch axes of query, key and value differ.
    """
    batch = query.shape[:-3]
    for name, x in {"key": key, "value": value}.items():
        if x.shape[:-3] != batch:
            raise ValueError(
                f"{name} has shape {x.shape}, query has {query.shape}: the axes in "
                "front of [seq, heads, head_dim] must be the same"
            )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    size = math.prod(batch)
    return tuple(
        x.astype(dtype).reshape(size, *x.shape[-3:]) for x in (query, key, value)
    )


def _flat(name: str, x: Any, batch: tuple[int, ...]) -> Array:
    """A dense array with one batch axis, which is 1 if no batch axis is longer.

    Raises:
      ValueError: the array does not broadcast to the batch axes.
    """
    array = jnp.asarray(x)
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    lead = array.shape[:-3]
    if max(lead) == 1:
        return array.reshape(1, *array.shape[-3:])
    try:
        array = jnp.broadcast_to(array, (*batch, *array.shape[-3:]))
    except ValueError as error:
        raise ValueError(
            f"{name} has shape {array.shape}: its axes in front of [heads, q_seq, "
            f"kv_seq] must broadcast to the batch axes {batch}"
        ) from error
    return array.reshape(math.prod(batch), *array.shape[-3:])


def _refuse(name: str, given: Any) -> NoReturn:
    why, way_out = REFUSED.get(name, UNKNOWN)
    shape = getattr(given, "shape", None)
    shown = repr(given) if shape is None else f"an array of shape {tuple(shape)}"
    shown = shown if len(shown) < 80 else f"a {type(given).__name__}"
    raise NotImplementedError(f"{name}={shown}: {why}; {way_out}")


def attention_fn(
    spec: Spec | str,
    *,
    mask: MaskMeaning | None = None,
    check_mask: bool = False,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    sm_scale: float | None = None,
    impl: str | None = None,
    interpret: Any = False,
    config: KernelConfig | None = None,
    mesh_axes: MeshAxes | None = None,
) -> AttentionFn:
    """Makes the ``attention_fn`` of ``nnx.MultiHeadAttention``, or of its Linen form.

    It takes ``[batch..., seq, heads, head_dim]`` with any number of batch axes. What a
    mask of Flax means is decided here, never by its values:

    - ``mask="implied"``: the spec says it already, so it is not read.
    - ``mask="padding"``: a key counts where some query sees it, a query where it sees
      some key. Both are vectors, and blocks of padding are skipped.
    - ``mask="cache"``: any pairs, and the last query of a call stands at the last slot
      that the mask shows it, the others before it: for steps of several queries.
    - None: any pairs. The mask is an operand as large as it is passed, of a byte for
      each entry, and is packed to bits; blocks without a pair are skipped.

    A single query, as from ``decode=True``, stands at the last slot that its mask
    shows, whatever ``mask=`` is; the mask limits it, and is a vector.

    Args:
      spec: an index map, a term, or text, which is read here, once.
      mask: what masks mean, see above.
      check_mask: with ``mask="implied"``, compare masks whose values are known with the
        spec, where q and k have one length. It builds all pairs: for debugging.
      q_segment_ids, kv_segment_ids: integers ``[batch, seq]`` for ``segments()``; the
        ids of queries are those of keys if None.
      sm_scale, impl, interpret, config: as in ``sadsl.attention``.
      mesh_axes: as in ``sadsl.sharded_attention``.

    Raises:
      ValueError: the text is not a spec, the spec reads other run-time arrays, learned
        ones among them, or the options contradict one another.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers import attention_fn
      >>> near = attention_fn("causal() & window(2)")
      >>> def model(x):
      ...     options = {"attention_fn": near, "decode": False, "rngs": nnx.Rngs(0)}
      ...     return nnx.MultiHeadAttention(2, 8, **options)(x)
      >>> x = jax.ShapeDtypeStruct((1, 6, 8), "float32")  # [batch, seq, features]
      >>> jax.eval_shape(model, x).shape
      (1, 6, 8)
    """
    term = any_term(spec)
    ids = _ids_of(q_segment_ids, kv_segment_ids)
    how = sm_scale, impl, interpret, config, mesh_axes
    found = AttentionFn(term, mask, check_mask, ids, *how)
    return _checked(found)


def _ids_of(q: Any, kv: Any) -> SegmentIds | None:
    """The segment ids; those of queries are those of keys if None.

    Raises:
      ValueError: only those of queries were given.
    """
    if kv is None and q is not None:
        raise ValueError("q_segment_ids was given without kv_segment_ids: pass both")
    return None if kv is None else SegmentIds(kv if q is None else q, kv)


def _checked(made: AttentionFn) -> AttentionFn:
    """What ``attention_fn`` made, with its options checked.

    Raises:
      ValueError: they contradict one another, or the spec reads other arrays.
    """
    if made.mask is not None and made.mask not in get_args(MaskMeaning):
        raise ValueError(
            f"mask={made.mask!r} must be None or one of {get_args(MaskMeaning)}"
        )
    if made.check_mask and made.mask != "implied":
        raise ValueError(
            f"check_mask=True with mask={made.mask!r}: it needs mask='implied'"
        )
    names = sorted(needed(made.term) - set(() if made.ids is None else IDS))
    if names:
        raise ValueError(
            f"spec={made.term!r} reads the run-time arrays {names}, which Flax's "
            "attention layers cannot pass on: use SparseAttention of sadsl.layers.nnx "
            "or .linen" + ("; or give the ids here" if set(names) <= set(IDS) else "")
        )
    return made
