"""Splits a softmax by heads where their maps want different orders of positions.

A call moves the positions of all of its heads alike. Rows and columns of a grid, a
window and strides, or dilations of 1, 2 and 4 are each dense in an order of their own:
then each range of heads is a call of its own, whose map has its own order and plan.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from lowering.expr import heads
from lowering.order import relayout
from lowering.order.judge import Maps
from pallas_kernels.config import Tile
from sadsl.maps.symbols import Truth
from sadsl.maps.traced_map import traced_map
from sadsl.run.kernels import choose_tiles
from sadsl.run.options import Options
from sadsl.run.types import QKV
from sadsl.terms.softmax import Softmax


class HeadRange(NamedTuple):
    """Neighbouring heads ``first .. stop - 1``, and their term, without heads."""

    first: int
    stop: int
    term: Softmax

    def of(self, inputs: QKV) -> QKV:
        """The arrays of these heads, ``[batch, seq, heads, dim]`` each."""
        q, *others = inputs
        group = q.shape[2] // others[0].shape[2]
        k, v = (x[:, :, self.first // group : self.stop // group] for x in others)
        return q[:, :, self.first : self.stop], k, v


def ranges(options: Options, inputs: QKV) -> tuple[HeadRange, ...]:
    """The ranges of heads that the call is split into; empty if it stays one call.

    A call stays one if its map reads run-time arrays, or if it has a bias, dropout or
    selections, whose arrays and seeds count the heads of the whole call.
    """
    q, k, v = inputs
    setting = options.setting
    if options.problem.num_heads == 1 or setting.impl == "reference":
        return ()
    if options.keeps_order or options.selections or setting.dropout_rate:
        return ()
    if options.read or options.stages["hoist"].bits:
        return ()
    tiles = choose_tiles(options, q.shape[-1], v.shape[-1], q.dtype)
    return _ranges(options, tiles.forward, q.shape[2] // k.shape[2])


@lru_cache(maxsize=512)
def _ranges(options: Options, tile: Tile, unit: int) -> tuple[HeadRange, ...]:
    program = options.stages["simplify"]
    maps = Maps(program.maps, program.map_of_head)
    found = relayout.apart(maps, program.sizes_in(tile.block_q, tile.block_kv), unit)
    if len(found) == 1:
        return ()
    # Not those of the program: a part shifts its queries itself.
    nodes = heads.per_head(options.term.map.node, options.problem.num_heads)

    def term(head: int) -> Softmax:
        return replace(options.term, map=traced_map(Truth(nodes[head])))

    return tuple(HeadRange(r.start, r.stop, term(r.start)) for r in found)
