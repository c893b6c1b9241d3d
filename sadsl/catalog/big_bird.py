"""Big Bird: a window, global tokens and random blocks."""

from functools import reduce
from operator import or_

import numpy as np

from sadsl.maps.base import IndexMap
from sadsl.maps.named import sinks, where, window
from sadsl.maps.symbols import table


def random_blocks(
    num_blocks: int, side: int, num_global: int, num_random: int, seed: int
) -> list[tuple[int, ...]]:
    """Draws ``num_random`` key blocks for each query block.

    Each block is drawn without repetition from the blocks that are neither global nor
    within ``side``. A query block with too few of these repeats itself instead.

    Returns:
      ``num_random`` tables, each with one key block for each query block.
    """
    rng = np.random.default_rng(seed)
    q = np.arange(num_blocks)
    before = np.maximum(q - side - num_global, 0)
    count = before + np.maximum(num_blocks - np.maximum(num_global, q + side + 1), 0)
    # Which of the other blocks: rows with a repetition are drawn again.
    drawn = np.zeros((num_blocks, num_random), np.int64)
    left = np.flatnonzero(count >= 2 * num_random)
    while len(left):
        drawn[left] = rng.integers(0, count[left, None], (len(left), num_random))
        ordered = np.sort(drawn[left], axis=1)
        left = left[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    after = np.maximum(num_global, q + side + 1) - before
    blocks = np.where(drawn < before[:, None], num_global, after[:, None]) + drawn
    for i in np.flatnonzero(count < 2 * num_random):
        others = np.arange(num_global, num_blocks)
        few = rng.permutation(others[np.abs(others - i) > side])[:num_random]
        blocks[i] = np.pad(few, (0, num_random - len(few)), constant_values=i)
    return [tuple(column) for column in blocks.T.tolist()]


def big_bird(
    num_blocks: int,
    block: int = 64,
    *,
    num_window: int = 3,
    num_global: int = 2,
    num_random: int = 3,
    seed: int = 0,
) -> IndexMap:
    """Each block sees its nearest blocks, the first (global) blocks, and random blocks.

    Zaheer et al., Big Bird: transformers for longer sequences, 2020, section 2 and
    appendix D (internal transformer construction; the defaults are those of its base
    model). Global blocks see everything and are seen by all. In the released code the
    global blocks are the first and the last.

    Args:
      num_blocks: blocks in the sequence, whose length is ``num_blocks * block``.
      block: tokens in a block.
      num_window: nearest blocks, the own one included.
      num_global: first blocks that are global.
      num_random: random key blocks for each query block; the same for all heads.
      seed: of the random blocks.

    Example:
      >>> from sadsl import catalog
      >>> spec = catalog.big_bird(8, 1, num_global=1, num_random=1)
      >>> print(spec.dense(8)[0].astype(int))
      [[1 1 1 1 1 1 1 1]
       [1 1 1 0 0 0 1 0]
       [1 1 1 1 0 0 1 0]
       [1 0 1 1 1 1 0 0]
       [1 0 1 1 1 1 0 0]
       [1 1 0 0 1 1 1 0]
       [1 1 0 0 0 1 1 1]
       [1 1 0 0 0 0 1 1]]
    """
    side = num_window // 2
    drawn = random_blocks(num_blocks, side, num_global, num_random, seed)
    spec = window(side, side) | sinks(num_global) | sinks(num_global).T
    return reduce(or_, map(_looked_up, drawn), spec).lift(block)


def _looked_up(blocks: tuple[int, ...]) -> IndexMap:
    of = table(blocks)
    return where(lambda q, k: of[q] == k)
