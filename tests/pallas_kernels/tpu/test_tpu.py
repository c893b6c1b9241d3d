"""The TPU kernels: values in the interpreter, machine code through libtpu."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from kernel_cases import Case, Pattern

from lowering.targets import compiling
from pallas_kernels import dispatch, tpu
from pallas_kernels.block_mask import FULL, blank, from_blocks, from_runs
from pallas_kernels.call import Inputs, Masks, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.tpu import runs

SMALL = Case(batch=2, q_len=50, kv_len=50, pattern=Pattern("window"))
SEGMENTS = replace(SMALL, pattern=Pattern("segments", segments=True), q_heads=4)
CHIPS = ("tpu-v5e", "tpu-v6e", "tpu7x")


@pytest.fixture
def quick():
    """Compiles without optimisations, since compiling takes most of a test's time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def attend(case, inputs, vectors=None, masks=None, interpret=True):
    vectors = case.vectors() if vectors is None else vectors
    masks = masks or case.masks()
    call = case.call(interpret=interpret)
    return dispatch.attend(inputs, vectors, masks, call, impl="tpu")


def prepared(case, masks, **options):
    return tpu.prepare(masks, case.call(**options), shapes(case)[0])


def loss(case, inputs, *args, **options):
    o, lse = attend(case, inputs, *args, **options)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse))


def arrays_of(mask, keep=None):
    """The run lists of a mask as arrays to trace, cut to the first ``keep`` rows."""
    names = ("row_ptr", "run_start", "run_stop", "run_full")
    arrays = {name: jnp.asarray(getattr(mask, name)) for name in names}
    if keep is not None:
        arrays["row_ptr"] = jnp.minimum(arrays["row_ptr"], mask.row_ptr[keep])
    return arrays


def with_arrays(masks, arrays):
    """The masks with their run lists replaced by ``arrays``, perhaps tracers."""
    pairs = zip(masks, arrays, strict=True)
    return Masks(*(replace(mask, **traced) for mask, traced in pairs))


def assert_same(actual, expected, tolerance=1e-5):
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@pytest.mark.usefixtures("quick")
class TestValues:
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("case", kernel_cases.params(), ids=str)
    def test_table(self, case):
        case.check("tpu", interpret=True)

    @pytest.mark.slow
    def test_blocks_of_whole_registers(self):
        tile = Tile(block_q=128, block_kv=256)
        case = Case(q_len=300, kv_len=300, dim=64, dim_v=128, forward=tile, dkv=tile)
        case.check("tpu", interpret=True)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("mode", "pattern"),
        [
            ("on_wait", Pattern("segments", segments=True)),
            ("eager", Pattern("holes")),
        ],
        ids=str,
    )
    def test_no_race(self, mode, pattern):
        params = pltpu.InterpretParams(
            dma_execution_mode=mode, detect_races=True, out_of_bounds_reads="raise"
        )
        case = replace(SMALL, pattern=pattern, q_len=90, kv_len=70, batch=1)
        case.check("tpu", interpret=params)


