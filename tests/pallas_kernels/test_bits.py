"""Pair bits, and plans that differ by batch entry and head, on TPU and Triton."""

import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bit_tables import Table
from kernel_cases import Case

from lowering.targets import compiling, triton_ir
from pallas_kernels import bits, dispatch
from pallas_kernels.block_mask import (
    EMPTY,
    FULL,
    PARTIAL,
    blank,
    check,
    from_blocks,
)
from pallas_kernels.call import Call, Masks, Outputs, Vectors
from pallas_kernels.config import Tile, Tiles

KERNELS = ("tpu", "triton", "xla")


@dataclass(frozen=True)
class Reads:
    """Test 0 allows ``k <= q`` with the last bits; test 1 adds all first bits."""

    def __call__(self, test, q, k, q_vectors, kv_vectors, bits):
        earlier = (k <= q) & bits[-1]
        return earlier | (jnp.asarray(test) == 1) & bits[0]


@dataclass(frozen=True, kw_only=True)
class Content:
    """A case with a random plan for each batch entry and head."""

    case: Case
    tables: tuple[Table, ...]
    tests: tuple[int, ...]  # of each map; each batch entry and head has its own map
    block_kv: int = 64
    block_q: int = 32

    def __str__(self):
        words = " ".join(
            f"{t.width}{'d' * t.diagonal}by{t.queries}" for t in self.tables
        )
        return f"{self.case.q_len}x{self.case.kv_len}-{self.case.dtype}-{words}"

    @property
    def half(self):
        """The block_q of the dkv kernel: half of the others, unless that is 128."""
        return self.block_q if self.block_q == 128 else self.block_q // 2

    def kinds(self):
        """Block kinds ``[maps, q blocks, kv blocks]``, with empty rows and columns."""
        case, maps = self.case, len(self.tests)
        rng = np.random.default_rng(case.seed)
        shape = (maps, -(-case.q_len // self.block_q), -(-case.kv_len // self.block_kv))
        kinds = rng.choice([EMPTY, PARTIAL, FULL], shape, p=[0.3, 0.5, 0.2])
        if case.kv_len % self.block_kv:
            kinds[:, :, -1] = np.minimum(kinds[:, :, -1], PARTIAL)
        kinds[0, -1] = EMPTY
        kinds[-1, :, 0] = EMPTY
        return kinds

    def heads(self):
        return np.arange(self.case.batch * self.case.q_heads)[::-1]

    def masks(self):
        """The plans of the three kernels; dkv has smaller blocks of queries."""
        case, maps = self.case, self.heads()
        rows = blank(case.q_len, case.kv_len, self.block_q, self.block_kv)
        rows = from_blocks(self.kinds(), map_of_head=maps, like=rows)
        parts = self.block_q // self.half
        halves = np.repeat(self.kinds(), parts, axis=1).swapaxes(1, 2)
        columns = blank(case.q_len, case.kv_len, self.half, self.block_kv, "kv")
        halves = halves[:, :, : columns.num_columns]
        columns = from_blocks(halves, map_of_head=maps, like=columns)
        for mask in (rows, columns):
            check(mask)
        # The capacity for any content, as a run-time plan has.
        tests = np.array(self.tests, np.int32)
        found = (
            replace(m, test_of_map=tests, max_runs=m.num_columns)
            for m in (rows, rows, columns)
        )
        return Masks(*found)

    def bits(self):
        """The vectors of a call, and the pairs of each table."""
        built = [
            table.build(self.case.q_len, self.case.kv_len, self.block_kv)
            for table in self.tables
        ]
        return Vectors(bits=tuple(b for b, _ in built)), [pairs for _, pairs in built]

    def pairs(self):
        """The allowed pairs, bool ``[batch, heads, q, kv]``."""
        case, maps = self.case, self.heads()
        shape = (case.batch, case.q_heads, case.q_len, case.kv_len)
        first, *_, last = (np.broadcast_to(x, shape) for x in (self.bits()[1] * 2))
        q, k = np.arange(case.q_len)[:, None], np.arange(case.kv_len)[None, :]
        found = np.zeros(shape, bool)
        for b, h in np.ndindex(shape[:2]):
            m = maps[b * case.q_heads + h]
            asked = (k <= q) & last[b, h]
            if self.tests[m]:
                asked = asked | first[b, h]
            kind = self.kinds()[m][q // self.block_q, k // self.block_kv]
            found[b, h] = (kind == FULL) | (kind == PARTIAL) & asked
        return found

    def call(self, **options):
        tile = Tile(block_q=self.block_q, block_kv=self.block_kv)
        tiles = Tiles(forward=tile, dq=tile, dkv=replace(tile, block_q=self.half))
        return Call(Reads(), self.case.dim**-0.5, tiles, **options)


def arrays_of(mask):
    """The runs as arrays to trace, with unused entries at the end."""
    names, room = ("run_start", "run_stop", "run_full"), np.full(9, 10**6, np.int32)
    arrays = {n: np.concatenate([getattr(mask, n), room]) for n in names}
    return {n: jnp.asarray(x) for n, x in arrays.items()} | {
        "row_ptr": jnp.asarray(mask.row_ptr)
    }


def gradient_of(content, impl, **options):
    """``f(inputs, vectors, arrays, do, dlse)``: values and gradients."""
    masks, call = content.masks(), content.call(**options)

    def f(inputs, vectors, arrays, do, dlse):
        pairs = zip(masks, arrays or ({},) * 3, strict=True)
        plans = Masks(*(replace(mask, **traced) for mask, traced in pairs))

        def attend(inputs):
            return dispatch.attend(inputs, vectors, plans, call, impl=impl)

        out, pull = jax.vjp(attend, inputs)
        return (*out, *pull(Outputs(do, dlse))[0])

    return f


CASE = Case(batch=2, q_heads=4, kv_heads=2, dim_v=32)
# Words that differ by batch entry and head, by head, by batch entry, and by neither.
OWN = Table(width=5, shape=(2, 4))
SLIDING = Table(shape=(1, 4), diagonal=True, seed=1)
WIDE = Table(width=1, shape=(2, 1), seed=2)
# Words of half a block of the forward kernel, and of four blocks.
HALVES = replace(OWN, queries=16, seed=4)
BLOCKS = replace(WIDE, queries=128, seed=5)
SHARED = Table(diagonal=True, seed=3)
TRACED = Content(
    case=replace(CASE, q_len=130, kv_len=257),
    tables=(OWN, SLIDING),
    tests=(0, 1, 0, 0, 1, 1, 0, 1),
)
# All heads take test 1, which is not the number of their map.
STATIC = Content(
    case=replace(CASE, q_len=257, kv_len=130, dtype="bfloat16"),
    tables=(SHARED, WIDE),
    tests=(1,) * 8,
)
GROUPS = replace(TRACED, tables=(HALVES, BLOCKS))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("content", "traced"),
    [(TRACED, True), (STATIC, False), (GROUPS, True)],
    ids=str,
)
@pytest.mark.parametrize("impl", KERNELS)
def test_against_float64(impl, content, traced):
    case = content.case
    inputs, do, dlse = case.arrays()
    vectors, _ = content.bits()
    arrays = [arrays_of(m) for m in content.masks()] if traced else None
    run = jax.jit(gradient_of(content, impl, interpret=True))
    actual = oracle.Result(*run(inputs, vectors, arrays, do, dlse))
    pairs = content.pairs()
    assert not pairs.any(axis=-1).all()  # there are rows without a key
    expected = oracle.with_gradients(*inputs, pairs, case.dim**-0.5, do=do, dlse=dlse)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        oracle.assert_close(a, b, case.dtype, f"{impl} {content} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS)
def test_vmap_over_words_and_plans(impl):
    case = replace(CASE, batch=1, q_heads=2, q_len=13, kv_len=70)
    table = Table(width=5, shape=(1, 2))
    contents = [
        Content(
            case=replace(case, seed=seed),
            tables=(replace(table, seed=seed), replace(SHARED, seed=seed)),
            tests=(0, 1),
        )
        for seed in range(2)
    ]
    inputs, do, dlse = case.arrays()
    vectors = [c.bits()[0] for c in contents]
    arrays = [[arrays_of(m) for m in c.masks()] for c in contents]
    # Both plans take the capacity of the larger.
    length = max(len(x["run_start"]) for plans in arrays for x in plans)
    for x in (x for plans in arrays for x in plans):
        for n in ("run_start", "run_stop", "run_full"):
            x[n] = jnp.pad(x[n], (0, length - len(x[n])))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *zip(vectors, arrays, strict=True))
    f = gradient_of(contents[0], impl, interpret=True)
    out = jax.jit(jax.vmap(lambda v, a: f(inputs, v, a, do, dlse)))(*stacked)
    for i, content in enumerate(contents):
        pairs, scale = content.pairs(), case.dim**-0.5
        expected = oracle.with_gradients(*inputs, pairs, scale, do=do, dlse=dlse)
        for a, b in zip(out, expected, strict=True):
            oracle.assert_close(a[i], b, case.dtype)


@pytest.mark.parametrize("num_words", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_tile(num_words, transposed):
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (num_words, 40))
    bit = rng.permutation(32 * num_words)
    bits_of_word = words[:, None, :] >> np.arange(32)[None, :, None] & 1
    expected = bits_of_word.reshape(-1, 40)[bit].T != 0
    rows = [jnp.asarray(w, jnp.int32) for w in words]
    number = jnp.asarray(bit, jnp.int32)
    if transposed:
        actual = bits.tile([w[None] for w in rows], number[:, None]).T
    else:
        actual = bits.tile([w[:, None] for w in rows], number[None])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("impl", KERNELS)
def test_refuses_bits_of_other_key_blocks(impl):
    content = STATIC
    inputs, do, dlse = content.case.arrays()
    vectors, _ = replace(content, block_kv=32).bits()
    message = r"bits\[0\] are packed for block_kv=32.*block_kv=64"
    with pytest.raises(ValueError, match=message):
        gradient_of(content, impl, interpret=True)(inputs, vectors, None, do, dlse)


@pytest.mark.parametrize("impl", KERNELS)
def test_refuses_words_of_a_part_of_a_block(impl):
    content = replace(STATIC, tables=(Table(queries=48),))
    inputs, do, dlse = content.case.arrays()
    vectors, _ = content.bits()
    message = r"bits\[0\] have a word for each 48 queries.*block_q=32"
    with pytest.raises(ValueError, match=message):
        gradient_of(content, impl, interpret=True)(inputs, vectors, None, do, dlse)


# Lowering for other chips, with words of every form and a traced plan.

ON_CHIP = Content(
    case=replace(CASE, q_len=700, kv_len=600, dim=64, dim_v=64, dtype="bfloat16"),
    tables=(replace(WIDE, width=2), SLIDING, replace(OWN, width=64), HALVES, BLOCKS),
    tests=(0, 1) * 4,
)


def shapes_for(content, impl):
    """The gradient of a call as a function, and its argument shapes."""
    inputs, do, dlse = content.case.arrays()
    vectors, arrays = content.bits()[0], [arrays_of(m) for m in content.masks()]
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (inputs, vectors, arrays, do, dlse),
    )
    return gradient_of(content, impl), args


@pytest.mark.slow
def test_machine_code_for_a_tpu():
    f, args = shapes_for(replace(ON_CHIP, block_kv=256, block_q=128), "tpu")
    compiled = compiling.compile_for(f, args, "tpu-v5e")
    assert compiled.as_text().count("tpu_custom_call") >= 3


def test_lowers_for_a_gpu():
    f, args = shapes_for(ON_CHIP, "triton")
    with warnings.catch_warnings():
        # jax 0.11 and later warn that Pallas Triton is deprecated.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        lowered = compiling.lower_for(f, args, "h100")
    names = [kernel.name for kernel in triton_ir.triton_kernels(lowered)]
    assert names == ["forward_kernel", "dq_kernel", "dkv_kernel"]
