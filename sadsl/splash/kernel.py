"""Jax's splash attention on the kernels of sadsl: on TPU, GPU and CPU.

``make_splash_mha`` and its relatives have the arguments of those in
``jax.experimental.pallas.ops.tpu.splash_attention``, and so has what they return. A
model becomes a client by one import:

    from sadsl.splash import kernel as splash_attention_kernel
    from sadsl.splash import masks as splash_attention_mask

What differs. A query that sees no key yields 0 and an lse of ``-inf``. Lengths are no
multiples of a block, head sizes are free, and q, k and v may have different dtypes.
``save_residuals=True`` is differentiable. Planning does not visit the pairs of a mask,
but of a ``NumpyMask``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.config import KernelConfig
from sadsl.maps.base import IndexMap, at_least, per_head
from sadsl.maps.named import segments
from sadsl.run.call import attention
from sadsl.splash.masks import MultiHeadMask, NumpyMask, as_mask
from sadsl.splash.options import BlockSizes as BlockSizes
from sadsl.splash.options import QKVLayout as QKVLayout
from sadsl.splash.options import SegmentIds as SegmentIds
from sadsl.splash.places import Leaves
from sadsl.terms.softmax import Softmax, softmax

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
# A score below this has no weight beside any score that a model computes.
LEAST_MASK_VALUE = -1e6


@dataclass(frozen=True, kw_only=True)
class SplashOptions:
    """What is known of a kernel before it is called; hashable."""

    term: Softmax
    # The axes of each array of the kernel, by name: "heads", "q" or None.
    axes: tuple[tuple[str, tuple[str | None, ...]], ...]
    shape: tuple[int, int, int]  # heads, queries and keys of the mask
    # Into how many parts the arrays of a kernel can be split, and whether heads differ.
    head_shards: int
    q_seq_shards: int
    by_head: bool
    is_mqa: bool
    save_residuals: bool
    config: KernelConfig
    impl: str | None
    interpret: Any


@partial(
    jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("static",)
)
@dataclass(frozen=True)
class SplashAttentionKernel:
    """A kernel: a pytree of arrays, which a call under ``jit`` takes and returns.

    Call it on ``q [heads, q_seq, head_dim]`` and ``k, v [kv_heads, kv_seq, head_dim]``
    (``[kv_seq, head_dim]`` if ``is_mqa``), of one batch entry; ``jax.vmap`` it over a
    batch. q is not scaled: multiply it by ``head_dim ** -0.5``, as jax asks for.
    """

    arrays: dict[str, Any]
    static: SplashOptions

    def __call__(
        self, q: Any, k: Any, v: Any, segment_ids: Any = None, sinks: Any = None
    ) -> Any:
        """Attention of one batch entry.

        Args:
          q, k, v: the arrays; each group of query heads shares a head of k and v.
          segment_ids: ``SegmentIds``, or None.
          sinks: a score for each query head that has no value; it has a gradient.

        Returns:
          ``out [heads, q_seq, head_dim]`` in the dtype of q; with ``save_residuals``,
          ``(out, (lse,))`` with the natural log-sum-exp, float32 ``[heads, q_seq]``.

        Raises:
          ValueError: the arrays do not fit the mask or one another.
        """
        static = self.static
        if static.is_mqa and (k.ndim, v.ndim) == (2, 2):
            k, v = k[None], v[None]
        _check(static, q, k, v, segment_ids, sinks)
        dtype = jnp.result_type(q, k, v)
        q_in, k, v = (jnp.swapaxes(x, 0, 1)[None].astype(dtype) for x in (q, k, v))
        term, operands, ids = static.term, dict(self.arrays), (None, None)
        if segment_ids is not None:
            term = replace(term, map=term.map & segments())
            ids = tuple(jnp.asarray(x)[None] for x in segment_ids)
        if sinks is not None:
            term, operands["sink"] = replace(term, sink="sink"), sinks
        found = attention(
            q_in, k, v, term, q_segment_ids=ids[0], kv_segment_ids=ids[1],
            operands=operands, sm_scale=1.0, return_lse=static.save_residuals,
            impl=static.impl, interpret=static.interpret, config=static.config,
        )  # fmt: skip
        out, lse = found if static.save_residuals else (found, None)
        out = jnp.swapaxes(out[0], 0, 1).astype(q.dtype)
        return out if lse is None else (out, (lse[0],))

    def manual_sharding_spec(self, sharding: NamedSharding) -> "SplashAttentionKernel":
        """The ``in_specs`` of this kernel for ``shard_map``.

        Args:
          sharding: with a spec of two entries, for heads and queries.

        Raises:
          ValueError: the spec has another length, or splits what the kernel was not
            made for.
        """
        static, spec = self.static, tuple(sharding.spec)
        if len(spec) != 2:
            raise ValueError(
                f"manual_sharding_spec: {sharding.spec} has {len(spec)} entries: give "
                "two, for heads and for queries"
            )
        for axis, made, matters in (
            (0, static.head_shards, static.by_head),
            (1, static.q_seq_shards, True),
        ):
            parts, name = parts_of(sharding, spec[axis]), AXES[axis]
            if matters and parts != made:
                raise ValueError(
                    f"manual_sharding_spec: the sharding splits {name} over {parts} "
                    f"devices, and the kernel was made with {SHARDS[axis]}={made}: "
                    f"make it with {SHARDS[axis]}={parts}"
                )
        of_axis = dict(zip((*AXES, None), (*spec, None), strict=True))
        specs = {
            name: PartitionSpec(*(of_axis[axis] for axis in axes))
            for name, axes in static.axes
        }
        return replace(self, arrays=specs)


AXES = "heads", "q"
SHARDS = "head_shards", "q_seq_shards"


def parts_of(sharding: NamedSharding, entry: Any) -> int:
    """Over how many devices an axis is split, by its entry in a spec."""
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def make_splash_mha(
    mask: Any, *,
    block_sizes: Any = None, is_mqa: bool = False, save_residuals: bool = False,
    mask_value: float = DEFAULT_MASK_VALUE, attn_logits_soft_cap: float | None = None,
    downcast_smem_data: bool = True, head_shards: int, q_seq_shards: int,
    residual_checkpoint_name: str | None = None, interpret: Any = False,
    impl: str | None = None, config: KernelConfig | None = None,
) -> SplashAttentionKernel:  # fmt: skip
    """A kernel with as many heads of k and v as of q, or a divisor of them.

    Args:
      mask: a ``MultiHeadMask``, a NumPy array ``[heads, q_seq, kv_seq]`` of bools, or
        such an array of jax, traced or not: then it is an operand of each call.
      block_sizes: ignored, since it does not change the result: see ``BlockSizes``.
      is_mqa: whether k and v have no axis of heads.
      save_residuals: whether a call returns ``(out, (lse,))``.
      mask_value: the score of a pair that does not attend in jax's kernels. Here it has
        a weight of exactly 0, which is what any value that is small enough gives.
      attn_logits_soft_cap: ``cap * tanh(score / cap)`` replaces each score.
      downcast_smem_data: ignored: it is about the memory of jax's kernels.
      head_shards, q_seq_shards: over how many devices heads and queries are split by
        ``shard_map``, with the specs of ``manual_sharding_spec``.
      residual_checkpoint_name: the name of the output and the lse for policies of
        ``jax.checkpoint``: with it saved, a backward pass does not repeat the forward.
      interpret, impl, config: as in ``sadsl.attention``.

    Raises:
      ValueError: the arguments contradict one another.
      TypeError: the mask is none.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl import splash
      >>> mask = splash.MultiHeadMask([splash.CausalMask((4, 4))])
      >>> kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
      >>> x, v = jnp.zeros((1, 4, 2)), jnp.arange(4.0).reshape(1, 4, 1)
      >>> kernel(x, x, v)[0, :, 0].tolist()
      [0.0, 0.5, 1.0, 1.5]
    """
    del block_sizes, downcast_smem_data
    shape = tuple(mask.shape)
    _check_made(shape, mask_value, head_shards, q_seq_shards)
    leaves = Leaves(shape[1], q_seq_shards)
    pairs, by_head = _pairs(mask, leaves, head_shards)
    config = config or KernelConfig()
    if residual_checkpoint_name is not None:
        config = replace(config, residual_name=residual_checkpoint_name)
    static = SplashOptions(
        term=softmax(pairs, logits_soft_cap=attn_logits_soft_cap),
        axes=tuple(leaves.axes.items()), shape=shape, head_shards=head_shards,
        q_seq_shards=q_seq_shards, by_head=by_head, is_mqa=is_mqa,
        save_residuals=save_residuals, config=config, impl=impl, interpret=interpret,
    )  # fmt: skip
    return SplashAttentionKernel(jax.tree.map(jnp.asarray, leaves.arrays), static)


def make_splash_mqa(mask: Any, **options: Any) -> SplashAttentionKernel:
    """``make_splash_mha`` for one head of k and v: see there for an example."""
    options.setdefault("is_mqa", True)
    return make_splash_mha(mask, **options)


def make_splash_mha_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """``make_splash_mha`` on one device: see there for an example."""
    return make_splash_mha(mask, head_shards=1, q_seq_shards=1, **options)


def make_splash_mqa_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """``make_splash_mqa`` on one device: see ``make_splash_mha``."""
    options.setdefault("is_mqa", True)
    return make_splash_mha_single_device(mask, **options)


def _check_made(
    shape: tuple[int, ...], mask_value: float, head_shards: int, q_seq_shards: int
) -> None:
    """Raises a ``ValueError`` for arguments that contradict one another."""
    if len(shape) != 3:
        raise ValueError(
            f"the mask has shape {shape}: it must be [heads, q_seq, kv_seq]; make a "
            "MultiHeadMask([mask] * num_heads)"
        )
    for i, shards in enumerate((head_shards, q_seq_shards)):
        at_least("make_splash", SHARDS[i], shards, 1)
        if shape[i] % shards:
            raise ValueError(
                f"{SHARDS[i]}={shards} must divide the {shape[i]} {AXES[i]} of the mask"
            )
    if not mask_value <= LEAST_MASK_VALUE:
        raise ValueError(
            f"mask_value={mask_value}: a pair that does not attend has no weight here, "
            f"which only a value of {LEAST_MASK_VALUE:g} or less means: leave it out"
        )


def _pairs(mask: Any, leaves: Leaves, head_shards: int) -> tuple[IndexMap, bool]:
    """The map of all heads, and whether heads differ."""
    if isinstance(mask, jax.Array):
        if mask.dtype != bool:
            raise TypeError(f"the mask has dtype {mask.dtype}: it must be bool")
        # One mask is that of all heads.
        by_head = mask.shape[0] != 1
        return leaves.dynamic(mask if by_head else mask[0]), by_head
    if isinstance(mask, np.ndarray):
        mask = MultiHeadMask([NumpyMask(one) for one in mask])
    heads = as_mask(mask)
    if not isinstance(heads, MultiHeadMask):
        raise TypeError(f"{mask!r} is no mask of all heads: make a MultiHeadMask")
    kinds = list(dict.fromkeys({id(one): one for one in heads.masks}.values()))
    maps = tuple(kind.pairs_at(leaves) for kind in kinds)
    of_head = np.array([kinds.index(one) for one in heads.masks])
    if len(maps) == 1:
        return maps[0], False
    if head_shards > 1:
        return leaves.by_head(maps, of_head), True
    return per_head(*(maps[i] for i in of_head)), True


def _check(
    static: SplashOptions, q: Any, k: Any, v: Any, segment_ids: Any, sinks: Any
) -> None:
    """Raises a ``ValueError`` if arrays do not fit the mask or one another."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 3:
            axes = (
                "[seq, head_dim]"
                if static.is_mqa and name != "q"
                else ("[heads, seq, head_dim]")
            )
            raise ValueError(
                f"{name} has shape {x.shape}: it must be {axes}; map the kernel over "
                "a batch with jax.vmap"
            )
    heads, q_seq, kv_seq = static.shape
    whole = {heads, heads // static.head_shards} if static.by_head else {q.shape[0]}
    rows = {q_seq, q_seq // static.q_seq_shards}
    if q.shape[0] not in whole or q.shape[1] not in rows or k.shape[1] != kv_seq:
        raise ValueError(
            f"q {q.shape} and k {k.shape} do not fit the mask of {heads} heads, "
            f"{q_seq} queries and {kv_seq} keys"
        )
    if segment_ids is not None:
        found = tuple(jnp.shape(x) for x in segment_ids)
        if found != ((q.shape[1],), (kv_seq,)):
            raise ValueError(
                f"segment_ids have the shapes {found}: they must be one for each of "
                f"the {q.shape[1]} queries and {kv_seq} keys"
            )
    if sinks is not None and jnp.shape(sinks) != (q.shape[0],):
        raise ValueError(
            f"sinks have shape {jnp.shape(sinks)}: one for each of the {q.shape[0]} "
            "query heads"
        )
