"""The arguments and results of a kernel call: the contract of every backend."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import TileCounter, Tiles
from pallas_kernels.precision import widened
from pallas_kernels.softmax import LOG2_E

# predicate(test, q_ids, k_ids, q_vectors, kv_vectors, bits) -> bool tile.
# - test: int32 scalar, BlockMask.test_of_map of the map.
# - q_ids, k_ids: int32 positions, [q, 1] with [1, k], or [1, q] with [k, 1].
# - q_vectors, kv_vectors: the entries of Vectors.q and Vectors.kv, each shaped like
#   the ids of its side, perhaps with leading batch and head axes.
# - bits: bool tiles over both sides, one for each of Vectors.bits.
# A predicate must be hashable and equal by content.
Predicate = Callable[[Any, Any, Any, tuple, tuple, tuple], Any]

# scores(q_ids, k_ids, q_values, kv_values, pairs) -> float tile in natural units, which
# is added to the scaled and capped scores of every tile, full tiles too.
# - q_ids, k_ids: as above.
# - q_values, kv_values: the entries of ScoreValues.q and .kv, shaped like their ids.
# - pairs: tiles over both sides, one for each of ScoreValues.pairs.
# It must be hashable and equal by content.
Scores = Callable[[Any, Any, tuple, tuple, tuple], Any]

# The number of bits in a word of PairBits.
WORD = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairBits:
    """A bit for every pair, packed for key blocks of ``block_kv``.

    Let ``j = k // block_kv`` be the block of key ``k``. The bit of the pair ``(q, k)``
    is bit ``bit[k] % 32`` of the word

    - ``words[..., j // blocks_per_plane, bit[k] // 32, q // queries_per_word]``; or, if
      ``diagonal``,
    - ``words[..., 0, bit[k] // 32, x]`` with ``x = q + (num_kv_blocks - 1 - j) *
      block_kv``: one plane, whose length is that of the range of ``x``.

    Words beyond the length count as 0. The bits of a diagonal array depend on ``q - k``
    alone.

    ``queries_per_word`` neighbouring queries share their words. It divides the
    ``block_q`` of every kernel of the call, or is a multiple of it. It is 1 if the
    array is diagonal.

    ``keys_per_bit`` is None, or says that bits are numbered in the order of the keys:
    ``bit[k] == k % (block_kv * blocks_per_plane) // keys_per_bit``. It is 1 if the
    array is diagonal.
    """

    # int32 arrays. Any, because jax rebuilds a pytree with placeholders in it.
    words: Any  # [batch or 1, num_q_heads or 1, planes, words, length]
    bit: Any  # [kv_seq_len], each in 0 .. 32 * words - 1
    block_kv: int = field(metadata={"static": True})
    diagonal: bool = field(default=False, metadata={"static": True})
    blocks_per_plane: int = field(default=1, metadata={"static": True})
    keys_per_bit: int | None = field(default=None, metadata={"static": True})
    queries_per_word: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairValues:
    """A float for every pair: f32 ``[batch or 1, num_q_heads or 1, q, kv]``.

    If ``diagonal``, the value depends on ``q - k`` alone: ``values[..., q - k +
    kv_seq_len - 1]``, of length ``q_seq_len + kv_seq_len - 1``. The value ``-inf``
    removes the pair.
    """

    values: Any  # Any, because jax rebuilds a pytree with placeholders in it.
    diagonal: bool = field(default=False, metadata={"static": True})


class ScoreValues(NamedTuple):
    """The arrays that ``Call.scores`` reads: of queries, of keys and of pairs.

    ``q`` are f32 ``[batch or 1, num_q_heads or 1, q_seq_len]``; ``kv`` have
    ``kv_seq_len``.
    """

    q: tuple[Float[Array, "_batch _heads _q"], ...] = ()
    kv: tuple[Float[Array, "_batch _heads _kv"], ...] = ()
    pairs: tuple[PairValues, ...] = ()


class Seeds(NamedTuple):
    """The dropout seeds of the queries and of the keys (``pallas_kernels.dropout``)."""

    q: Int32[Array, "_batch _heads _q"]
    kv: Int32[Array, "_batch _heads _kv"]


class Vectors(NamedTuple):
    """Run-time arrays that the kernels read beside ``q``, ``k`` and ``v``.

    The predicate reads ``q`` and ``kv`` (an int32 for each query or key) and ``bits``
    (a bit for each pair). ``Call.scores`` reads ``scores``. Dropout reads ``seeds``,
    which are None if ``Call.dropout_rate`` is 0. Each vector has shape ``[batch or 1,
    num_q_heads or 1, q_seq_len]`` (``kv``: ``kv_seq_len``). All kernels of a call with
    ``bits`` have the same ``block_kv``.
    """

    q: tuple[Int32[Array, "_batch _heads _q"], ...] = ()
    kv: tuple[Int32[Array, "_batch _heads _kv"], ...] = ()
    bits: tuple[PairBits, ...] = ()
    scores: ScoreValues = ScoreValues()
    seeds: Seeds | None = None


class Masks(NamedTuple):
    """The block masks of the three kernels: ``dkv`` has ``by="kv"``, the others "q"."""

    forward: BlockMask
    dq: BlockMask
    dkv: BlockMask


@dataclass(frozen=True)
class Call:
    """The static part of a kernel call."""

    predicate: Predicate
    sm_scale: float
    tiles: Tiles
    logits_soft_cap: float | None = None
    # False, True (Pallas' quick interpreter) or a backend's interpreter parameters.
    interpret: Hashable = False
    # The function whose values are added to the scores, and whether the arrays that it
    # reads need gradients.
    scores: Scores | None = None
    learned_scores: bool = False
    # The fraction of the weights that is dropped, in [0, 1).
    dropout_rate: float = 0.0
    # A name of the residuals for checkpoint policies, beside those of ``named``.
    residual_name: str | None = None
    # Channels (start, stop) of k that are the values: the v of a caller is then not
    # read, and dk has the gradients of both (``shared_values``).
    values: tuple[int, int] | None = None
    # Scores are the products, see ``with_raw_scores``.
    raw_scores: bool = False

    @property
    def unit(self) -> float:
        """The factor from natural scores to the scores in kernels (``softmax``)."""
        if self.raw_scores:
            return 1 / self.sm_scale
        return LOG2_E if self.scores is None else 1.0

    @property
    def scale(self) -> float:
        """The factor of ``q k^T``, applied to the product in f32.

        A scaled ``q`` would be rounded to bf16. That changes a score by a relative
        error of up to 2^-9, and its weight by that error times the score.
        """
        return 1.0 if self.raw_scores else self.sm_scale * self.unit

    def with_raw_scores(self) -> "Call":
        """The call with ``q k^T`` as scores, if nothing else is added to them.

        The factor is then applied to differences of scores. This shortens the first
        phase of a tile, which waits for the matrix unit of a TPU.
        """
        plain = self.scores is None and self.logits_soft_cap is None
        return replace(self, raw_scores=plain and self.sm_scale > 0)

    def scaled(self, products: jax.Array) -> jax.Array:
        """The scores of ``q k^T``, before the cap."""
        return products if self.scale == 1.0 else products * self.scale


class Inputs(NamedTuple):
    """The arrays of a call: ``num_q_heads`` is a multiple of ``num_kv_heads``."""

    q: Float[Array, "batch q_heads q head_dim"]
    k: Float[Array, "batch kv_heads kv head_dim"]
    v: Float[Array, "batch kv_heads kv head_dim_v"]


class Outputs(NamedTuple):
    """The results of a call. An empty row has ``o == 0`` and ``lse == -inf``."""

    o: Float[Array, "batch q_heads q head_dim_v"]  # in the dtype of q
    lse: Float[Array, "batch q_heads q"]  # natural logarithm


class Kept(NamedTuple):
    """The results of a forward pass that derivatives need: outputs and row totals.

    The total of a row is the sum of its weights ``exp(score - lse)``. It differs from 1
    by the rounding of the lse. It is the number of keys if all scores are
    ``finfo.min``, where float32 absorbs the logarithm of that number. Derivatives
    divide by the total.
    """

    o: Float[Array, "batch q_heads q head_dim_v"]
    lse: Float[Array, "batch q_heads q"]
    total: Float[Array, "batch q_heads q"]

    @property
    def outputs(self) -> Outputs:
        """The results that a caller sees."""
        return Outputs(self.o, self.lse)


class Cotangents(NamedTuple):
    """The arrays that a backward pass starts from.

    ``delta = rowsum(do * o) - dlse``. Both ``do`` and ``delta`` are divided by the
    total of the row's weights (``Kept``). Both are 0 where ``lse == -inf``: an empty
    row has no gradient.
    """

    lse: Float[Array, "batch q_heads q"]  # the natural lse of the forward pass
    do: Float[Array, "batch q_heads q head_dim_v"]
    delta: Float[Array, "batch q_heads q"]


def named(kept: Kept, name: str | None) -> Kept:
    """``kept`` with residual names for checkpoint policies.

    They are "attn_out" and "attn_lse", and ``name`` for all, unless it is None.
    """
    o = checkpoint_name(kept.o, "attn_out")
    found = Kept(o, *(checkpoint_name(x, "attn_lse") for x in kept[1:]))
    if name is None:
        return found
    return Kept(*(checkpoint_name(x, name) for x in found))


def to_backward(
    inputs: Inputs, kept: Kept, cotangent: Outputs
) -> tuple[Inputs, Cotangents]:
    """Computes the arrays that a backward pass starts from.

    The rows of ``q`` and ``do`` are replaced by 0 for queries that see no key: the
    kernels multiply them by weights of 0, and ``0 * nan`` is NaN.
    """
    o, lse, total = kept
    do, dlse = cotangent
    products = widened(o) * widened(do)
    # XLA:CPU reduces the last axis serially; a matmul is faster.
    ones = jnp.ones(o.shape[-1], products.dtype)
    delta = jnp.matmul(products, ones, precision="highest") - dlse
    do = (widened(do) / total[..., None]).astype(do.dtype)
    absent = jnp.isneginf(lse)
    q, do = (
        jnp.where(absent[..., None], jnp.zeros((), x.dtype), x) for x in (inputs.q, do)
    )
    delta = jnp.where(absent, 0.0, delta / total)
    return inputs._replace(q=q), Cotangents(lse, do, delta)


class Backend(Protocol):
    """The functions of a backend module: ``xla``, ``tpu`` and ``triton``.

    Array lengths are those of the caller. A backend pads to whole blocks and drops the
    padding from its results.
    """

    def default_tiles(
        self,
        lengths: tuple[int, int],
        head_dim: int,
        head_dim_v: int,
        dtype: Any,
        counts: TileCounter | None = None,
    ) -> Tiles:
        """The default block sizes for ``lengths`` (queries, keys) and head sizes.

        ``counts`` says what tiles a call visits, if a backend asks.
        """
        ...

    def prepare(self, masks: Masks, call: Call, inputs: Inputs) -> Any:
        """Converts the block masks to the lists of this backend, a pytree of arrays.

        It runs outside of differentiation, and on host arrays if the plan is static.
        """

    def forward(self, inputs: Inputs, vectors: Vectors, lists: Any, call: Call) -> Kept:
        """Attention over the blocks of ``lists``."""

    def backward(
        self,
        inputs: Inputs,
        cotangents: Cotangents,
        vectors: Vectors,
        lists: Any,
        call: Call,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """``dq, dk, dv`` in the shapes and dtypes of the inputs.

        ``dv`` is None if ``Call.values`` is set: it is then in ``dk``.
        """
