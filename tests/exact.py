"""Evaluates a predicate pair by pair, in Python's unbounded integers."""

import numpy as np

from lowering import ir


def pairs(node, q_len, kv_len, operands, head=0):
    """The pairs, bools ``[q_len, kv_len]``.

    Operands have no batch axis, and heads are resolved.
    """
    rows = [[_truth(node, q, k, head, operands) for k in range(kv_len)]
            for q in range(q_len)]  # fmt: skip
    return np.array(rows, bool)


def integers(node, q_len, kv_len, operands, head=0):
    """The values of an expression at every pair, as Python integers."""
    rows = [[_integer(node, q, k, head, operands) for k in range(kv_len)]
            for q in range(q_len)]  # fmt: skip
    return np.array(rows, object)


def _integer(node, *at):
    q, k, h, operands = at
    match node:
        case ir.Var(axis):
            return {"q": q, "k": k, "h": h}[axis]
        case ir.Const(value):
            return value
        case ir.Add(a, b):
            return _integer(a, *at) + _integer(b, *at)
        case ir.Mul(a, n):
            return _integer(a, *at) * n
        case ir.FloorDiv(a, n):
            return _integer(a, *at) // n
        case ir.Mod(a, n):
            return _integer(a, *at) % n
        case ir.Min(a, b):
            return min(_integer(a, *at), _integer(b, *at))
        case ir.Max(a, b):
            return max(_integer(a, *at), _integer(b, *at))
        case ir.Log2(a):
            return max(_integer(a, *at), 1).bit_length() - 1
        case ir.Table(values, index):
            return values[_integer(index, *at)]
        case ir.Operand(name, index):
            return int(operands[name][tuple(_integer(i, *at) for i in index)])
    raise AssertionError(node)


def _truth(node, *at):
    match node:
        case ir.Bool(value):
            return value
        case ir.Le(a, b):
            return _integer(a, *at) <= _integer(b, *at)
        case ir.Eq(a, b):
            return _integer(a, *at) == _integer(b, *at)
        case ir.In(a, values):
            return _integer(a, *at) in values
        case ir.PowerOfTwo(a):
            x = _integer(a, *at)
            return x > 0 and x & (x - 1) == 0
        case ir.And(terms):
            return all(_truth(term, *at) for term in terms)
        case ir.Or(terms):
            return any(_truth(term, *at) for term in terms)
        case ir.Not(term):
            return not _truth(term, *at)
    raise AssertionError(node)
