"""The XLA backend: values, gradients, walks, transforms and memory."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from kernel_cases import PATTERNS, Case, Pattern, table

from pallas_kernels import block_mask, dispatch, xla
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL, blank, from_blocks
from pallas_kernels.call import Inputs, Masks, Vectors
from pallas_kernels.xla import walks

LONG = ("causal", "sinks", "holes", "segments", "two maps")
SMALL = Case(pattern=Pattern("sinks"), q_len=77, kv_len=77, q_heads=4, kv_heads=2)


@pytest.fixture
def chunked(monkeypatch):
    """Makes every row long, in chunks of at most two blocks of 32."""
    monkeypatch.setattr(walks, "SHORT", 0)
    monkeypatch.setattr(walks, "CHUNK", 64)


def attend(case, inputs, vectors=None, **changes):
    call = replace(case.call(), **changes)
    vectors = case.vectors() if vectors is None else vectors
    inputs = jax.tree.map(jnp.asarray, inputs)
    return dispatch.attend(inputs, vectors, case.masks(), call, impl="xla")


def loss(case):
    _, do, dlse = case.arrays()

    def f(inputs, do=do, dlse=dlse):
        o, lse = attend(case, inputs)
        return jnp.sum(o * do) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * dlse)

    return f


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", table(), ids=str)
def test_values_and_gradients(case):
    case.check("xla")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(pattern=Pattern("sinks"), kv_heads=1, soft_cap=2.0, q_len=257),
    ],
    ids=str,
)
def test_rows_of_several_shapes(case, monkeypatch):
    monkeypatch.setattr(walks, "SHORT", 64)
    (walk,) = xla.lists_of(case.masks()).forward.walks
    assert walk.short
    assert walk.long is not None
    case.check("xla")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p.name in LONG], ids=lambda p: p.name
)
@pytest.mark.usefixtures("chunked")
def test_long_rows(pattern):
    cap = 3.0 if pattern.name == "sinks" else None
    case = Case(pattern=pattern, q_heads=4, dim_v=24, soft_cap=cap)
    lists = xla.lists_of(case.masks())
    assert all(walk.long and not walk.short for walk in lists.forward.walks)
    case.check("xla")


@pytest.mark.slow
def test_heads_of_one_key_head_may_follow_different_maps():
    """Key head 0 has one query head of each map, key head 1 two of one map."""
    case = Case(pattern=Pattern("two maps", maps=2), q_heads=4, kv_heads=2, q_len=77)
    maps = np.array([1, 0, 1, 1], np.int32)

    class Mixed(Case):
        def map_of_head(self):
            return maps

    mixed = Mixed(**{f: getattr(case, f) for f in case.__dataclass_fields__})
    mixed.check("xla")


def visited(walk, mask):
    """The kinds ``[rows, columns]`` that a walk lists; asserts each block is once."""
    kinds = np.zeros((mask.num_rows, mask.num_columns), np.int8)

    def see(row, blocks, kind):
        assert np.all(kinds[row, blocks] == EMPTY)
        assert len(set(blocks.tolist())) == len(blocks)
        kinds[row, blocks] = kind

    for short in walk.short:
        lines = zip(
            short.row, short.block, short.num_full, short.num_partial, strict=True
        )
        for row, block, num_full, num_partial in lines:
            at = short.full_slots
            see(row, block[:num_full], FULL)
            see(row, block[at : at + num_partial], PARTIAL)
            # Padding repeats blocks of the same row.
            assert np.all(kinds[row, block] != EMPTY)
    if walk.long is not None:
        for chunks, kind in ((walk.long.full, FULL), (walk.long.partial, PARTIAL)):
            block, count = np.asarray(chunks.block), np.asarray(chunks.count)
            for row, begin, end in zip(
                walk.long.row, chunks.begin, chunks.end, strict=True
            ):
                for at in range(int(begin), int(end)):
                    assert count[at] > 0
                    see(row, block[at, : count[at]], kind)
                    assert np.all(kinds[row, block[at]] == kind)
    return kinds


def random_mask(seed, maps=2, rows=23, columns=19, sparsity=0.5):
    rng = np.random.default_rng(seed)
    kept = rng.random((maps, rows, 1)) ** 2 * (1 - sparsity) * 2
    some = rng.random((maps, rows, columns)) < kept
    kinds = np.where(some, rng.integers(PARTIAL, FULL + 1, some.shape), EMPTY)
    like = blank(rows * 8, columns * 8, 8, 8)
    return from_blocks(kinds, map_of_head=np.arange(maps), like=like)


@pytest.mark.parametrize("short", [0, 24, 72, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_lists_hold_every_block_once(seed, short, monkeypatch):
    monkeypatch.setattr(walks, "SHORT", short)
    monkeypatch.setattr(walks, "CHUNK", 32)
    mask = random_mask(seed, sparsity=(0.1, 0.5, 0.9, 1.0)[seed])
    kinds = block_mask.expand(mask)
    for index, walk in enumerate(walks.plan(mask).walks):
        np.testing.assert_array_equal(visited(walk, mask), kinds[index])


@pytest.mark.parametrize("seed", range(3))
def test_traced_lists_hold_every_block_once(seed):
    mask = random_mask(seed)
    traced = jax.jit(lambda p: walks.plan(replace(mask, row_ptr=p)).walks)(mask.row_ptr)
    (found,) = jax.tree.map(np.asarray, traced)
    for index, kinds in enumerate(block_mask.expand(mask)):
        walk = jax.tree.map(lambda x, index=index: x[index], found)
        np.testing.assert_array_equal(visited(walk, mask), kinds)


@pytest.mark.slow
def test_traced_runs_attend():
    """Traced plans match static ones, under jit and under vmap."""
    case = replace(SMALL, batch=1)
    inputs, *_ = case.arrays()
    masks, call = case.masks(), case.call()

    def f(ptr, start, inputs):
        moved = replace(masks.forward, row_ptr=ptr, run_start=start)
        traced = Masks(moved, moved, masks.dkv)
        out = dispatch.attend(inputs, Vectors(), traced, call, impl="xla")
        return out.o

    expected = attend(case, inputs).o
    both = [
        jnp.stack([jnp.asarray(x)] * 2)
        for x in (masks.forward.row_ptr, masks.forward.run_start)
    ]
    actual = jax.jit(jax.vmap(f, in_axes=(0, 0, None)))(*both, inputs)
    np.testing.assert_allclose(actual, jnp.stack([expected] * 2), atol=1e-5)


def test_traced_map_of_head_is_refused():
    mask = random_mask(0)
    with pytest.raises(NotImplementedError, match="map_of_head is traced"):
        jax.jit(lambda m: walks.head_maps(replace(mask, map_of_head=m)))(
            mask.map_of_head
        )


def test_rows_of_a_window_take_one_table():
    """The first rows of a window are shorter, the others equal."""
    full, partial = np.minimum(np.arange(64), 3), np.where(np.arange(64) < 4, 1, 2)
    short, long = walks.split(full, partial, 128, (2048, 1024))
    assert np.array_equal(short, np.arange(64))
    assert not long.size


def test_rows_of_uneven_lengths_take_chunks():
    """Half of the table of causal rows would be padding; empty rows are in no part."""
    full, partial = np.arange(32), np.minimum(np.arange(32), 1)
    short, long = walks.split(full, partial, 128, (4096, 1024))
    assert not short.size
    assert np.array_equal(long, np.arange(1, 32))


def test_few_long_rows_do_not_widen_the_table():
    """Rows of a window, and one row of all keys, as global tokens have."""
    full, partial = np.full(64, 3), np.full(64, 2)
    full[0], partial[0] = 64, 0
    short, long = walks.split(full, partial, 128, (2048, 1024))
    assert np.array_equal(short, np.arange(1, 64))
    assert np.array_equal(long, [0])


@dataclass(frozen=True)
class Diagonal:
    """Causal on diagonal blocks, and False on the full blocks below them."""

    def __call__(self, index, q, k, q_vectors, kv_vectors, bits):
        return (k <= q) & (q // 32 == k // 32)


@dataclass(frozen=True)
class Never:
    def __call__(self, index, q, k, q_vectors, kv_vectors, bits):
        return (k < 0) & (q < 0)


def test_full_blocks_never_meet_the_predicate():
    inputs, *_ = SMALL.arrays()
    causal = replace(SMALL, pattern=Pattern("causal"))
    full = replace(SMALL, pattern=Pattern("full"), q_len=64, kv_len=64)
    cut = Inputs(*(x[:, :, :64] for x in inputs))
    for case, x, predicate in (
        (causal, inputs, Diagonal()),
        (full, cut, Never()),
    ):
        f = jax.jit(partial(attend, case), static_argnames="predicate")
        own = f(x, predicate=case.pattern)
        np.testing.assert_array_equal(f(x, predicate=predicate).o, own.o)


@pytest.mark.slow
@pytest.mark.usefixtures("chunked")
def test_full_blocks_of_long_rows_never_meet_the_predicate():
    test_full_blocks_never_meet_the_predicate()


def poisoned():
    """No row visits column 1, and row 2 visits no block."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(EMPTY, FULL + 1, (1, 5, 4)).astype(np.int8)
    kinds[:, :, 1], kinds[:, 2], kinds[:, 3, 0] = EMPTY, EMPTY, FULL
    like = blank(5 * 32, 4 * 32, 32, 32)
    mask = from_blocks(kinds, map_of_head=np.zeros(2, int), like=like)
    case = Case(q_len=5 * 32, kv_len=4 * 32, pattern=Pattern("full"))
    masks = Masks(mask, mask, mask.transpose())
    return case, masks, np.repeat(np.repeat(kinds, 32, 1), 32, 2)[0] != EMPTY