@pytest.mark.usefixtures("quick")
class TestBlocks:
    def masks_of(self, kinds, case):
        """The masks of a table of kinds ``[q blocks, kv blocks]``."""
        heads = case.map_of_head()
        like = blank(case.q_len, case.kv_len, 32, 32)
        rows = from_blocks(kinds[None], map_of_head=heads, like=like)
        return Masks(rows, rows, rows.transpose())

    @pytest.mark.slow
    def test_a_full_block_never_asks_the_predicate(self):
        case = replace(SMALL, q_len=64, kv_len=64, pattern=Pattern("empty"))
        case = replace(case, dkv=case.forward)
        masks = self.masks_of(np.full((2, 2), FULL, np.int8), case)
        inputs, *_ = case.arrays()
        actual = jax.jit(jax.value_and_grad(partial(loss, case, masks=masks)))(inputs)
        full = replace(case, pattern=Pattern("full"))
        expected = jax.jit(jax.value_and_grad(partial(loss, full)))(inputs)
        assert_same(actual, expected, 0)

    @pytest.mark.slow
    def test_an_absent_block_is_never_read(self):
        case = replace(SMALL, q_len=64, kv_len=96, pattern=Pattern("full"))
        case = replace(case, dkv=case.forward)
        kinds = np.zeros((2, 3), np.int8)
        kinds[0, 0] = kinds[1, 2] = FULL
        masks = self.masks_of(kinds, case)
        inputs, *_ = case.arrays()
        poisoned = Inputs(
            inputs.q,
            inputs.k.at[:, :, 32:64].set(jnp.nan),
            inputs.v.at[:, :, 32:64].set(jnp.inf),
        )
        run = jax.jit(jax.value_and_grad(partial(loss, case, masks=masks)))
        assert_same(run(poisoned), run(inputs), 0)

    @pytest.mark.slow
    def test_gradients_repeat_bit_by_bit(self):
        inputs, *_ = SEGMENTS.arrays()
        run = jax.jit(jax.grad(partial(loss, SEGMENTS)))
        assert_same(run(inputs), run(inputs), 0)


@pytest.mark.usefixtures("quick")
class TestTransforms:
    def examples(self, case, count=2):
        found = [replace(case, seed=i) for i in range(count)]
        inputs = [c.arrays()[0] for c in found]
        vectors = [c.vectors() for c in found]
        stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
        return inputs, vectors, stack(*inputs), stack(*vectors)

    def test_vmap(self):
        each, vectors, inputs, stacked = self.examples(SEGMENTS)
        one = jax.jit(partial(attend, SEGMENTS))
        out = jax.jit(jax.vmap(one))(inputs, stacked)
        for i, (x, y) in enumerate(zip(each, vectors, strict=True)):
            assert_same(jax.tree.map(lambda a, i=i: a[i], out), one(x, y))

    @pytest.mark.slow
    def test_vmap_of_grad_with_shared_vectors_and_values(self):
        each, vectors, inputs, _ = self.examples(SEGMENTS)
        shared = each[0].v

        def value(q, k):
            return loss(SEGMENTS, Inputs(q, k, shared), vectors[0])

        one = jax.jit(jax.grad(value, argnums=(0, 1)))
        out = jax.jit(jax.vmap(one))(inputs.q, inputs.k)
        for i, x in enumerate(each):
            assert_same(jax.tree.map(lambda a, i=i: a[i], out), one(x.q, x.k))

    @pytest.mark.slow
    def test_vmap_of_vmap(self):
        case = replace(SEGMENTS, batch=1)
        each, vectors, inputs, _ = self.examples(case)
        one = jax.jit(lambda x: attend(case, x, vectors[0]))
        both = jax.jit(jax.vmap(jax.vmap(one)))
        out = both(jax.tree.map(lambda a: a[None], inputs))
        for i, x in enumerate(each):
            assert_same(jax.tree.map(lambda a, i=i: a[0, i], out), one(x))

    @pytest.mark.slow
    def test_checkpoint(self):
        inputs, *_ = SMALL.arrays()
        value = partial(loss, SMALL)
        plain, saved = jax.grad(value), jax.grad(jax.checkpoint(value))
        assert_same(jax.jit(saved)(inputs), jax.jit(plain)(inputs))

    @pytest.mark.slow
    def test_shard_map_over_batch(self):
        case = replace(SEGMENTS, batch=4)
        inputs, *_ = case.arrays()
        vectors, mesh = case.vectors(), Mesh(np.array(jax.devices()[:4]), ("b",))
        split = PartitionSpec("b")
        gradient = jax.grad(partial(loss, case))
        local = jax.shard_map(
            gradient, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
        )
        assert_same(jax.jit(local)(inputs, vectors), jax.jit(gradient)(inputs, vectors))

    @pytest.mark.slow
    def test_gradients_against_differences(self):
        case = Case(batch=1, q_heads=2, kv_heads=1, q_len=9, kv_len=9, dim=4, dim_v=4)
        inputs, *_ = case.arrays()
        run = jax.jit(partial(attend, case))
        check_grads(
            lambda *x: run(Inputs(*x)),
            inputs, order=1, modes=("rev",), atol=2e-2, rtol=2e-2, eps=1e-2,
        )  # fmt: skip


