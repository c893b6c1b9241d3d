"""The Triton kernels: values in the interpreter, and lowering for GPUs."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracle
import pytest
from jax import test_util
from jax.sharding import PartitionSpec
from kernel_cases import PATTERNS, Case, Pattern

from lowering.targets import compiling, triton_ir
from pallas_kernels import dispatch
from pallas_kernels.block_mask import blank, check, from_runs
from pallas_kernels.call import Call, Inputs, Masks, Outputs, Vectors
from pallas_kernels.config import Tile
from pallas_kernels.triton import default_tiles

SMALL = Case(pattern=PATTERNS[4], q_len=45, kv_len=45, q_heads=4)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiles without optimisations: compiling takes longer than running once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def attend(case, interpret=True):
    """``f(inputs, vectors) -> o, lse`` of a case."""
    masks, call = case.masks(), case.call(interpret=interpret)

    def f(inputs, vectors):
        return dispatch.attend(inputs, vectors, masks, call, impl="triton")

    return f


def loss(case):
    """A scalar of both outputs; an empty row adds a constant."""
    f, (_, do, dlse) = attend(case), case.arrays()

    def of(inputs, vectors):
        o, lse = f(inputs, vectors)
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(o.astype(jnp.float32) * do) + jnp.sum(lse * dlse)

    return of


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", kernel_cases.params(), ids=str)
def test_table(case):
    case.check("triton", interpret=True)


def stacked(case, count=2):
    cases = [replace(case, seed=seed) for seed in range(count)]
    inputs = [c.arrays()[0] for c in cases]
    return inputs, jax.tree.map(lambda *xs: jnp.stack(xs), *inputs)


def test_vmap():
    case = replace(SMALL, pattern=Pattern("segments", segments=True))
    f, vectors = jax.jit(attend(case)), case.vectors()
    inputs, batch = stacked(case)
    together = jax.jit(jax.vmap(f, in_axes=(0, None)))(batch, vectors)
    for i, one in enumerate(inputs):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_array_equal(a[i], b),
            together, f(one, vectors),
        )  # fmt: skip


@pytest.mark.slow
def test_vmap_of_gradient():
    gradient = jax.jit(jax.grad(loss(SMALL)))
    inputs, batch = stacked(SMALL)
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(batch, SMALL.vectors())
    for i, one in enumerate(inputs):
        expected = gradient(one, SMALL.vectors())
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


@pytest.mark.slow
def test_checkpoint():
    f, (inputs, _, _) = loss(SMALL), SMALL.arrays()
    expected = jax.jit(jax.grad(f))(inputs, SMALL.vectors())
    actual = jax.jit(jax.grad(jax.checkpoint(f)))(inputs, SMALL.vectors())
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_shard_map():
    case = replace(SMALL, batch=4, q_heads=2, kv_heads=1)
    # All batch entries share the plan; a shard has one batch entry.
    f, (inputs, do, _) = attend(case), case.arrays()
    mesh = jax.make_mesh((4,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("b")
    shard = partial(
        jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )

    def total(run, inputs):
        return jnp.sum(run(inputs) * do)

    def run(inputs):
        return f(inputs, case.vectors()).o

    expected = jax.jit(jax.grad(partial(total, run)))(inputs)
    actual = jax.jit(jax.grad(partial(total, shard(run))))(inputs)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_check_grads():
    case = Case(pattern=PATTERNS[3], batch=1, q_len=20, kv_len=20)
    inputs, _, _ = case.arrays()

    def f(inputs):
        return tuple(attend(case)(inputs, case.vectors()))

    test_util.check_grads(
        jax.jit(f), (inputs,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2
    )


@pytest.mark.slow
def test_second_derivative():
    case = replace(SMALL, q_len=20, kv_len=20, batch=1)
    inputs, vectors = case.arrays()[0], case.vectors()

    def slope(impl_loss, inputs):
        return sum(jnp.sum(g**2) for g in jax.grad(impl_loss)(inputs, vectors))

    def dense(inputs, vectors):
        pairs = jnp.asarray(case.pairs())
        o, lse = oracle.attention(*inputs, pairs, case.dim**-0.5)
        lse = jnp.where(pairs.any(axis=-1), lse, 0.0)
        _, do, dlse = case.arrays()
        return jnp.sum(o * do) + jnp.sum(lse * dlse)

    actual = jax.jit(jax.grad(partial(slope, loss(case))))(inputs)
    expected = jax.jit(jax.grad(partial(slope, dense)))(inputs)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_backward_repeats_bitwise():
    case = replace(SMALL, dtype="bfloat16", kv_heads=1)
    inputs, do, dlse = case.arrays()
    _, pull = jax.vjp(attend(case), inputs, case.vectors())
    pull = jax.jit(pull)
    one, two = pull(Outputs(do, dlse))[0], pull(Outputs(do, dlse))[0]
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_full_runs_never_ask_the_predicate():
    case = Case(q_len=128, kv_len=128, pattern=Pattern("full"), batch=1)
    inputs, _, _ = case.arrays()
    asked = replace(case.call(interpret=True), predicate=Pattern("empty"))

    def run(call):
        def f(inputs):
            return dispatch.attend(
                inputs, case.vectors(), case.masks(), call, impl="triton"
            )

        out, pull = jax.vjp(jax.jit(f), inputs)
        return (*out, *pull(out)[0])

    for a, b in zip(run(asked), run(case.call(interpret=True)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_outside_of_runs_are_never_read():
    # Of four blocks of 32, the last query block sees keys from 59 on.
    case = Case(pattern=PATTERNS[2], q_len=128, kv_len=128, batch=1)
    inputs, do, dlse = case.arrays()
    assert not case.pairs()[0, 0, 96:, :32].any()
    poison = Inputs(
        inputs.q,
        inputs.k.at[:, :, :32].set(jnp.nan),
        inputs.v.at[:, :, :32].set(jnp.inf),
    )

    @jax.jit
    def run(inputs):
        out, pull = jax.vjp(lambda x: attend(case)(x, case.vectors()), inputs)
        return (*out, *pull(Outputs(do, dlse))[0])

    clean, dirty = run(inputs), run(poison)
    # Late queries see no poisoned key, and only late queries see late keys.
    for a, b in zip(clean, dirty, strict=True):
        assert np.isfinite(b[:, :, 96:]).all()
        np.testing.assert_array_equal(a[:, :, 96:], b[:, :, 96:])
    assert not np.isfinite(dirty[0][:, :, :32]).any()


@pytest.mark.slow
def test_traced_run_lists():
    case = replace(SMALL, pattern=Pattern("two maps", maps=2))
    inputs, vectors = case.arrays()[0], case.vectors()
    call, host = case.call(interpret=True), case.masks()

    def gradients(masks, inputs):
        def total(inputs):
            out = dispatch.attend(inputs, vectors, masks, call, impl="triton")
            return out.o.sum() + out.lse.sum()

        return jax.grad(total)(inputs)

    traced = jax.jit(gradients)(jax.tree.map(jnp.asarray, host), inputs)
    static = jax.jit(partial(gradients, host))(inputs)
    for a, b in zip(traced, static, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile(block_q=48, block_kv=32), "block_q=48.*power of two.*64"),
        (Tile(block_q=32, block_kv=8), "block_kv=8.*power of two.*16"),
        (Tile(block_q=32, block_kv=32, num_warps=3), "num_warps=3.*power of two"),
    ],
)
def test_refuses_tiles(tile, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, forward=tile).actual("triton", interpret=True)


# Lowering for GPUs, without one.

# jax 0.11 and later warn that Pallas Triton is deprecated.
DEPRECATED = "The Pallas Triton backend is deprecated"


def lowered(case, target="h200"):
    """The lowered value and gradient of a case."""
    masks, call = case.masks(), case.call()

    def f(inputs, vectors):
        def total(inputs):
            out = dispatch.attend(inputs, vectors, masks, call, impl="triton")
            return out.o.astype(jnp.float32).sum()

        return jax.value_and_grad(total)(inputs)

    inputs, _, _ = case.arrays()
    return quietly_lowered(f, (inputs, case.vectors()), target)


def quietly_lowered(f, args, target):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED)
        return compiling.lower_for(f, args, target)


LOWERED = [
    Case(
        pattern=p, dtype=t, dim=d, dim_v=d, q_heads=4, kv_heads=h, q_len=300, kv_len=300
    )
    for p, t, d, h in (
        (PATTERNS[1], "bfloat16", 128, 2),
        (PATTERNS[2], "bfloat16", 64, 4),
        (PATTERNS[3], "float16", 128, 1),
        (PATTERNS[6], "float16", 64, 2),
        (PATTERNS[4], "float32", 128, 2),
        (PATTERNS[1], "float32", 64, 4),
        (PATTERNS[7], "bfloat16", 128, 2),
        (PATTERNS[8], "bfloat16", 64, 2),
    )
]


def with_default_tiles(case):
    lengths = case.q_len, case.kv_len
    tiles = default_tiles(lengths, case.dim, case.dim_v, case.dtype)
    return replace(case, forward=tiles.forward, dkv=tiles.dkv)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_a_gpu(case):
    case = with_default_tiles(case)
    forward, dq, dkv = triton_ir.triton_kernels(lowered(case))
    names = [kernel.name for kernel in (forward, dq, dkv)]
    assert names == ["forward_kernel", "dq_kernel", "dkv_kernel"]
    for kernel, tile in ((forward, case.forward), (dq, case.forward), (dkv, case.dkv)):
        assert kernel.num_warps == tile.num_warps
        assert kernel.num_stages == tile.num_stages
        # Loops that Triton pipelines are scf.for.
        assert "scf.for" in kernel.code
        assert "scf.while" not in kernel.code
        exact = case.dtype == "float32"
        assert ("inputPrecision = tf32" in kernel.code) == (not exact)
    blocks = -(-case.q_len // case.forward.block_q)
    assert forward.grid == dq.grid == (blocks, case.q_heads, case.batch)
    assert dkv.grid[1:] == (case.kv_heads, case.batch)


@pytest.mark.sample(2)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_predicates_lower(pattern):
    case = Case(pattern=pattern, q_len=70, kv_len=70)
    assert len(triton_ir.triton_kernels(lowered(case, "a100"))) == 3


def test_only_needed_loops_are_there():
    def loops(case):
        forward, *_ = triton_ir.triton_kernels(lowered(case))
        return forward.code.count("scf.for")

    sizes = {"q_len": 128, "kv_len": 128}
    # One loop over runs and one over the blocks of each kind. Rows whose sums are not
    # finite run again (careful), with two loops: runs, and blocks of one kind.
    careful = 2
    assert loops(Case(pattern=Pattern("full"), **sizes)) == 2 + careful
    assert loops(Case(pattern=Pattern("strided"), **sizes)) == 2 + careful
    assert loops(Case(pattern=Pattern("causal"), **sizes)) == 3 + careful


def test_lowers_a_long_sequence():
    length = 131_072
    tiles = default_tiles((length, length), 128, 128, "bfloat16")
    masks = Masks(
        *(
            causal_mask(length, tile, by)
            for tile, by in ((tiles.forward, "q"), (tiles.dq, "q"), (tiles.dkv, "kv"))
        )
    )
    for mask in masks:
        check(mask)
    call = Call(Pattern("causal"), 128**-0.5, tiles)
    q = jax.ShapeDtypeStruct((1, 8, length, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 2, length, 128), jnp.bfloat16)

    def f(inputs):
        def total(inputs):
            out = dispatch.attend(inputs, Vectors(), masks, call, impl="triton")
            return out.o.astype(jnp.float32).sum()

        return jax.grad(total)(inputs)

    program = quietly_lowered(f, (Inputs(q, kv, kv),), "h100")
    forward, *_ = triton_ir.triton_kernels(program)
    assert forward.grid == (length // 128, 8, 1)
    # The plan is linear in the length: two runs per row.
    assert len(program.as_text()) < 1_000_000
    assert "tt.dot" in triton_ir.triton_ir(program)


def test_vmap_adds_no_loop_around_the_kernel():
    case = Case(pattern=Pattern("causal"), batch=1)
    f = attend(case, interpret=False)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype),
        case.arrays()[0],
    )
    program = quietly_lowered(
        lambda x: jax.vmap(lambda y: f(y, case.vectors()))(x), (batch,), "h200"
    )
    assert len(triton_ir.triton_kernels(program)) == 1
    assert "stablehlo.while" not in program.as_text()


def causal_mask(length, tile, by):
    like = blank(length, length, tile.block_q, tile.block_kv, by)
    rows = np.arange(like.num_rows)
    if by == "q":
        full = rows * tile.block_q // tile.block_kv
        last = ((rows + 1) * tile.block_q - 1) // tile.block_kv + 1
        edges = [np.zeros_like(rows), full, last]
        kinds = [1, 0]
    else:
        first = rows * tile.block_kv // tile.block_q
        full = -(-((rows + 1) * tile.block_kv - 1) // tile.block_q)
        edges = [first, full, np.full_like(rows, like.num_columns)]
        kinds = [0, 1]
    start, stop = np.stack(edges[:2], 1).ravel(), np.stack(edges[1:], 1).ravel()
    kept = start < stop
    return from_runs(
        np.repeat(rows, 2)[kept], start[kept], stop[kept],
        np.tile(kinds, len(rows))[kept], map_of_head=np.zeros(8, int), like=like,
    )  # fmt: skip
