"""Published mechanisms against loops written from their papers, and mutants of them."""

import runpy
from collections import Counter
from functools import partial
from pathlib import Path

import content_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from published import BIRD, CASES, expected, lattice, residue_order

import sadsl as sa
from lowering import ir, pipeline
from lowering.expr import heads
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.printing import show
from pallas_kernels.block_mask import EMPTY, FULL, expand
from sadsl import catalog
from sadsl.catalog.big_bird import random_blocks

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

PUBLISHED = runpy.run_path(
    str(Path(__file__).parents[3] / "benchmarks" / "catalog_cases.py")
)["CASES"]


EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EVERY
def test_is_what_the_paper_says(case):
    assert case.length(case.sizes[1]) == 60
    for size in case.sizes:
        spec = case.make(size)
        found = spec.dense(case.length(size), num_heads=case.heads)
        np.testing.assert_array_equal(found, expected(case.name, size), str(size))
        assert sa.parse(repr(spec)) == spec


@EVERY
@pytest.mark.parametrize("block", [16, 40])
def test_plans_are_sound(case, block):
    for size in case.sizes:
        n = case.length(size)
        problem = pipeline.Problem(n, n, case.heads)
        stages = pipeline.run(case.make(size).node, problem)
        mask = pipeline.block_mask(stages, block, block)
        kinds = expand(mask)[np.asarray(mask.map_of_head)]
        cell = np.kron(kinds, np.ones((1, block, block), int))[:, :n, :n]
        pairs = expected(case.name, size)
        assert not np.any((cell == EMPTY) & pairs)
        assert not np.any((cell == FULL) & ~pairs)


@pytest.mark.sample(9)
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_published_sizes(case):
    assert 60_000 <= case.n <= 66_000
    plan = sa.plan(case.spec, case.n, num_heads=case.num_heads)
    assert plan.num_full + plan.num_partial > 0
    assert plan.num_full + plan.num_partial + plan.num_empty == plan.num_blocks
    assert sa.parse(repr(case.spec)) == case.spec


def test_every_mechanism_is_published_and_tested():
    names = {name for name in vars(catalog) if callable(getattr(catalog, name))}
    assert names >= content_cases.NAMES
    names -= content_cases.NAMES
    for cases in (PUBLISHED, CASES):
        text = " ".join(case.name for case in cases).replace("s2 ", "s2_attention ")
        assert {name for name in names if name not in text} == set()


# --- attention ---

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@pytest.mark.sample(1)
@EVERY
def test_attention(case):
    """Values and gradients against float64."""
    spec, pairs = case.make(case.sizes[1]), expected(case.name, case.sizes[1])
    num_heads, n, _ = pairs.shape
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.normal(size=(1, n, num_heads, 8)), jnp.float32)
        for _ in range(4)
    )
    # One block, hardly optimised: what is at stake is the test of a pair.
    config = sa.KernelConfig(block_q=64, block_kv=64)

    @partial(jax.jit, compiler_options=QUICK)
    def call(q, k, v, do):
        attend = lambda *x: sa.attention(*x, spec, impl="xla", config=config)
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    by_head = lambda x: np.swapaxes(np.asarray(x), 1, 2)
    wanted = oracle.with_gradients(
        by_head(q), by_head(k), by_head(v), pairs[None], 8**-0.5, do=by_head(do)
    )
    found = [by_head(x) for x in call(q, k, v, do)]
    for a, b in zip(found, (wanted.o, wanted.dq, wanted.dk, wanted.dv), strict=True):
        oracle.assert_close(a, b, "float32", repr(spec))


# --- mutants: every number matters ---


def changed(node):
    """The node with one number of its own one higher, and one lower."""
    for by in (1, -1):
        match node:
            case ir.Const(value):
                yield ir.Const(value + by)
            case ir.Mul(a, factor):
                yield ir.Mul(a, factor + by)
            case ir.FloorDiv(a, n) | ir.Mod(a, n) if n + by >= 1:
                yield type(node)(a, n + by)
            case ir.In(a, values):
                for at, value in enumerate(values):
                    others = values[:at] + values[at + 1 :]
                    yield ir.In(a, tuple(sorted({*others, value + by})))


def changed_once(node):
    """The node with one number of it changed by one, for every number."""
    yield from changed(node)
    below = ir.children(node)
    for at, child in enumerate(below):
        for mutant in changed_once(child):
            parts = iter((*below[:at], mutant, *below[at + 1 :]))
            yield ir.rebuild(node, lambda _, parts=parts: next(parts))