@pytest.mark.usefixtures("quick")
class TestTables:
    """Plans in table form: too long for scalar memory, or traced."""

    @pytest.mark.slow
    def test_a_long_plan(self, monkeypatch):
        monkeypatch.setattr(runs, "SCALAR_BYTES", 60)
        case = replace(SMALL, pattern=Pattern("two maps", maps=2), q_len=90)
        found = prepared(case, case.masks(), interpret=True)
        assert found.forward.table is not None
        assert found.backward.table is not None
        case.check("tpu", interpret=True)

    def test_an_empty_plan(self, monkeypatch):
        monkeypatch.setattr(runs, "SCALAR_BYTES", 60)
        replace(SMALL, pattern=Pattern("empty")).check("tpu", interpret=True)

    def valued(self, case):
        """``f(inputs, arrays)``: loss and gradient with traced plans."""
        plans = case.masks()

        def f(inputs, arrays):
            masks = with_arrays(plans, arrays)
            return jax.value_and_grad(partial(loss, case, masks=masks))(inputs)

        return f

    @pytest.mark.slow
    def test_traced(self):
        case = replace(SMALL, pattern=Pattern("holes"), q_len=90, q_heads=4)
        inputs, *_ = case.arrays()
        expected = jax.jit(jax.value_and_grad(partial(loss, case)))(inputs)
        arrays = [arrays_of(m) for m in case.masks()]
        assert_same(jax.jit(self.valued(case))(inputs, arrays), expected)

    @pytest.mark.slow
    def test_a_plan_for_each_example(self):
        tile = Tile(block_q=16, block_kv=16)
        case = Case(batch=2, q_heads=4, q_len=40, kv_len=40, forward=tile, dkv=tile)
        case = replace(case, pattern=Pattern("two maps", maps=2))
        inputs, *_ = case.arrays()
        plans = []
        for keep in (6, 3):
            # The second example has no runs in its last rows: same shapes, other runs.
            plans.append([arrays_of(m, keep) for m in case.masks()])
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *plans)
        value = self.valued(case)
        out = jax.jit(jax.vmap(value, in_axes=(None, 0)))(inputs, stacked)
        one = jax.jit(value)
        for i, plan in enumerate(plans):
            part = jax.tree.map(lambda a, i=i: a[i], out)
            assert_same(part, one(inputs, plan))

    def test_too_many_runs(self):
        mask = replace(SMALL.masks().forward, max_runs=60_000)
        mask = replace(mask, **arrays_of(mask))
        with pytest.raises(NotImplementedError, match="larger blocks"):
            prepared(SMALL, Masks(mask, mask, mask), interpret=True)

    def test_no_capacity(self):
        mask = replace(SMALL.masks().forward, max_runs=0)
        mask = replace(mask, **arrays_of(mask))
        with pytest.raises(ValueError, match="max_runs=0"):
            prepared(SMALL, Masks(mask, mask, mask), interpret=True)


@pytest.mark.parametrize(
    ("axis", "tile"),
    [
        ("block_q=64", Tile(block_q=64, block_kv=128)),
        ("block_kv=200", Tile(block_q=128, block_kv=200)),
    ],
)
def test_blocks_that_no_chip_takes(axis, tile):
    case = replace(SMALL, forward=tile)
    with pytest.raises(ValueError, match=axis):
        prepared(case, case.masks())


