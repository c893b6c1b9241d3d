"""Nodes and tables are equal by content, whatever they remember of their hash."""

import pickle
from dataclasses import replace

from lowering import ir


def test_equal_nodes_have_one_hash():
    made = [ir.Add(ir.Q, ir.Mul(ir.K, 3)) for _ in range(2)]
    assert made[0] is not made[1]
    assert made[0] == made[1]
    assert hash(made[0]) == hash(made[1])
    assert len({*made, replace(made[0], right=ir.K)}) == 2


def test_a_node_that_was_hashed_can_be_pickled_and_replaced():
    node = ir.Le(ir.Table((1, 2, 3), ir.Q), ir.Const(2))
    hash(node)
    again = pickle.loads(pickle.dumps(node))
    assert again == node
    assert hash(again) == hash(node)
    other = replace(node, right=ir.Const(3))
    assert hash(other) == hash(ir.Le(ir.Table((1, 2, 3), ir.Q), ir.Const(3)))


def test_entries_are_a_tuple_that_other_tables_share():
    entries = ir.TableEntries((3, 1, 2))
    assert entries == (3, 1, 2)
    assert hash(entries) == hash((3, 1, 2))
    assert repr(entries) == "(3, 1, 2)"
    assert ir.Table(entries, ir.Q).values is entries
    assert pickle.loads(pickle.dumps(entries)) == entries
