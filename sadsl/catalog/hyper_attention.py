"""HyperAttention: exact within sorted blocks, estimated from samples beyond them.

Han et al., HyperAttention: long-context attention in near-linear time, 2023, section 3.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sadsl.maps.base import at_least
from sadsl.maps.named import causal, full, where
from sadsl.maps.symbols import operand
from sadsl.run import merging
from sadsl.run.call import attention, select
from sadsl.run.types import Outcome
from sadsl.selections.lsh import Lsh, by_bucket, hashes, lsh, sorted_chunks

# An output of attention [batch, seq, heads, dim] and its lse [batch, heads, seq].
Part = tuple[Array, Array]


@dataclass(frozen=True)
class Hyper:
    """The options of ``hyper_attention``, with the published defaults.

    Han et al., HyperAttention: long-context attention in near-linear time, 2023.

    Attributes:
      block: keys in a block of the sorted order.
      samples: keys drawn to stand for all others; 0 leaves the blocks alone.
      bits: signs in a hash.
      min_seq_len: with fewer queries or keys than this, attention is exact.
      causal: whether later keys are hidden, by halving the sequence.

    Raises:
      ValueError: a number is too small.

    Example:
      >>> from sadsl import catalog
      >>> catalog.Hyper(block=64, samples=32)
      Hyper(block=64, samples=32, bits=7, min_seq_len=4096, causal=False)
    """

    block: int = 256
    samples: int = 256
    bits: int = 7
    min_seq_len: int = 4096
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "bits", "min_seq_len"):
            at_least("Hyper", name, getattr(self, name), 1)
        at_least("Hyper", "samples", self.samples, 0)

    @property
    def blocks(self) -> Lsh:
        """The map that selects the sorted blocks."""
        chunks = sorted_chunks(self.block, before=0, across=True)
        return lsh(2**self.bits, kind="signs", chunks=chunks)


class Piece(NamedTuple):
    """A range of queries and a range of keys that are attended as one.

    ``exact`` pieces are small enough for exact attention. A piece on the diagonal of a
    causal map is exact, and causal.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    exact: bool

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Queries, keys and ``exact``: pieces of one shape are computed at once."""
        return self.q_stop - self.q_start, self.k_stop - self.k_start, self.exact


class Draws(NamedTuple):
    """The random parts: directions of the hash, and sampled keys.

    ``projections`` is ``[heads or 1, 1, head_dim, bits]``. ``samples`` has one array
    ``[batch, num_q_heads, samples]`` for each piece that is not exact: places in the
    sorted order of keys, drawn with replacement.
    """

    projections: Float[Array, "heads_or_1 1 head_dim bits"]
    samples: tuple[Int32[Array, "batch heads samples"], ...]


def pieces(how: Hyper, q_seq_len: int, kv_seq_len: int) -> tuple[Piece, ...]:
    """Splits attention into pieces: one, or those of repeated halving if causal.

    Halving leaves triangles on the diagonal and the rectangles below it. An odd length
    has the smaller half first. Where the rectangle would be exact, the halves and the
    rectangle stay one exact piece.
    """
    if not how.causal:
        exact = min(q_seq_len, kv_seq_len) < how.min_seq_len
        return (Piece(0, q_seq_len, 0, kv_seq_len, exact),)
    found = []

    def halve(start: int, stop: int) -> None:
        middle = start + (stop - start) // 2
        if middle - start < how.min_seq_len:
            found.append(Piece(start, stop, start, stop, True))
            return
        halve(start, middle)
        found.append(Piece(middle, stop, start, middle, False))
        halve(middle, stop)

    halve(0, q_seq_len)
    return tuple(found)


def draw_hyper(key: Array, q: Any, k: Any, how: Hyper | None = None) -> Draws:
    """Draws hash directions and sampled keys for ``hyper_attention``.

    Args:
      key: a PRNG key.
      q, k: as in ``hyper_attention``; only their shapes are read.
      how: the options; ``Hyper()`` if None.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> how = catalog.Hyper(block=8, samples=4, bits=3, min_seq_len=16)
      >>> x = jax.ShapeDtypeStruct((1, 32, 2, 8), "float32")
      >>> draw = lambda key: catalog.draw_hyper(key, x, x, how)
      >>> draws = jax.eval_shape(draw, jax.random.key(0))
      >>> draws.projections.shape, [s.shape for s in draws.samples]
      ((1, 1, 8, 3), [(1, 2, 4)])
    """
    how = how or Hyper()
    batch, q_seq_len, heads, head_dim = q.shape
    first, *keys = jax.random.split(key, 1 + len(pieces(how, q_seq_len, k.shape[1])))
    made = [
        jax.random.randint(each, (batch, heads, how.samples), 0, piece.shape[1])
        for each, piece in zip(keys, pieces(how, q_seq_len, k.shape[1]), strict=True)
        if not piece.exact
    ]
    return Draws(how.blocks.draw(first, 1, head_dim), tuple(made))


def hyper_attention(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    v: Float[Array, "batch kv_seq num_kv_heads head_dim_v"],
    draws: Draws,
    how: Hyper | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> (
    Float[Array, "batch q_seq num_q_heads head_dim_v"]
    | tuple[
        Float[Array, "batch q_seq num_q_heads head_dim_v"],
        Float32[Array, "batch num_q_heads q_seq"],
    ]
):
    """Attention that is exact for large entries and estimated for the rest.

    Queries and keys are each sorted by the rank of their hash signs in a Gray code, and
    cut into equally many blocks. A query attends exactly to the key block with its own
    block's number. Random keys stand for all others: one of the own block is masked
    out, any other weighs ``kv_seq_len / samples``. The normaliser is unbiased.

    Han et al., HyperAttention: long-context attention in near-linear time, 2023,
    section 3. The released code fills the last block with zero keys; here it is short.
    Not all kernels of that code mask and weigh samples; here every backend does.

    Args:
      q, k, v: as in ``sadsl.attention``.
      draws, how: ``draw_hyper(key, q, k, how)``, and the same options for it.
      return_lse, options: those of ``sadsl.attention``, but ``operands``.

    Raises:
      ValueError: ``how.causal`` with unequal lengths, or draws for other sizes.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> how = catalog.Hyper(block=8, samples=4, bits=3, min_seq_len=16)
      >>> def attend(key, q, k, v):
      ...     draws = catalog.draw_hyper(key, q, k, how)
      ...     return catalog.hyper_attention(q, k, v, draws, how)
      >>> x = jax.ShapeDtypeStruct((1, 32, 2, 8), "float32")
      >>> jax.eval_shape(attend, jax.random.key(0), x, x, x).shape
      (1, 32, 2, 8)
    """
    how = how or Hyper()
    _check(q, k, draws, how)
    groups: dict[tuple, list[tuple[Piece, Array | None]]] = defaultdict(list)
    samples = iter(draws.samples)
    for piece in pieces(how, q.shape[1], k.shape[1]):
        drawn = None if piece.exact else next(samples)
        groups[piece.shape].append((piece, drawn))
    parts = [
        _group(tuple(members), (q, k, v), (draws.projections, how), options)
        for members in groups.values()
    ]
    o, lse = reduce(merge, parts)
    o = o.astype(v.dtype)
    return (o, lse) if return_lse else o


def _group(
    members: tuple[tuple[Piece, Array | None], ...],
    arrays: tuple[Array, Array, Array],
    hashing: tuple[Array, Hyper],
    options: dict[str, Any],
) -> Part:
    """Attends to pieces of one shape as one batch, then puts them back in place."""
    found = [piece for piece, _ in members]
    q = jnp.concatenate([arrays[0][:, p.q_start : p.q_stop] for p in found])
    k, v = (
        jnp.concatenate([x[:, p.k_start : p.k_stop] for p in found]) for x in arrays[1:]
    )
    if found[0].exact:
        spec = causal() if hashing[1].causal else full()
        o, lse = _with_lse(q, k, v, spec, **options)
    else:
        drawn = jnp.concatenate([x for _, x in members if x is not None])
        o, lse = _estimated((q, k, v), drawn, hashing, options)
    outputs = jnp.split(o.astype(jnp.float32), len(found))
    length = arrays[0].shape[1]
    rows = list(zip(found, outputs, jnp.split(lse, len(found)), strict=True))
    o = _placed([(p.q_start, x) for p, x, _ in rows], 1, length, 0.0)
    return o, _placed([(p.q_start, x) for p, _, x in rows], 2, length, -jnp.inf)


def _with_lse(*arguments: Any, **options: Any) -> Part:
    o, lse = attention(*arguments, return_lse=True, **options)
    return o, lse


def _placed(
    rows: list[tuple[int, Array]], axis: int, length: int, fill: float
) -> Array:
    """Lays disjoint ranges at their starts along ``axis``, in ascending order."""
    laid: list[Array] = []
    at = 0
    ends = [*(start for start, _ in rows), length]
    for end, x in zip(ends, [*(x for _, x in rows), None], strict=True):
        like = rows[0][1]
        gap = (*like.shape[:axis], end - at, *like.shape[axis + 1 :])
        laid.append(jnp.full(gap, fill, like.dtype))
        if x is not None:
            laid.append(x)
            at = end + x.shape[axis]
    return jnp.concatenate(laid, axis=axis)


def _estimated(
    arrays: tuple[Array, Array, Array],
    samples: Int32[Array, "batch heads samples"],
    hashing: tuple[Array, Hyper],
    options: dict[str, Any],
) -> Part:
    """Attends to sorted blocks and to sampled keys, and merges the two outputs."""
    q, k, v = arrays
    projections, how = hashing
    parts = select(how.blocks, q, k, operands={"projections": projections})
    near: Part = _with_lse(q, k, v, how.blocks, operands=parts, **options)
    num_blocks = -(-k.shape[1] // how.block)
    if not how.samples or num_blocks == 1:
        return near
    keys = jnp.repeat(jnp.swapaxes(k, 1, 2), q.shape[2] // k.shape[2], axis=1)
    bucket = hashes(keys.astype(jnp.float32), projections[None], "signs")[:, :, 0]
    member = jnp.take_along_axis(by_bucket(bucket), samples, axis=-1)
    own = parts[how.blocks.key("q_chunk0")]
    other = jnp.take_along_axis(parts[how.blocks.key("k_chunk0")], member, axis=-1)
    # Tokens without a hash have a block number out of range: the test leaves them out.
    own_block, other_block = operand("own_block"), operand("sampled_block")
    spec = where(
        lambda q, k, h: (
            (own_block[h, q] != other_block[h, k])
            & (own_block[h, q] >= 0)
            & (other_block[h, k] < num_blocks)
        )
    )
    o, lse = _with_lse(
        q, _gathered(k, member), _gathered(v, member), spec,
        operands={"own_block": own, "sampled_block": other}, **options,
    )  # fmt: skip
    return merge(near, (o, lse + math.log(k.shape[1] / how.samples)))


def _gathered(
    x: Float[Array, "batch seq kv_heads dim"], index: Int32[Array, "batch heads m"]
) -> Float[Array, "batch m heads dim"]:
    """Takes rows ``index`` of the key-value head that each query head reads."""
    batch, _, kv_heads, dim = x.shape
    heads, m = index.shape[1:]
    rows = index.reshape(batch, kv_heads, -1)
    found = jnp.take_along_axis(jnp.swapaxes(x, 1, 2), rows[..., None], axis=2)
    return jnp.swapaxes(found.reshape(batch, heads, m, dim), 1, 2)


def merge(a: Part, b: Part) -> Part:
    """Merges outputs over disjoint keys, weighted by the exponentials of their lse.

    Outputs are ``[batch, seq, heads, dim]``, lse ``[batch, heads, seq]``. Rows that are
    empty in both stay 0 and -inf.
    """
    wide = [Outcome(out.astype(jnp.float32), lse) for out, lse in (a, b)]
    out, lse, _ = merging.merge(wide)
    assert lse is not None
    return out, lse


def _check(q: Array, k: Array, draws: Draws, how: Hyper) -> None:
    batch, q_seq_len, heads, _ = q.shape
    if how.causal and q_seq_len != k.shape[1]:
        raise ValueError(
            f"hyper_attention: causal=True with {q_seq_len} queries and {k.shape[1]} "
            "keys: the causal form halves one sequence; pass as many keys as queries"
        )
    count = sum(not p.exact for p in pieces(how, q_seq_len, k.shape[1]))
    shapes = [x.shape for x in draws.samples]
    if shapes != [(batch, heads, how.samples)] * count:
        raise ValueError(
            f"hyper_attention: draws.samples have the shapes {shapes}: for {how} and "
            f"these lengths there must be {count} of {(batch, heads, how.samples)}; "
            "draw_hyper(key, q, k, how) makes them"
        )