def band(n, block, window, by="q"):
    """The mask of ``q - window <= k <= q``, with a few runs per row."""
    like = blank(n, n, block, block, by)
    rows, reach = like.num_rows, window // block
    runs = []
    for i in range(rows):
        # A row of queries sees earlier keys; a row of keys is seen by later queries.
        near, far = (i, i - reach) if by == "q" else (i, i + reach)
        low, high = min(near, far), max(near, far)
        runs += [(i, j, j + 1, 0) for j in {low, high} if 0 <= j < rows]
        start, stop = max(low + 1, 0), min(high, rows)
        runs += [(i, start, stop, 1)] * (start < stop)
    columns = np.array(sorted(runs)).T
    return from_runs(*columns, map_of_head=np.zeros(4, np.int64), like=like)


def shapes(case):
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, case.dtype)

    q = of(case.batch, case.q_heads, case.q_len, case.dim)
    k = of(case.batch, case.kv_heads, case.kv_len, case.dim)
    vectors = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.vectors()
    )
    return Inputs(q, k, of(*k.shape[:3], case.dim_v)), vectors


def compile_gradient(case, target, masks=None):
    """Compiles both kernels of ``jax.grad`` through ``dispatch.attend``."""
    masks = masks or case.masks()

    def value(inputs, vectors):
        o, lse = attend(case, inputs, vectors, masks, interpret=False)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

    args = jax.value_and_grad(value), shapes(case), target
    # jaxlib cannot print what libtpu makes of copies on the SparseCore of a tpu7x.
    assert compiling.lower_for(*args).as_text().count("tpu_custom_call") >= 2
    return compiling.compile_for(*args)


def chip_case(block=256, **options):
    tile = Tile(block_q=block, block_kv=block)
    sizes = {"q_len": 700, "kv_len": 700, "q_heads": 4, "dtype": "bfloat16"}
    return Case(forward=tile, dkv=tile, **(sizes | options))


@pytest.mark.parametrize("target", CHIPS)
class TestMachineCode:
    @pytest.mark.slow
    def test_maps_of_heads(self, target):
        pattern = Pattern("two maps", maps=2)
        compile_gradient(chip_case(dim=64, dim_v=64, pattern=pattern), target)

    @pytest.mark.slow
    def test_segments_in_a_long_band(self, target):
        n, pattern = 131_072, Pattern("segments", segments=True)
        case = chip_case(q_len=n, kv_len=n, dim=128, dim_v=128, pattern=pattern)
        plan = partial(band, n, 256, 4096)
        masks = Masks(plan(), plan(), plan("kv"))
        assert len(masks.forward.run_start) > 1000
        compile_gradient(case, target, masks)


@pytest.mark.slow
def test_machine_code_of_default_tiles():
    tiles = tpu.default_tiles((700, 700), 128, 128, jnp.float32)
    pattern = Pattern("segments", segments=True)
    case = chip_case(dim=128, dim_v=128, dtype="float32", pattern=pattern, kv_heads=1)
    compile_gradient(replace(case, forward=tiles.forward, dkv=tiles.dkv), "tpu-v5e")


@pytest.mark.slow
def test_machine_code_of_long_causal():
    n = 131_072
    case = chip_case(512, q_len=n, kv_len=n, dim=64, dim_v=64, batch=1)
    masks = Masks(band(n, 512, n), band(n, 512, n), band(n, 512, n, "kv"))
    compile_gradient(case, "tpu-v6e", masks)


@pytest.mark.slow
def test_machine_code_of_a_vmapped_table():
    case = chip_case(128, dim=80, dim_v=40, soft_cap=5.0, batch=1)
    plans = case.masks()

    def value(inputs, arrays):
        masks = with_arrays(plans, arrays)
        o, _ = attend(case, inputs, Vectors(), masks, interpret=False)
        return jnp.sum(o.astype(jnp.float32))

    args = shapes(case)[0], [arrays_of(m) for m in plans]
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args)
    compiled = compiling.compile_for(jax.vmap(jax.grad(value)), batched, "tpu-v5e")
    assert " while(" not in compiled.as_text()
