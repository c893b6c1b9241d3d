"""Hypothesis strategies: random maps from all primitives and every combinator."""

from functools import cache

import numpy as np
from hypothesis import strategies as st

from lowering import ir
from sadsl.maps import base, named
from sadsl.maps.symbols import (
    Symbol,
    floor_log2,
    isin,
    maximum,
    minimum,
    operand,
    power_of_two,
    table,
)

SIZES = st.sampled_from([1, 2, 7, 13, 16, 31, 48, 64, 65, 97, 130])
BLOCKS = st.sampled_from([1, 3, 8, 16, 32, 40, 128])

small = st.integers(0, 40)
positive = st.integers(1, 24)
offset = st.integers(-30, 30)


@cache
def named_maps():
    """Every named map that needs no operand."""
    ranges = st.tuples(small, small).map(sorted)
    return st.one_of(
        st.just(named.full()),
        st.just(named.causal()),
        st.builds(named.window, small, small),
        st.builds(named.window, small),
        st.builds(named.sinks, small),
        ranges.map(lambda ab: named.keys(*ab)),
        ranges.map(lambda ab: named.queries(*ab)),
        st.builds(named.strided, positive),
        st.builds(named.dilated, st.integers(0, 5), st.integers(0, 5), positive),
        st.builds(named.blocks, positive),
        st.builds(named.offsets, st.sets(offset, max_size=4)),
    )


VARS = [Symbol(ir.Q), Symbol(ir.K)]


def combined(inner, with_number, factors, divisors, values):
    """Applies one more operation to expressions: any that maps may be written with.

    ``with_number`` is a sum or difference with a constant. ``factors`` are what
    expressions are multiplied by, ``divisors`` what they are divided by, ``values``
    what tables hold.
    """

    def look_up(x, values):
        return table(values)[x % len(values)]

    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        with_number,
        st.builds(lambda a, n: a * n, inner, factors),
        st.builds(lambda a, n: a // n, inner, divisors),
        st.builds(lambda a, n: a % n, inner, divisors),
        st.builds(minimum, inner, inner),
        st.builds(maximum, inner, inner),
        st.builds(abs, inner),
        st.builds(floor_log2, inner),
        st.builds(look_up, inner, values),
    )


@cache
def integers():
    """Quasi-affine expressions of q and k."""
    leaf = st.one_of(st.sampled_from(VARS), st.sampled_from([v + 1 for v in VARS]))

    def extend(inner):
        reflected = st.builds(lambda a, n: n - a, inner, offset)
        values = st.lists(offset, min_size=1, max_size=5)
        numbers = st.integers(-3, 3), positive, values
        return combined(inner, reflected, *numbers)

    return st.recursive(leaf, extend, max_leaves=4)


@cache
def wheres():
    """Traced maps with one or two comparisons."""

    def compare(a, b, n, op):
        comparisons = {
            "<=": lambda: a <= b,
            "<": lambda: a < b,
            ">=": lambda: a >= n,
            ">": lambda: a > n,
            "==": lambda: a == b,
            "!=": lambda: a != n,
            "in": lambda: isin(a, {n, n + 2, n + 3}),
            "power": lambda: power_of_two(a + n),
        }
        return comparisons[op]()

    ops = st.sampled_from(["<=", "<", ">=", ">", "==", "!=", "in", "power"])
    atom = st.builds(compare, integers(), integers(), offset, ops)
    truth = st.one_of(atom, st.builds(lambda a, b: a & ~b, atom, atom))
    return truth.map(lambda t: named.Where(t.node))


# Length of permutations: at least as long as any sequence below.
POSITIONS = 130


def permutations():
    """Permutations, drawn by their seed: far quicker than drawing their entries."""
    seeds = st.integers(0, 1000)
    return seeds.map(lambda s: np.random.default_rng(s).permutation(POSITIONS))


@cache
def composed(max_leaves: int = 8):
    """Maps of up to ``POSITIONS`` positions, composed to depth 5."""
    leaf = st.one_of(named_maps(), named_maps(), wheres())

    def extend(inner):
        return st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, b: a - b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(lambda a: a.T, inner),
            st.builds(lambda a, b: a.lift(b), inner, st.integers(1, 9)),
            st.builds(lambda a, o: a.permute(o), inner, permutations()),
        )

    return st.recursive(leaf, extend, max_leaves=max_leaves)


@cache
def with_heads():
    """A composed map, or a choice of several by head."""
    several = st.lists(composed(3), min_size=2, max_size=3)
    return st.one_of(composed(), several.map(lambda found: base.per_head(*found)))


# Around these numbers expressions leave 32 bits.
EDGES = (0, 2**15, 2**26, 2**30, 2**31, 2**32, 2**40)
extreme = st.builds(
    lambda edge, sign, near: sign * edge + near,
    st.sampled_from(EDGES), st.sampled_from([1, -1]), st.integers(-6, 6),
)  # fmt: skip
factors = st.sampled_from([1, -1, 2, -3, 2**16, 2**26, -(2**26), 2**31])
divisors = st.sampled_from([1, 2, 3, 5, 64, 1000, 2**20, 2**31 - 1, 2**40 + 1])
# Run-time arrays: two over queries, two over keys, and one number.
ARRAYS = {"a": "q", "b": "k", "c": "q", "d": "k", "s": ""}


def int32_arrays(length: int):
    """Values for each of ``ARRAYS``: any int32, and often the ends of int32."""
    value = st.one_of(
        st.sampled_from([-(2**31), -(2**31) + 1, 2**31 - 1, 2**31 - 2]),
        st.integers(-5, length + 5),
        st.integers(-(2**31), 2**31 - 1),
    )

    def array(of):
        if not of:
            return value.map(np.int32)
        values = st.lists(value, min_size=length, max_size=length)
        return values.map(lambda found: np.array(found, np.int32))

    return st.fixed_dictionaries({name: array(of) for name, of in ARRAYS.items()})


@cache
def extreme_integers(arrays: bool = True):
    """Expressions of run-time arrays and positions whose values leave 32 bits."""
    q, k = VARS
    at = {"q": q, "k": k}
    look_ups = [
        operand(n)[at[of]] if of else operand(n) + 0 for n, of in ARRAYS.items()
    ]
    leaf = st.sampled_from([*VARS, *look_ups] if arrays else VARS)

    def extend(inner):
        shifted = st.builds(lambda a, n: a + n, inner, extreme)
        values = st.lists(extreme, min_size=1, max_size=4)
        return combined(inner, shifted, factors, divisors, values)

    return st.recursive(leaf, extend, max_leaves=4)


@cache
def extreme_wheres(arrays: bool = True):
    """Traced maps of such expressions, compared with each other and with constants."""
    inner = extreme_integers(arrays)
    atom = st.one_of(
        st.builds(lambda a, b: a <= b, inner, inner),
        st.builds(lambda a, b: a < b, inner, inner),
        st.builds(lambda a, b: a == b, inner, inner),
        st.builds(lambda a, n: a > n, inner, extreme),
        st.builds(lambda a, n: a != n, inner, extreme),
        st.builds(isin, inner, st.sets(extreme, max_size=4)),
        st.builds(power_of_two, inner),
    )
    truth = st.one_of(atom, st.builds(lambda a, b: a | ~b, atom, atom))
    return truth.map(lambda t: named.Where(t.node))