def check_poison():
    case, masks, pairs = poisoned()
    (q, k, v), do, _ = case.arrays()
    expected = oracle.with_gradients(q, k, v, pairs[None, None], case.dim**-0.5, do=do)
    nan = jnp.nan
    k, v = k.at[:, :, 32:64].set(nan), v.at[:, :, 32:64].set(nan)

    def f(inputs):
        return dispatch.attend(inputs, Vectors(), masks, case.call(), impl="xla")

    @jax.jit
    def run(inputs):
        out, pull = jax.vjp(f, inputs)
        return *out, *pull(type(out)(do, jnp.zeros_like(out.lse)))[0]

    actual = run(Inputs(q, k, v))
    for name, a, b in zip(expected._fields, actual, expected, strict=True):
        oracle.assert_close(a, b, "float32", name)


def test_blocks_outside_of_the_runs_are_never_read():
    check_poison()


@pytest.mark.usefixtures("chunked")
def test_blocks_outside_of_the_runs_are_never_read_by_long_rows():
    check_poison()


@pytest.mark.slow
def test_jit_of_vmap_and_vmap_of_grad():
    case = SMALL
    inputs, do, dlse = case.arrays()
    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (inputs, do, dlse))
    grad = jax.grad(loss(case))
    actual = jax.jit(jax.vmap(grad))(*twice)
    for i in range(2):
        alone = jax.jit(grad)(*jax.tree.map(lambda x, i=i: x[i], twice))
        for a, b in zip(actual, alone, strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5)


