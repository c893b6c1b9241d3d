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
    rows = []
    for q in range(num_blocks):
        before = np.arange(num_global, max(num_global, q - side))
        after = np.arange(max(num_global, q + side + 1), num_blocks)
        others = np.concatenate([before, after])
        drawn = rng.permutation(others)[:num_random].tolist()
        rows.append(drawn + [q] * (num_random - len(drawn)))
    return list(zip(*rows, strict=True))


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
       [1 1 1 0 0 0 0 1]
       [1 1 1 1 1 0 0 0]
       [1 1 1 1 1 0 0 0]
       [1 0 0 1 1 1 1 0]
       [1 0 0 1 1 1 1 0]
       [1 1 0 0 0 1 1 1]
       [1 0 0 0 0 1 1 1]]
    """
    side = num_window // 2
    drawn = random_blocks(num_blocks, side, num_global, num_random, seed)
    spec = window(side, side) | sinks(num_global) | sinks(num_global).T
    return reduce(or_, map(_looked_up, drawn), spec).lift(block)


def _looked_up(blocks: tuple[int, ...]) -> IndexMap:
    of = table(blocks)
    return where(lambda q, k: of[q] == k)
