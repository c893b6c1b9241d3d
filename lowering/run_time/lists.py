"""Decides between two forms of a choice: a bit for each pair, or a list for each row.

Kernels of blocks visit every block in which some query has a key. If each query chooses
single keys, neighbours choose differently, and all blocks are visited. By list, the
work follows the number of chosen keys, but each row gathers its keys for itself. What
pays is decided by counts.
"""

from typing import NamedTuple

import numpy as np

from lowering import ir, pipeline
from lowering.problem import Problem

# The block size in which the pairs of the other form are counted.
BLOCK = 128


class ListCost(NamedTuple):
    """The cost of lists on a backend, in pairs of one query head of a block kernel.

    A listed key costs ``key`` for its gather (and the scatter of its gradient) and
    ``pair`` for each query head that is in the product.
    """

    key: float
    pair: float


# xla: fitted on a Xeon of 2.5 GHz with 2 cores, with the choice and a backward pass.
# Lists took 0.96 of the time of bits for 8 heads on one key head with n / k of 8, 0.77
# with 16, and 0.75 for 4 heads on 4 with 32.
# triton: not measured; the gather of a key from L2 costs about as much as 16 pairs.
COSTS = {"xla": ListCost(10.0, 3.0), "triton": ListCost(16.0, 2.0)}


class ListCounts(NamedTuple):
    """What the two forms of a call visit, over all heads of one batch entry."""

    listed: int  # keys in all lists, once for each key head that reads them
    listed_pairs: int  # the same for each query head
    visited: int  # pairs in the blocks that bits visit
    rest: int  # pairs in the blocks that are visited beside lists

    def by_list(self, backend: str) -> float:
        """The cost of lists, in pairs of a block kernel."""
        cost = COSTS[backend]
        return self.listed * cost.key + self.listed_pairs * cost.pair + self.rest

    def pays(self, backend: str) -> bool:
        """Whether lists cost less than bits."""
        return backend in COSTS and self.by_list(backend) < self.visited


def visited_pairs(node: ir.Pred, problem: Problem) -> int:
    """The pairs in the blocks that the plan of a static map visits, over all heads."""
    stages = pipeline.run(node, problem)
    mask = pipeline.block_mask(stages, BLOCK, BLOCK, "q")
    length = np.asarray(mask.run_stop) - np.asarray(mask.run_start)
    total = np.concatenate([[0], np.cumsum(length)])
    rows = np.diff(total[np.asarray(mask.row_ptr)]).reshape(mask.num_maps, -1)
    heads = np.bincount(mask.map_of_head, minlength=mask.num_maps)
    return int((rows.sum(axis=1) * heads).sum()) * BLOCK * BLOCK


def is_positive(node: ir.Pred, name: str) -> bool:
    """Whether more pairs of the array ``name`` can only add pairs to the map.

    The array is read in comparisons that hold where it is true.
    """
    match node:
        case ir.And(terms) | ir.Or(terms) | ir.ByHead(terms):
            return all(is_positive(term, name) for term in terms)
        case ir.Not(term):
            return name not in ir.operand_names(term)
    return True