def changed_tables(node):
    """The node with one entry of a table changed by one, wherever that table is."""
    tables = {x.values: None for x in ir.walk(node) if isinstance(x, ir.Table)}
    for values in tables:
        at = min(len(values) // 2, 28)
        for entry in (values[at] + 1, values[at] - 1):
            new = (*values[:at], entry, *values[at + 1 :])

            def change(x, old=values, new=new):
                x = ir.rebuild(x, change)
                return ir.Table(new, x.index) if getattr(x, "values", 0) == old else x

            yield change(node)


def mutants(node):
    """Every change of one number by one."""
    yield from changed_once(node)
    yield from changed_tables(node)


def dense(node, n, num_heads):
    """Every pair, or None where a mutant looks beyond a table."""
    node = ir.substitute(node, {"n": ir.Const(n)})
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    try:
        rows = [evaluate(x, NumPy(q, k)) for x in heads.per_head(node, num_heads)]
    except IndexError:
        return None
    return np.stack([np.broadcast_to(row, (n, n)) for row in rows])


def same(node, pairs):
    found = dense(node, pairs.shape[1], len(pairs))
    return found is not None and np.array_equal(found, pairs)


def assert_equivalent(case, number):
    """A mutant that no test tells apart is the same map at every length."""
    node = case.make(case.larger).node
    mutant = list(mutants(node))[number]
    longest = case.length(case.larger)
    # Unless a map knows its length, it begins as the map of any longer sequence does.
    some = range(1, longest) if "n" in ir.axes(node) else (longest,)
    for n in some:
        assert same(mutant, dense(node, n, case.heads)), show(mutant)


# How many changes of one number leave the map as it is, at every length. A window's
# right end says nothing beside `causal()`, of blocks or of positions (two to four
# each); a bound on a lattice falls between two of its points, or where all is seen
# anyway; an uneven bound on multiples of a dilation rounds to an even one; and in
# radial attention the wide windows of near frames hold those of the rings beyond.
EQUIVALENT = {
    "power_attention": 4,
    "s2": 8,
    "s2 options": 8,
    "s2_bidirectional": 2,
    "radial": 35,
    "radial with text": 19,
    "moa": 1,
    "a_shape": 2,
    "tri_shape": 2,
    "mminference_grid": 9,
    "residue_major": 9,
    "pine": 2,
    "sparse_transformer_strided": 2,
    "sparse_transformer_strided merged": 4,
    "longformer": 4,
    "log_sparse": 1,
    "log_sparse in parts": 2,
    "dilated_window": 2,
    "dilated_window causal": 2,
    "streaming": 2,
}


@pytest.mark.sample(20)
@EVERY
def test_mutants(case):
    by_size = [list(mutants(case.make(size).node)) for size in case.sizes]
    assert len({len(found) for found in by_size}) == 1
    # The longest first: it tells most mutants apart.
    order = sorted(range(3), key=lambda at: -case.length(case.sizes[at]))
    survivors = list(range(len(by_size[0])))
    for at in order:
        pairs = expected(case.name, case.sizes[at])
        survivors = [i for i in survivors if same(by_size[at][i], pairs)]
    for number in survivors:
        assert_equivalent(case, number)
    assert len(survivors) == EQUIVALENT.get(case.name, 0), len(by_size[0])


# --- worked examples ---


def seen(spec, n, row, num_heads=1, head=0):
    return np.flatnonzero(spec.dense(n, num_heads=num_heads)[head, row]).tolist()


def test_power_attention_row():
    assert seen(catalog.power_attention(1, 2, 1), 64, 13) == [0, 5, 9, 11, 12, 13]


def test_power_attention_reaches_all_in_five_layers():
    step = catalog.power_attention(1, 2, 1).dense(64)[0].astype(int)
    reached = np.eye(64, dtype=int)
    depths = []
    for depth in range(1, 6):
        reached = (reached @ step > 0).astype(int)
        if (reached == np.tril(np.ones((64, 64)))).all():
            depths.append(depth)
    assert depths[0] == 5


def test_s2_rows():
    spec = catalog.s2_attention(1, 1, 2, 3)
    rows = ["0", "01", "012", "023", "034", "0345", "0356", "0367"]
    assert ["".join(map(str, seen(spec, 8, row))) for row in range(8)] == rows
    both = catalog.s2_bidirectional(2, 2, 3, 1)
    assert seen(both, 8, 0) == [0, 1, 4, 7]
    assert seen(both, 8, 2) == [1, 2, 3, 6]


@pytest.mark.parametrize(("num_heads", "covered"), [(8, 8), (2, 2), (4, 4)])
def test_s2_heads_cover_the_context_between_them(num_heads, covered):
    """As many residues of verticals as there are heads, all of them from ``v`` on."""
    spec = catalog.s2_attention(num_heads, 1, 1, 8)
    last = spec.dense(64, num_heads=num_heads)[:, -1].any(axis=0)[:-1]
    assert len({int(k) % 8 for k in np.flatnonzero(last)}) == covered


def test_radial_windows():
    """The width of the window at every distance in time, for 8 tokens a frame."""
    dense = catalog.radial(64, 8).dense(512)[0].reshape(64, 8, 64, 8)
    diagonal = np.eye(8, dtype=bool)
    apart = np.abs(np.arange(8)[:, None] - np.arange(8))
    for distance in range(1, 63):
        found = dense[distance + 1, :, 1, :]
        if distance < 16:
            width = {1: 7, 2: 3, 4: 1, 8: 0}[1 << (distance.bit_length() - 1)]
            np.testing.assert_array_equal(found, apart <= width)
        else:
            every = 2 if distance < 32 else 4
            np.testing.assert_array_equal(found, diagonal & (distance % every == 0))
    assert dense[:, :, 0].all()
    assert dense[np.arange(64), :, np.arange(64)].all()


def test_radial_density():
    """About 1.7 s**2 f log2 f pairs for 4 tokens a frame, without the sink."""
    for frames in (8, 16, 32):
        count = sa.plan(catalog.radial(frames, 4, sink_frames=0), frames * 4).num_pairs
        assert count / (16 * frames * np.log2(frames)) == pytest.approx(1.7, abs=0.1)


def test_mminference_rows():
    spec = lattice()
    assert seen(spec, 48, 20) == [0, 1, 2, 3, 6, 9, 12, 15, 17, 18, 19, 20]
    assert seen(spec, 48, 21) == list(range(22))
    for row in range(44, 48):
        assert seen(spec, 48, row) == list(range(row + 1))
    short = catalog.mminference_grid((3, 18), 3, sink=2, local=4, block=4)
    assert short == sa.causal()


def test_residues_make_a_lattice_contiguous():
    """Columns of a lattice become a stripe, and nothing else changes."""
    columns = sa.where(lambda q, k: (k >= 4) & (k < 40) & ((k - 3) % 3 == 0))
    spec = catalog.residue_major(columns, (4, 40), 3, 48)
    stripe = np.flatnonzero(spec.dense(48)[0, 0])
    np.testing.assert_array_equal(stripe, np.arange(stripe[0], stripe[0] + 12))
    original = columns.dense(48)[0]
    order = residue_order(48)
    np.testing.assert_array_equal(spec.dense(48)[0], original[np.ix_(order, order)])
    before = sa.plan(columns, 48, block_q=4, block_kv=4)
    after = sa.plan(spec, 48, block_q=4, block_kv=4)
    assert (before.num_full, before.num_partial) == (0, 108)
    assert (after.num_full, after.num_partial) == (36, 0)


def test_random_blocks_are_new_and_seeded():
    tables = random_blocks(**BIRD)
    assert tables == random_blocks(**BIRD)
    assert tables != random_blocks(**BIRD | {"seed": 2})
    for row, chosen in enumerate(zip(*tables, strict=True)):
        assert all(k >= 2 and abs(row - k) > 1 for k in chosen)
        assert len(set(chosen)) == 2
    # Too few blocks to draw from: the own one stands in.
    assert random_blocks(3, 1, 1, 2, 0) == [(2, 1, 2), (0, 1, 2)]
    flat = Counter(k for table in random_blocks(200, 1, 0, 3, 0) for k in table)
    assert max(flat.values()) < 15


def test_spans_of_moa_follow_the_length():
    spec = catalog.moa([(0, 0.5)], block=8, global_blocks=0)
    for n in (64, 128):
        assert seen(spec, n, n - 1) == list(range(n // 2, n))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: catalog.s2_attention(local=0), "local=0 must be at least 1"),
        (lambda: catalog.s2_bidirectional(0), "local_left=0 must be at least 1"),
        (lambda: catalog.s2_bidirectional(1, 0), "local_right=0 must be at least 1"),
        (lambda: catalog.neighborhood((2, 2, 2, 2)), "must have 1 to 3 axes"),
        (lambda: catalog.neighborhood((5, 5)), "window 7 .* must fit its 5 cells"),
        (lambda: catalog.radial(8, 4).dense(33), "has 32 positions"),
        (lambda: catalog.axial(), "Grid of 0 axes"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
