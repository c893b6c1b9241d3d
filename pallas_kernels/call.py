"""What a kernel call is made of, beside its arrays: the contract of every backend."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import Tiles
from pallas_kernels.precision import widened
from pallas_kernels.softmax import LOG2_E

# predicate(test, q_ids, k_ids, q_vectors, kv_vectors, bits) -> bool tile. ``test`` is
# an int32 scalar (``BlockMask.test_of_map`` of the map), the ids are int32 and
# broadcast against one another in either orientation ([q, 1] with [1, k], or [1, q]
# with [k, 1]); each vector is shaped like the ids it belongs to, perhaps with leading
# batch and head axes, and ``bits`` are bool tiles over both, one for each of
# ``Vectors.bits``. It must be hashable and equal by content.
Predicate = Callable[[Any, Any, Any, tuple, tuple, tuple], Any]

# scores(q_ids, k_ids, q_values, kv_values, pairs) -> floats in natural units, added to
# the scaled, capped scores of every tile, full ones too. The ids are as above; the
# values are floats, shaped like the ids they belong to, and ``pairs`` are tiles over
# both, one for each of ``ScoreValues.pairs``. Hashable and equal by content, too.
Scores = Callable[[Any, Any, tuple, tuple, tuple], Any]

# Bits in a word of PairBits.
WORD = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairBits:
    """A bit for every pair, packed for key blocks of ``block_kv``.

    The bit of query ``q`` and key ``k`` of block ``j = k // block_kv`` is bit
    ``bit[k] % 32`` of word ``w = bit[k] // 32`` of ``words``: of ``words[..., p, w,
    q]`` with ``p = j // blocks_per_plane`` (``length == q_seq_len``), or, if
    ``diagonal``, of ``words[..., 0, w, x]``, where ``x = q + (num_kv_blocks
    - 1 - j) * block_kv`` (one plane, as long as ``x`` goes). Past the length, 0.
    """

    # int32 arrays; Any, because jax rebuilds a pytree with placeholders in them.
    words: Any  # [batch or 1, num_q_heads or 1, planes, words, length]
    bit: Any  # [kv_seq_len], each in 0 .. 32 * words - 1
    block_kv: int = field(metadata={"static": True})
    diagonal: bool = field(default=False, metadata={"static": True})
    blocks_per_plane: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairValues:
    """A float for every pair: f32 ``[batch or 1, num_q_heads or 1, q, kv]``.

    If ``diagonal``, one for every ``q - k``: ``values[..., q - k + kv_seq_len - 1]``,
    of length ``q_seq_len + kv_seq_len - 1``. ``-inf`` leaves the pair out.
    """

    values: Any  # Any, because jax rebuilds a pytree with placeholders in it.
    diagonal: bool = field(default=False, metadata={"static": True})


class ScoreValues(NamedTuple):
    """What ``Call.scores`` reads: floats of queries, of keys and of pairs.

    Vectors are f32 ``[batch or 1, num_q_heads or 1, q_seq_len]`` (``kv``:
    ``kv_seq_len``).
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
    """The plans of the three kernels; ``dkv`` is ``by="kv"``, the others ``by="q"``."""

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
    # What is added to the scores, and whether its values want gradients.
    scores: Scores | None = None
    learned_scores: bool = False
    # How many of the weights are dropped: in [0, 1).
    dropout_rate: float = 0.0

    @property
    def unit(self) -> float:
        """The factor between natural scores and those in kernels (``softmax``)."""
        return LOG2_E if self.scores is None else 1.0

    @property
    def scale(self) -> float:
        """What ``q k^T`` is multiplied by, in f32.

        A scaled q would be rounded to bf16: that changes a score by up to 2^-9 of it,
        and a weight by that much times the score.
        """
        return self.sm_scale * self.unit


class Inputs(NamedTuple):
    """The arrays of a call: ``num_q_heads`` is a multiple of ``num_kv_heads``."""

    q: Float[Array, "batch q_heads q head_dim"]
    k: Float[Array, "batch kv_heads kv head_dim"]
    v: Float[Array, "batch kv_heads kv head_dim_v"]


class Outputs(NamedTuple):
    """What a forward pass yields; an empty row has ``o == 0`` and ``lse == -inf``."""

    o: Float[Array, "batch q_heads q head_dim_v"]  # in the dtype of q
    lse: Float[Array, "batch q_heads q"]  # natural logarithm


class Kept(NamedTuple):
    """What a forward pass keeps for derivatives: the outputs, and a total a row.

    The total is the sum of the weights ``exp(score - lse)``. It is 1 but for the
    rounding of the lse: the number of keys where all scores are ``finfo.min``, in which
    float32 absorbs the logarithm of a sum. Derivatives divide by it.
    """

    o: Float[Array, "batch q_heads q head_dim_v"]
    lse: Float[Array, "batch q_heads q"]
    total: Float[Array, "batch q_heads q"]

    @property
    def outputs(self) -> Outputs:
        """What a caller sees."""
        return Outputs(self.o, self.lse)


class Cotangents(NamedTuple):
    """What a backward pass starts from; ``delta = rowsum(do * o) - dlse``.

    Both are divided by the total of the weights of the row, and 0 where ``lse ==
    -inf``: nothing flows back through an empty row.
    """

    lse: Float[Array, "batch q_heads q"]  # the natural lse of the forward pass
    do: Float[Array, "batch q_heads q head_dim_v"]
    delta: Float[Array, "batch q_heads q"]


def named(kept: Kept) -> Kept:
    """``kept`` with the names that checkpoint policies know residuals by."""
    o = checkpoint_name(kept.o, "attn_out")
    return Kept(o, *(checkpoint_name(x, "attn_lse") for x in kept[1:]))


def to_backward(
    inputs: Inputs, kept: Kept, cotangent: Outputs
) -> tuple[Inputs, Cotangents]:
    """What a backward pass starts from; ``q`` is 0 for queries that see no key.

    Its kernels multiply such rows of ``q`` and ``do`` by weights of 0, and ``0 * nan``
    is NaN.
    """
    o, lse, total = kept
    do, dlse = cotangent
    products = widened(o) * widened(do)
    # CPUs add up the last axis of an array one number at a time, but for dots.
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
    """A module with these functions: ``xla``, ``tpu`` and ``triton`` are such.

    Lengths are those of the caller: a backend pads to its blocks and drops the padding.
    """

    def default_tiles(
        self, lengths: tuple[int, int], head_dim: int, head_dim_v: int, dtype: Any
    ) -> Tiles:
        """Good block sizes for queries and keys of these lengths and sizes."""
        ...

    def prepare(self, masks: Masks, call: Call) -> Any:
        """The plan in the form that this backend walks: a pytree of arrays.

        Runs outside of any differentiation, on host arrays for a static plan.
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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``dq, dk, dv`` in the shapes and dtypes of the inputs."""
