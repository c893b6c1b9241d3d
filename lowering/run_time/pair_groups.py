"""Finds the groups of queries and of keys that no index of a comparison tells apart.

The pairs of such groups have equal bits, which are computed and stored once. Groups
follow from the index expressions alone, not from the content of arrays.
"""

import math
from typing import NamedTuple

import numpy as np

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from pallas_kernels.call import WORD


def queries_per_word(pred: ir.Pred, q_seq_len: int, blocks_q: tuple[int, ...]) -> int:
    """The most neighbouring queries, in equal groups, that no index distinguishes.

    It divides each of ``blocks_q`` or is a multiple of it.
    """
    q = np.arange(q_seq_len)
    at = NumPy(q, np.zeros_like(q))
    found = [np.broadcast_to(evaluate(e, at), q.shape) for e in _outermost(pred, "q")]
    changes = [np.flatnonzero(np.diff(x)) + 1 for x in found]
    shared = int(np.gcd.reduce(np.concatenate([np.zeros(0, int), *changes])))
    shared = shared or 1 << (q_seq_len - 1).bit_length()
    if all(shared % block == 0 or block % shared == 0 for block in blocks_q):
        return shared
    return math.gcd(shared, *blocks_q)


class KeyGroups(NamedTuple):
    """Groups of keys that no index distinguishes, numbered from 0 in each plane.

    A plane is some consecutive blocks of keys that share words of bits.
    """

    group: np.ndarray  # int32 [kv_seq_len]
    member: np.ndarray  # [planes, most groups]: a key of each group, padded by repeats
    blocks: int  # key blocks in a plane


def key_groups(pred: ir.Pred, kv_seq_len: int, block_kv: int) -> KeyGroups:
    """The groups, with as many blocks in a plane as fit one word, at least one."""
    k = np.arange(kv_seq_len)
    at = NumPy(np.zeros_like(k), k)
    reads = _outermost(pred, "k")
    values = [np.broadcast_to(evaluate(node, at), k.shape) for node in reads]
    best = _grouped(k // block_kv, values, 1)
    while best.blocks * block_kv < kv_seq_len:
        wider = _grouped(k // block_kv, values, 2 * best.blocks)
        if wider.member.shape[1] > WORD:
            break
        best = wider
    return best


def _grouped(block: np.ndarray, values: list[np.ndarray], blocks: int) -> KeyGroups:
    columns = np.stack([block // blocks, *values])
    found = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    # Numbers the groups by their first key, and so plane by plane.
    order = np.argsort(found[1])
    key, label = found[1][order], np.argsort(order)[found[2].reshape(-1)]
    plane = columns[0][key]
    start = np.searchsorted(plane, np.arange(columns[0][-1] + 1))
    group = label - start[columns[0]]
    member = np.repeat(key[start][:, None], group.max() + 1, axis=1)
    member[plane, np.arange(len(key)) - start[plane]] = key
    return KeyGroups(group.astype(np.int32), member, blocks)


def keys_per_group(groups: KeyGroups, block_kv: int) -> int | None:
    """The keys of a group if all groups have as many, in the order of keys."""
    key = np.arange(len(groups.group)) % (block_kv * groups.blocks)
    # The keys before the first that is not of group 0.
    others = np.flatnonzero(groups.group[: block_kv * groups.blocks])
    size = int(others[0]) if len(others) else block_kv * groups.blocks
    return size if np.array_equal(groups.group, key // size) else None


def _outermost(node: ir.Node, axis: ir.Side) -> list[ir.Expr]:
    """The largest expressions that depend on nothing but the position on one side."""
    plain = isinstance(node, ir.Expr) and not ir.operand_names(node)
    if plain and ir.axes(node) == {axis}:
        return [node]
    children = ir.children(node)
    return [found for child in children for found in _outermost(child, axis)]
