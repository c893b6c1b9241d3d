"""The interface of tokamax's splash attention, which began as a copy of jax's.

    from sadsl.splash import tokamax as tokamax_splash_kernel

It differs from ``sadsl.splash.kernel`` in this: one mask ``[q_seq, kv_seq]`` is that of
all heads, options stand in a ``SplashConfig``, ``make_dynamic_splash_mha`` takes a mask
that is known at run time, and ``save_residuals=True`` returns ``(out, stats)``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.config import KernelConfig
from sadsl.splash import kernel as kernels
from sadsl.splash.kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
    parts_of,
)
from sadsl.splash.masks import MultiHeadMask, NumpyMask
from sadsl.splash.options import QKVLayout as QKVLayout
from sadsl.splash.options import SegmentIds as SegmentIds


@dataclass(frozen=True)
class SplashConfig:
    """The options of tokamax's kernels.

    These have an effect: ``residual_checkpoint_name``, ``attn_logits_soft_cap`` and
    ``interpret``. ``dropout_rate`` must be 0. The others say how tokamax's kernels
    compute the same result: our kernels do not use them (see ``BlockSizes``).
    """

    block_q: int
    block_kv: int
    block_kv_compute: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_kv_dkv_compute: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    use_fused_bwd_kernel: bool = True
    num_stacked_q_heads: int = 1
    q_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    k_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    v_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    fwd_cost_estimate: Any = None
    bwd_cost_estimate: Any = None
    residual_checkpoint_name: str | None = None
    attn_logits_soft_cap: float | None = None
    fuse_reciprocal: bool = True
    use_base2_exp: bool = True
    max_logit_const: float | None = None
    interpret: Any = False
    dq_reduction_steps: int | None = None
    use_experimental_scheduler: bool = False
    qk_diag_skip: bool = False
    qk_diag_grid: int = 2
    sv_diag_skip: bool = False
    dropout_rate: float = 0.0
    dropout_block_q: int | None = None
    dropout_block_kv: int | None = None

    @classmethod
    def get_default(cls) -> "SplashConfig":
        """Blocks of 128 everywhere."""
        return cls(*(128,) * 8)


@partial(
    jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("bounded",)
)
@dataclass(frozen=True)
class TokamaxKernel:
    """A kernel of one mask for all heads; see ``SplashAttentionKernel``."""

    kernel: SplashAttentionKernel
    bounded: bool = False  # the config has an estimate of the greatest score

    def __call__(
        self, q: Any, k: Any, v: Any, segment_ids: Any = None, sinks: Any = None, *,
        max_logit_value: Any = None,
    ) -> Any:  # fmt: skip
        """Attention of one batch entry.

        Args:
          q, k, v, segment_ids, sinks: as in ``SplashAttentionKernel``.
          max_logit_value: an estimate of the greatest score, of all heads or of each.
            It spares tokamax's kernel the running maximum, and cancels in the result.
            Our kernels keep the maximum, so that no estimate can be too small.

        Returns:
          ``out``; with ``save_residuals``, also ``{"logsumexp": [heads, q_seq]}``,
          without a gradient. tokamax has "max_logits" too: our kernels do not keep the
          maximum.

        Raises:
          ValueError: the arrays do not fit, or there are two estimates.
        """
        if max_logit_value is not None:
            shape = jnp.shape(max_logit_value)
            if self.bounded or shape not in ((), (1,), (q.shape[0],)):
                raise ValueError(
                    f"max_logit_value has shape {shape}: give one number or one for "
                    f"each of the {q.shape[0]} heads, and no max_logit_const with it"
                )
        found = self.kernel(q, k, v, segment_ids, sinks)
        if not self.kernel.static.save_residuals:
            return found
        out, (lse,) = found
        return out, {"logsumexp": jax.lax.stop_gradient(lse)}

    def manual_sharding_spec(self, sharding: NamedSharding) -> "TokamaxKernel":
        """The ``in_specs`` of this kernel for ``shard_map`` over the queries.

        Raises:
          ValueError: the spec has not one entry, that of the queries.
        """
        if len(sharding.spec) != 1:
            raise ValueError(
                f"manual_sharding_spec: {sharding.spec} must have one entry, that of "
                "the queries"
            )
        both = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return TokamaxKernel(self.kernel.manual_sharding_spec(both), self.bounded)


def make_splash_mha(
    mask: Any, *, config: Any = None, is_mqa: bool = False,
    save_residuals: bool = False, mask_value: float = DEFAULT_MASK_VALUE,
    q_seq_shards: int, downcast_smem_data: bool = True,
    partial_mask_blocks_dtype: Any = np.int8, impl: str | None = None,
) -> TokamaxKernel:  # fmt: skip
    """A kernel of one mask for all heads.

    Args:
      mask: a mask of ``sadsl.splash``, jax or tokamax, or bools ``[q_seq, kv_seq]``.
      config: a ``SplashConfig``, ours or tokamax's.
      q_seq_shards: over how many devices queries are split.
      is_mqa, save_residuals, mask_value: as in ``sadsl.splash.make_splash_mha``.
      downcast_smem_data, partial_mask_blocks_dtype: ignored: they are about the memory
        of tokamax's kernels.
      impl: as in ``sadsl.attention``.

    Raises:
      ValueError: the mask has not two axes.
      NotImplementedError: the config asks for dropout.

    Example:
      >>> import jax.numpy as jnp
      >>> from sadsl.splash import CausalMask, tokamax
      >>> kernel = tokamax.make_splash_mha(CausalMask((3, 3)), q_seq_shards=1)
      >>> x, v = jnp.zeros((1, 3, 2)), jnp.arange(3.0).reshape(1, 3, 1)
      >>> kernel(x, x, v)[0, :, 0].tolist()
      [0.0, 0.5, 1.0]
    """
    del downcast_smem_data, partial_mask_blocks_dtype
    if len(mask.shape) != 2:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}: it must be [q_seq, kv_seq], the "
            "mask of all heads"
        )
    config = config or SplashConfig.get_default()
    if getattr(config, "dropout_rate", 0.0):
        raise NotImplementedError(
            f"dropout_rate={config.dropout_rate}: this interface has no dropout: call "
            "sadsl.attention with dropout_rate= and dropout_key="
        )
    if isinstance(mask, np.ndarray):
        mask = NumpyMask(mask)
    heads = mask[None] if isinstance(mask, jax.Array) else MultiHeadMask([mask])
    kernel = kernels.make_splash_mha(
        heads, is_mqa=is_mqa, save_residuals=save_residuals, mask_value=mask_value,
        head_shards=1, q_seq_shards=q_seq_shards, interpret=config.interpret, impl=impl,
        attn_logits_soft_cap=config.attn_logits_soft_cap,
        config=KernelConfig(residual_name=config.residual_checkpoint_name),
    )  # fmt: skip
    return TokamaxKernel(kernel, config.max_logit_const is not None)


def make_dynamic_splash_mha(
    mask: Any, *, mesh: Mesh | None = None, mask_spec: PartitionSpec | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """A kernel of a mask of jax, traced or not: see ``make_splash_mha`` of this module.

    Args:
      mask: bools ``[q_seq, kv_seq]``, an operand of each call.
      mesh, mask_spec: how queries are split over devices, or None.
      **options: those of ``make_splash_mha``, without ``q_seq_shards``.

    Returns:
      The kernel; with ``mesh``, also its ``in_specs`` for ``shard_map``.

    Raises:
      ValueError: only one of ``mesh`` and ``mask_spec`` is given.
    """
    if (mesh is None) != (mask_spec is None):
        raise ValueError(
            f"mesh={mesh} and mask_spec={mask_spec}: give both, or neither of them"
        )
    if mesh is None or mask_spec is None:
        return make_splash_mha(jnp.asarray(mask), q_seq_shards=1, **options)
    sharding = NamedSharding(mesh, mask_spec)
    parts = parts_of(sharding, mask_spec[0])
    kernel = make_splash_mha(jnp.asarray(mask), q_seq_shards=parts, **options)
    return kernel, kernel.manual_sharding_spec(sharding)


make_splash_mqa = partial(make_splash_mha, is_mqa=True)
make_dynamic_splash_mqa = partial(make_dynamic_splash_mha, is_mqa=True)
make_splash_mha_single_device = partial(make_splash_mha, q_seq_shards=1)
make_splash_mqa_single_device = partial(make_splash_mqa, q_seq_shards=1)
