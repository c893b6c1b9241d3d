"""Lists the greatest entries of rows, in ascending order of position.

``lax.top_k`` sorts by value, which nobody needs here, and XLA:CPU runs it on one
thread. This takes three steps, each a pass over whole rows:

1. The row is split into interleaved groups. The ``k``-th greatest of the group maxima
   is at most the ``k``-th greatest entry, so entries below it are dropped. Neighbours,
   which often score alike, lie in different groups, so few other entries are left.
2. The rest is packed to bits, and the position of the ``r``-th bit is found by a binary
   search over counts of bits: no scatter and no sort.
3. Among these few the ``k``-th greatest value is found by bracketing.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

WORD = 32
# Words that are compared one by one.
FEW = 32


def largest(
    scores: Float[Array, "rows entries"], count: int
) -> Int[Array, "rows count"]:
    """The positions of the ``count`` greatest entries of each row, ascending.

    Ties go to the lower position; 0 and -0 are equal. Entries of ``-inf`` are never
    listed. Where a row has fewer others, the number of entries fills the rest.

    Args:
      scores: float32, without NaN or ``inf``.
      count: the length of a list, at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[3.0, 1.0, 3.0, 2.0], [0.0, -jnp.inf, -jnp.inf, 5.0]])
      >>> largest(scores, 3)
      Array([[0, 2, 3],
             [0, 3, 4]], dtype=int32)
    """
    entries = scores.shape[1]
    spare = -entries % WORD
    wide = jnp.pad(scores, ((0, 0), (0, spare)), constant_values=-jnp.inf)
    found = jnp.minimum(_largest(wide, min(count, wide.shape[1])), entries)
    return jnp.pad(
        found, ((0, 0), (0, count - found.shape[1])), constant_values=entries
    )


def _largest(x: Float[Array, "rows n"], k: int) -> Int[Array, "rows k"]:
    """``largest``, for a multiple of 32 entries."""
    n = x.shape[1]
    groups = 1 << max(0, (n // (4 * k)).bit_length() - 1)
    capacity = -(-3 * k // (2 * WORD)) * WORD
    if groups < 2 or capacity >= n or n % groups:
        return _bracketed(x, k)
    maxima = x.reshape(x.shape[0], groups, n // groups).max(axis=1)
    least = _kth(maxima, k, k + k // 16)[:, None]
    candidates = pack((x >= least) & (x > -jnp.inf))
    few = _all_held(candidates, capacity)
    # Where many entries equal `least`, such as zeros of relu, the first of them do.
    candidates = jax.lax.cond(
        few, lambda: candidates, lambda: _first_of(x, least, capacity)
    )

    def among_few() -> Int[Array, "rows k"]:
        at = first_set(candidates, capacity)
        values = jnp.where(at < n, _take(x, jnp.minimum(at, n - 1)), -jnp.inf)
        chosen = _bracketed(values, k)
        found = _take(at, jnp.minimum(chosen, capacity - 1))
        return jnp.where(chosen < capacity, found, n)

    few = _all_held(candidates, capacity)
    return jax.lax.cond(few, among_few, lambda: _bracketed(x, k))


def _all_held(words: UInt32[Array, "rows words"], capacity: int) -> Bool[Array, ""]:
    return jnp.all(jnp.sum(_bits(words), axis=1) <= capacity)


def _bracketed(x: Float[Array, "rows n"], k: int) -> Int[Array, "rows k"]:
    """The positions of the ``k`` greatest, by the value of the ``k``-th."""
    return first_set(_first_of(x, _kth(x, k)[:, None], k), k)


def _first_of(
    x: Float[Array, "rows n"], least: Float[Array, "rows 1"], count: int
) -> UInt32[Array, "rows words"]:
    """The entries above ``least``, and the first that equal it, up to ``count``."""
    real = x > -jnp.inf
    above, equal = (x > least) & real, (x == least) & real
    last = set_bits(pack(equal), count - 1 - _count(above)[:, None])
    return pack(above | (equal & (_places(x) <= last)))


def _kth(
    x: Float[Array, "rows n"], k: int, most: int | None = None
) -> Float[Array, " rows"]:
    """The ``k``-th greatest entry of each row; the least one where fewer are real.

    With ``most``, any entry that ``k`` to ``most`` entries equal or exceed.

    It brackets the value from both ends. A guess is interpolated by the logarithms of
    the counts, and every third one halves the ordered integers, so that it ends for
    every input. Counts include ties: the result ``t`` has at least ``k`` entries of
    ``t`` or more, and no greater value of the row has.
    """
    real = x > -jnp.inf
    some = _count(real)
    low = _ordered(jnp.min(jnp.where(real, x, jnp.inf), axis=1))
    high = _ordered(jnp.max(x, axis=1)) + 1
    start = (
        jnp.int32(0),
        low,
        jnp.maximum(some, k),
        high,
        jnp.zeros_like(some),
    )

    most = most or k
    aim = (k * most) ** 0.5

    def is_open(low: Array, at_low: Array, high: Array) -> Array:
        return (at_low > most) & (high > low + 1)

    def goes_on(state: tuple) -> Array:
        _, low, at_low, high, _ = state
        return jnp.any(is_open(low, at_low, high))

    def step(state: tuple) -> tuple:
        i, low, at_low, high, at_high = state
        guess = _between(low, at_low, high, at_high, aim)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        at = jnp.where(i % 3 == 2, middle, guess)
        # Scores of relu tie at 0: is the entry above 0, or else 0?
        at = jnp.where(i // 2 == 2, jnp.int32(5) - i, at)
        at = jnp.clip(at, low + 1, high - 1)
        count = _count(x >= _unordered(at)[:, None])
        still = is_open(low, at_low, high)
        up, down = still & (count >= k), still & (count < k)
        low, at_low = jnp.where(up, at, low), jnp.where(up, count, at_low)
        high, at_high = jnp.where(down, at, high), jnp.where(down, count, at_high)
        return i + 1, low, at_low, high, at_high

    return _unordered(jax.lax.while_loop(goes_on, step, start)[1])


def _between(
    low: Array, at_low: Array, high: Array, at_high: Array, aim: float
) -> Array:
    """Guesses where the count is ``aim``, as if log counts fell on a line."""
    more = jnp.log(at_low.astype(jnp.float32))
    fewer = jnp.log(jnp.maximum(at_high.astype(jnp.float32), 0.5))
    share = (more - math.log(aim)) / jnp.maximum(more - fewer, 1e-6)
    start, stop = _unordered(low), _unordered(high)
    return _ordered(start + (stop - start) * jnp.clip(share, 0.02, 0.98))


def _ordered(x: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """Float32 as integers of the same order; -0 becomes 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(x: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """The inverse of ``_ordered``."""
    bits = jnp.where(x < 0, x ^ 0x7FFFFFFF, x)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def pack(mask: Bool[Array, "rows n"]) -> UInt32[Array, "rows words"]:
    """The bits of rows of a multiple of 32 entries: bit ``i`` of a word is entry ``i``.

    Example:
      >>> import jax.numpy as jnp
      >>> pack(jnp.arange(64)[None] % 33 == 0).tolist()
      [[1, 2]]
    """
    place = jnp.arange(WORD, dtype=jnp.uint32)
    words = mask.reshape(mask.shape[0], -1, WORD).astype(jnp.uint32)
    words = words << place[None, None]
    return jnp.sum(words, axis=2, dtype=jnp.uint32)


def first_set(
    words: UInt32[Array, "rows words"], count: int
) -> Int[Array, "rows count"]:
    """The positions of the first ``count`` set bits of each row, ascending.

    Where fewer are set, the rest holds the number of all positions.

    Example:
      >>> import jax.numpy as jnp
      >>> first_set(jnp.array([[1, 2]], jnp.uint32), 2).tolist()
      [[0, 33]]
    """
    return set_bits(words, jnp.arange(count, dtype=jnp.int32)[None])


def set_bits(
    words: UInt32[Array, "rows words"], rank: Int[Array, "#rows ranks"]
) -> Int[Array, "rows ranks"]:
    """The position of the bit that has ``rank`` set bits before it.

    The number of all positions where there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> set_bits(jnp.array([[1, 6]], jnp.uint32), jnp.array([[2, 0]])).tolist()
      [[34, 0]]
    """
    number, total = words.shape[1], words.shape[1] * WORD
    # Blocks of words are compared one by one, the words of a block by halves. Both sums
    # are products: XLA:CPU adds up long rows slowly, and repeats what it can fuse.
    block = 1 << (number.bit_length() // 2 if number > FEW else 0)
    words = jnp.pad(words, ((0, 0), (0, -number % block)))
    count = _bits(words).astype(jnp.float32)
    ends = jnp.matmul(count, _up_to_blocks(words.shape[1], block)).astype(jnp.int32)
    whole = jnp.sum(ends[:, None] <= rank[:, :, None], axis=2, dtype=jnp.int32)
    first = jnp.where(whole > 0, _take(ends, jnp.maximum(whole - 1, 0)), 0)
    word, before = block * whole, first
    held = jnp.matmul(count.reshape(-1, block), jnp.triu(jnp.ones((block, block))))
    held = held.reshape(words.shape).astype(jnp.int32)
    for step in _halves(block):
        # The words before `ahead` hold at most `rank` bits: the bit lies further on.
        ahead = word + step
        seen = first + _take(held, jnp.minimum(ahead, held.shape[1]) - 1)
        on = seen <= rank
        word, before = jnp.where(on, ahead, word), jnp.where(on, seen, before)
    word = jnp.minimum(word, number - 1)
    left = rank - before
    bits, bit = _take(words, word), jnp.zeros_like(word)
    for half in _halves(WORD):
        low = (bits >> bit.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
        below = _bits(low)
        past = left >= below
        left = jnp.where(past, left - below, left)
        bit = jnp.where(past, bit + half, bit)
    return jnp.where(rank < ends[:, -1:], word * WORD + bit, total)


def _bits(words: UInt32[Array, "rows n"]) -> Int[Array, "rows n"]:
    """The set bits of each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def _count(mask: Bool[Array, "rows n"]) -> Int[Array, " rows"]:
    """The set entries of each row.

    XLA:CPU adds floats twice as fast as integers; they are exact up to 2**24.
    """
    return jnp.sum(mask.astype(jnp.float32), axis=1).astype(jnp.int32)


def _up_to_blocks(words: int, block: int) -> Float[Array, "words blocks"]:
    """Which words lie in a block of words or before it."""
    block_of = jnp.arange(words, dtype=jnp.int32) // block
    ends = jnp.arange(words // block, dtype=jnp.int32)
    return (block_of[:, None] <= ends[None]).astype(jnp.float32)


def _take(x: Array, at: Int[Array, "rows places"]) -> Array:
    """``x`` at places within its rows: no check of bounds, which doubles the time."""
    return jnp.take_along_axis(x, at, axis=1, mode="promise_in_bounds")


def _halves(size: int) -> list[int]:
    """``size / 2``, ``size / 4``, ..., 1."""
    return [1 << i for i in reversed(range(size.bit_length() - 1))]


def _places(x: Array) -> Int[Array, "1 entries"]:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
