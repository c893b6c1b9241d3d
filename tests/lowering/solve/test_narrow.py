"""Integers beyond 32 bits: backends, reference and plans agree with Python's integers.

The oracle (``exact``) computes each pair in Python's integers.
"""

import functools

import exact
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, assume, given, settings
from laws import few

from lowering import ir, pipeline
from lowering.expr import fits
from lowering.expr.kernel_test import KernelPredicate
from lowering.expr.printing import show
from lowering.expr.simplify import simplify
from lowering.run_time import pair_bits, plans
from lowering.run_time.vectors import vectors_of
from lowering.solve import narrow
from pallas_kernels.block_mask import EMPTY, FULL, expand
from pallas_kernels.call import WORD, Vectors
from sadsl.run import reference

N = 13
BLOCKS = 4, 8
LOW, HIGH = -(2**31), 2**31 - 1
quiet = functools.partial(
    settings, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def lowered(node):
    """The stages; maps with a part beyond 64 bits are refused, and are not for here."""
    assume(fits.within(simplify(node), (-(2**61), 2**61), fits.known_of(N, N)))
    return pipeline.run(node, pipeline.Problem(N, N))


def with_batch(values):
    return {name: jnp.asarray(x)[None] for name, x in values.items()}


def vectors_in(stages, arrays):
    program = stages["hoist"]
    return Vectors(
        vectors_of(program.q_vectors, N, 1, arrays),
        vectors_of(program.kv_vectors, N, 1, arrays),
        pair_bits.pack(program.bits, (N, N), BLOCKS[1], 1, arrays, BLOCKS[:1]),
    )


def unpacked(packed):
    """The bits of all pairs, bool ``[q, k]``."""
    words, k = np.asarray(packed.words)[0, 0], np.arange(N)
    block = k // packed.block_kv
    bit = np.asarray(packed.bit)
    if packed.diagonal:
        last = -(-N // packed.block_kv) - 1
        at = np.arange(N)[:, None] + (last - block) * packed.block_kv
        found = words[0, bit // WORD, at]
    else:
        words = np.repeat(words, packed.queries_per_word, axis=-1)[..., :N]
        found = words[block // packed.blocks_per_plane, bit // WORD, :].T
    return (found >> (bit % WORD)) & 1 != 0


def in_kernel(stages, vectors):
    """What the test of a kernel says of all pairs."""
    q, k = (jnp.arange(N, dtype=jnp.int32).reshape(s) for s in ((-1, 1), (1, -1)))
    found = KernelPredicate(stages["hoist"].maps)(
        0, q, k,
        tuple(x[0, 0][:, None] for x in vectors.q),
        tuple(x[0, 0][None, :] for x in vectors.kv),
        tuple(jnp.asarray(unpacked(x)) for x in vectors.bits),
    )  # fmt: skip
    return np.broadcast_to(found, (N, N))


def kinds(mask):
    """The kind of each pair's block."""
    count = int(mask.row_ptr[-1])
    for name in ("row_ptr", "run_start", "run_stop", "run_full"):
        x = np.asarray(getattr(mask, name))
        object.__setattr__(mask, name, x if name == "row_ptr" else x[:count])
    return np.kron(expand(mask)[0], np.ones(BLOCKS, np.int8))[:N, :N]


def assert_holds(node, values):
    expected = exact.pairs(node, N, N, values)
    stages, arrays = lowered(node), with_batch(values)
    dense = np.asarray(reference.pairs((node,), N, N, arrays))[0, 0]
    np.testing.assert_array_equal(dense, expected, "reference")
    vectors = vectors_in(stages, arrays)
    assert all(x.dtype == jnp.int32 for x in (*vectors.q, *vectors.kv))
    found = in_kernel(stages, vectors)
    np.testing.assert_array_equal(found, expected, str(stages))
    if plans.is_run_time(stages):
        cell = kinds(plans.plan(stages, *BLOCKS, vectors, "q"))
    else:
        cell = kinds(pipeline.block_mask(stages, *BLOCKS))
    assert not np.any((cell == EMPTY) & expected), stages
    assert not np.any((cell == FULL) & ~expected), stages


def operands_of(node, values):
    return {name: values[name] for name in ir.operand_names(node)}


def assert_narrow(node, values):
    """The rewritten predicate is equal, and its numbers are where they should be."""
    stages = lowered(node)
    known = fits.known_of(N, N)
    (simple,) = stages["simplify"].maps
    found = narrow.narrow(simple, known)
    expected = exact.pairs(node, N, N, values)
    np.testing.assert_array_equal(exact.pairs(simple, N, N, values), expected)
    np.testing.assert_array_equal(
        exact.pairs(found, N, N, values), expected, show(found)
    )
    for part in set(ir.walk(found)):
        if isinstance(part, ir.Expr):
            low, high = fits.ends(part, known)
            numbers = exact.integers(part, N, N, values)
            assert low <= numbers.min(), show(part)
            assert numbers.max() <= high, show(part)
    hoisted = stages["hoist"]
    for part in (n for m in hoisted.maps for n in ir.walk(m)):
        if isinstance(part, ir.Const):
            assert LOW <= part.value <= HIGH, str(hoisted)


@quiet(max_examples=few(100))
@given(strategies.extreme_wheres(), strategies.int32_arrays(N))
def test_a_narrowed_predicate_holds_the_same_pairs(a_map, values):
    assert_narrow(a_map.node, operands_of(a_map.node, values))


@pytest.mark.slow
@quiet(max_examples=few(1500))
@given(strategies.extreme_wheres(), strategies.int32_arrays(N))
def test_many_narrowed_predicates_hold_the_same_pairs(a_map, values):
    assert_narrow(a_map.node, operands_of(a_map.node, values))


@pytest.mark.slow
@quiet(max_examples=few(8))
@given(strategies.extreme_wheres(), strategies.int32_arrays(N))
def test_any_int32_is_told_from_any_other(a_map, values):
    assert_holds(a_map.node, operands_of(a_map.node, values))


@pytest.mark.slow
@quiet(max_examples=few(300))
@given(strategies.extreme_wheres(), strategies.int32_arrays(N))
def test_any_int32_is_told_from_any_other_in_many_maps(a_map, values):
    assert_holds(a_map.node, operands_of(a_map.node, values))