def test_checkpoint_and_repeatability():
    """Neither recomputation nor a second run changes a bit."""
    case = replace(SMALL, q_len=130, kv_len=130)
    inputs, *_ = case.arrays()
    grad = jax.jit(jax.grad(jax.checkpoint(loss(case))))
    plain = jax.jit(jax.grad(loss(case)))
    first = plain(inputs)
    for other in (plain(inputs), plain(inputs), grad(inputs)):
        for a, b in zip(other, first, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_shard_map_over_batch():
    case = replace(SMALL, batch=4)
    inputs, do, dlse = case.arrays()
    grad = jax.grad(loss(case))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        grad, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    one, all_of_them = jax.jit(sharded)(inputs, do, dlse), jax.jit(grad)(inputs)
    for a, b in zip(one, all_of_them, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_gradients_against_differences():
    case = Case(q_len=13, kv_len=13, batch=1, q_heads=2, kv_heads=1, dim=4, dim_v=4)
    inputs, *_ = case.arrays()
    check_grads(loss(case), (inputs,), order=1, modes=("rev",), atol=2e-2, rtol=2e-2)


@pytest.mark.optimised
def test_memory_is_linear_in_the_length():
    def temp(n):
        case = Case(pattern=Pattern("window"), batch=1, q_len=n, kv_len=n)
        inputs, *_ = case.arrays()
        compiled = jax.jit(jax.grad(loss(case))).lower(inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temp(512), temp(1024)
    assert large <= 2.1 * small
    assert large < 2 * 1024 * 1024


def test_default_tiles_fill_a_kernel_config():
    tiles = xla.default_tiles((4096, 4096), 64, 64, jnp.float32)
    assert tiles.forward.block_q == tiles.dq.block_kv == 128
