"""Bits of pairs on TPUs: words, tiles, tests of pairs on words, and whole calls."""

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bit_tables import Table

import sadsl as sa
from pallas_kernels import dense
from pallas_kernels.call import Call, Vectors
from pallas_kernels.config import Tile, Tiles
from pallas_kernels.tpu import bit_tiles, bit_words, operands, packed_test
from pallas_kernels.tpu.packed_test import Packed, Position
from pallas_kernels.tpu.pair_test import pair_test
from pallas_kernels.tpu.runs import TpuSizes


def words_of(rng, shape):
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def packings(rows):
    return bit_words.by_register(rows), bit_words.in_order(rows)


def packed(tile, rows):
    """The words of a bool tile, by the definition of ``RowBits``."""
    words = np.zeros((rows.words, tile.shape[1]), np.uint32)
    for r in range(rows.rows):
        piece, i = divmod(r // rows.step, rows.bits)
        word = piece * rows.step + r % rows.step
        words[word] |= tile[r].astype(np.uint32) << np.uint32(i)
    return jnp.asarray(words.view(np.int32))


def test_transposed():
    words = words_of(np.random.default_rng(0), (2, 32, 3, 5))
    place = np.arange(32).reshape(32, 1, 1)
    held = words[:, :, None] >> place & 1  # [2, word, bit, 3, 5]
    found = np.asarray(jax.jit(bit_words.transposed)(words))
    found = found[:, :, None] >> place & 1
    np.testing.assert_array_equal(found, held.swapaxes(1, 2))


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [1, 13, 37, 128, 384, 512])
def test_words_of_rows(size):
    tile = np.random.default_rng(size).random((size, 5)) < 0.5
    for rows in packings(size):
        np.testing.assert_array_equal(
            bit_tiles.unpacked(packed(tile, rows), rows), tile
        )
        first = np.array([[0, 1, size // 2, size - 1, size]], np.int32)
        found = bit_tiles.unpacked(bit_tiles.from_row(jnp.asarray(first), rows), rows)
        np.testing.assert_array_equal(found, np.arange(size)[:, None] >= first)


# Predicates of (test, q, k, q_vectors, kv_vectors, bits).
PREDICATES = {
    "causal": lambda t, q, k, a, b, x: (k + q * -1 <= 0) & x[0],
    "window": lambda t, q, k, a, b, x: (q - k < 9) & ~(q < k) & x[0],
    "ends": lambda t, q, k, a, b, x: x[0] & (q >= b[0]) & (-q > b[0] - 90),
    "far": lambda t, q, k, a, b, x: (k - q <= b[1]) & x[0],
    "one key": lambda t, q, k, a, b, x: x[0] & (k == 7) | x[1] | (q <= 3),
    "documents": lambda t, q, k, a, b, x: (k <= q) & (a[0] == b[0]) & x[0] & x[1],
    "mixed": lambda t, q, k, a, b, x: ~((a[0] == b[0]) & x[0]) | x[1] & (2 * q > k),
    "test": lambda t, q, k, a, b, x: (x[0] | (t == 1)) & (k > 3),
    "branch": lambda t, q, k, a, b, x: (
        jax.lax.switch(
            t, [lambda: (x[0] & (k <= q)).astype(int), lambda: x[1].astype(int)]
        )
        != 0
    ),
    "no bits read": lambda t, q, k, a, b, x: k <= q,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", PREDICATES)
def test_predicates_on_words(name):
    rng, size, columns = np.random.default_rng(0), 50, 40
    column = jnp.asarray(60 + np.arange(columns, dtype=np.int32)[None])
    row = jnp.asarray(64 + np.arange(size, dtype=np.int32)[:, None])
    q_vector = jnp.asarray(rng.integers(0, 3, (size, 1)), jnp.int32)
    near = jnp.asarray(rng.integers(0, 120, (1, columns)), jnp.int32)
    limits = np.array([[-(2**31), 2**31 - 1, 0, 1]], np.int32)
    vectors = (q_vector,), (near, jnp.asarray(np.resize(limits, (1, columns))))
    tiles = rng.random((2, size, columns)) < 0.5
    predicate = PREDICATES[name]
    test = jnp.int32(1)
    plain = predicate(test, row, column, *vectors, tuple(map(jnp.asarray, tiles)))
    for rows in packings(size):
        held = tuple(Packed(packed(x, rows)) for x in tiles)
        args = (test, Position(1, jnp.int32(64)), column, *vectors, held)
        found = packed_test.evaluate(predicate, args, rows)
        np.testing.assert_array_equal(*np.broadcast_arrays(found, plain))


# Bits of one key, of groups of keys, of groups with a plane for many blocks, of groups
# whose width no kernel knows, and by difference.
TABLES = {
    "keys": Table(),
    "keys of two blocks": Table(blocks=2),
    "by two": Table(width=2),
    "by four": Table(width=4),
    "by five": Table(width=5),
    "by sixteen": Table(width=16, blocks=4),
    "a block": Table(width=64, blocks=8),
    "two blocks": Table(width=128, blocks=16),
    "not told": Table(width=1, told=False),
    "not told, few": Table(width=10, told=False),
    "of groups of queries": Table(width=2, queries=96),
    "by difference": Table(diagonal=True),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("by", ["q", "kv"])
@pytest.mark.parametrize("block_q", [48, 384])
@pytest.mark.parametrize("name", TABLES)
def test_tiles_of_every_form(name, block_q, by):
    """What a kernel reads in each tile, at a ragged length."""
    sizes, tile = TpuSizes(130, 300, block_q, 64, 0), Tile(block_q=block_q, block_kv=64)
    x, pairs = replace(TABLES[name], shape=(1, 2)).build(130, 300, 64)
    np.testing.assert_array_equal(dense.unpacked(x, 130), pairs)
    vectors = operands.with_batch_and_heads(Vectors(bits=(x,)))
    (x,) = vectors.bits
    call = Call(PREDICATES["no bits read"], 1.0, Tiles(tile, tile, tile))
    test, rows = pair_test(vectors, call, sizes, by), bit_words.rows_of(by, sizes)
    found, numbers = bit_words.placed(x, sizes, by), bit_tiles.key_numbers(x, by)

    @jax.jit
    def tile_of(i, j, words, numbers):
        number = None
        if numbers is not None:
            number = jnp.pad(numbers[0], ((0, 0), (0, 20)))
            number = jax.lax.dynamic_slice(number, (0, 64 * j), (1, 64))
            number = number if by == "q" else number.T
        plane, start = found.start(*((i, j) if by == "q" else (j, i)))
        first = (0, 0, plane, 0, start)
        shape = (1, 2, 1, words.shape[3], found.width)
        words = jax.lax.dynamic_slice(words, [jnp.int32(y) for y in first], shape)

        def of_head(words):
            held = test.held(words, number, test.forms[0], j)
            plain = isinstance(held, jax.Array)
            return held if plain else bit_tiles.unpacked(held.words, rows)

        return jnp.stack([of_head(y) for y in words[0, :, 0]]), start

    for i, j in np.ndindex(-(-130 // block_q), 5):
        actual, start = tile_of(jnp.int32(i), jnp.int32(j), found.words, numbers)
        assert start % found.step == 0
        assert start + found.width <= found.words.shape[4]
        actual = actual if by == "q" else actual.swapaxes(1, 2)
        expected = pairs[0, :, i * block_q :, 64 * j :][:, :block_q, :64]
        real = actual[:, : expected.shape[1], : expected.shape[2]]
        np.testing.assert_array_equal(real, expected)


BLOCKS = sa.KernelConfig(block_q=64, block_kv=128)
CALLS = {
    "keys": (sa.causal() & sa.topk(9, block=1, block_q=1), ()),
    "by four": (sa.causal() & sa.topk(5, block=4, block_q=1), ()),
    "by sixteen": (sa.causal() & sa.topk(3, block=16), ()),
    "blocks": (sa.causal() & sa.topk(2, block=128, block_q=1), ()),
    "two choices": (
        sa.causal()
        & (
            sa.topk(5, block=1, block_q=1)
            | sa.topk(2, block=16, score="max")
            | sa.window(3)
        ),
        (),
    ),
    "dense": (sa.parse("where(lambda q, k: operand('m')[q, k] == 1)"), ("m",)),
    "documents": (sa.causal() & sa.segments() & sa.topk(7, block=1, block_q=1), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [37, 130, 300])
@pytest.mark.parametrize("name", CALLS)
def test_calls_as_on_the_xla_path(name, n):
    """Values and gradients: two batch entries that choose apart, grouped heads."""
    spec, names = CALLS[name]
    rng = np.random.default_rng(n)
    shapes = [(2, n, 4, 16), (2, n, 2, 16), (2, n, 2, 16)]
    inputs = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    given = {x: jnp.asarray(rng.integers(0, 2, (n, n)), jnp.int32) for x in names}
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, n))), jnp.int32)
    segments = {"q_segment_ids": ids, "kv_segment_ids": ids}

    def run(impl, **options):
        def value(inputs):
            out = sa.attention(
                *inputs, spec, impl=impl, operands=given or None, **options,
                **(segments if name == "documents" else {}),
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(value, has_aux=True))(inputs)

    actual = run("tpu", config=BLOCKS, interpret=True)
    expected = run("xla")
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected
    )


def test_choices_of_keys_lower_without_a_target():
    """Users lower by ``jax.jit`` alone; no operation may ask which chip it is for."""
    x = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.bfloat16)
    spec = sa.causal() & sa.topk(64, block=1, block_q=1)

    def loss(q, k, v):
        return jnp.sum(sa.attention(q, k, v, spec, impl="tpu").astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.slow
def test_bits_cost_a_tile_a_tenth_more_at_most(monkeypatch):
    """Bundles of a partial tile against those of causal(), in machine code."""
    pytest.importorskip("libtpu")
    root = Path(sa.__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    tpu_static = importlib.import_module("tpu_static")
    specs = ["causal", "top keys", "top blocks", "dense mask"]
    chips = ["tpu-v5e", "tpu-v6e"]
    cases = [(spec, chip, 128) for chip in chips for spec in specs]
    found, _ = tpu_static.measured(root, cases, [])
    for start in range(0, len(found), len(specs)):
        causal, *others = [np.array(x[1::2]) for x in found[start:][: len(specs)]]
        for spec, bundles in zip(specs[1:], others, strict=True):
            assert np.all(bundles <= 1.1 * causal), (cases[start][1], spec)
