"""Lists in Pallas Triton: values in the interpreter, and lowering for GPUs."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

import sadsl as sa
from lowering.targets import compiling, triton_ir
from pallas_kernels.call import Inputs, Outputs, Vectors
from pallas_kernels.lists import dispatch
from pallas_kernels.lists.call import ListCall, num_blocks
from pallas_kernels.lists.triton.tiles import dims_of, tiles
from pallas_kernels.shared_values import of_keys


def causal(test, q, k, q_vectors, kv_vectors, bits):
    return k <= q


def documents(test, q, k, q_vectors, kv_vectors, bits):
    return (k <= q + 3) & (q_vectors[0] == kv_vectors[0])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call by random lists; some are short or empty, and all ascend."""

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    groups: int = 1
    lists: int = 1
    q_len: int = 37
    kv_len: int = 37
    dim: int = 8
    dim_v: int = 8
    block_q: int = 1
    block_kv: int = 1
    listed: int = 7
    popular: int | None = None  # only so many blocks are in lists
    soft_cap: float | None = None
    dtype: str = "float32"
    values: tuple[int, int] | None = None  # dim_v is then their number
    predicate: object = causal

    def __str__(self):
        heads = f"h{self.q_heads}-{self.kv_heads}-g{self.groups}x{self.lists}"
        size = f"{self.q_len}x{self.kv_len}-d{self.dim}-{self.dim_v}"
        blocks = f"b{self.block_q}-{self.block_kv}-{self.listed}"
        size += f"-values{self.values}" if self.values else ""
        return f"{heads}-{size}-{blocks}-{self.dtype}-{self.predicate.__name__}"

    def call(self, interpret=True):
        return ListCall(
            self.predicate, self.dim**-0.5, self.block_q, self.block_kv,
            self.soft_cap, interpret, self.values,
        )  # fmt: skip

    def index(self):
        """No list has block 1. Entries of no block are below 0, or above the last."""
        rng = np.random.default_rng(1)
        blocks = num_blocks(self.kv_len, self.block_kv)
        listable = np.delete(np.arange(blocks), 1)[: self.popular]
        rows = num_blocks(self.q_len, self.block_q)
        lead = self.lists, self.groups, rows
        index = np.empty((*lead, self.listed), np.int32)
        for at in np.ndindex(*lead):
            count = rng.integers(0, min(self.listed, len(listable)) + 1)
            chosen = np.sort(rng.choice(listable, count, replace=False))
            none = rng.choice([-1, blocks, 2**31 - 1], self.listed - count)
            index[at] = np.concatenate([chosen, none])
        return jnp.asarray(index)

    def vectors(self):
        if self.predicate is causal:
            return Vectors()
        rng = np.random.default_rng(2)
        q = rng.integers(0, 3, (self.batch, 1, self.q_len))
        kv = rng.integers(0, 3, (self.batch, 1, self.kv_len))
        return Vectors((jnp.asarray(q, jnp.int32),), (jnp.asarray(kv, jnp.int32),))

    def pairs(self):
        """bool ``[batch, q_heads, q, kv]``, by loops."""
        index, blocks = np.asarray(self.index()), num_blocks(self.kv_len, self.block_kv)
        shape = self.batch, self.q_heads, self.q_len, self.kv_len
        found = np.zeros(shape, bool)
        q, k = np.arange(self.q_len)[:, None], np.arange(self.kv_len)[None]
        vectors = self.vectors()
        for b, h, row in np.ndindex(self.batch, self.q_heads, index.shape[2]):
            group = h * self.groups // self.q_heads
            here = slice(row * self.block_q, (row + 1) * self.block_q)
            for block in index[b if self.lists > 1 else 0, group, row]:
                if 0 <= block < blocks:
                    first = block * self.block_kv
                    found[b, h, here, first : first + self.block_kv] = True
        for b in range(self.batch):
            q_vectors = tuple(np.asarray(x)[b, 0][:, None] for x in vectors.q)
            kv_vectors = tuple(np.asarray(x)[b, 0][None] for x in vectors.kv)
            found[b] &= self.predicate(0, q, k, q_vectors, kv_vectors, ())
        return found

    def arrays(self):
        """Inputs and cotangents; keys that no query sees are NaN."""
        rng = np.random.default_rng(0)

        def normal(*shape, dtype=self.dtype):
            return jnp.asarray(rng.normal(size=shape), dtype)

        q = normal(self.batch, self.q_heads, self.q_len, self.dim)
        k = normal(self.batch, self.kv_heads, self.kv_len, self.dim)
        v = normal(self.batch, self.kv_heads, self.kv_len, self.dim_v)
        seen = self.pairs().any(axis=2)
        seen = seen.reshape(self.batch, self.kv_heads, -1, self.kv_len).any(axis=2)
        assert not seen.all()
        k, v = (jnp.where(seen[..., None], x, jnp.nan).astype(x.dtype) for x in (k, v))
        # Where values are channels of the keys, v is not read.
        v = v * jnp.nan if self.values else v
        do = normal(self.batch, self.q_heads, self.q_len, self.dim_v)
        return Inputs(q, k, v), Outputs(do, normal(*do.shape[:3], dtype="float32"))

    def run(self, impl="triton"):
        """Values and gradients, jitted."""
        call, vectors = self.call(impl == "triton"), self.vectors()

        @jax.jit
        def run(inputs, cotangent, index):
            def f(inputs):
                return dispatch.attend(inputs, vectors, index, call, impl=impl)

            out, pull = jax.vjp(f, inputs)
            return (*out, *pull(cotangent)[0])

        return oracle.Result(*run(*self.arrays(), self.index()))

    def loss(self, impl="triton"):
        """A scalar of both outputs as a function of the inputs."""
        call, vectors, index = self.call(impl == "triton"), self.vectors(), self.index()
        weights = self.arrays()[1]

        def f(inputs):
            o, lse = dispatch.attend(inputs, vectors, index, call, impl=impl)
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return jnp.sum(o * weights.o) + jnp.sum(lse * weights.lse)

        return f


def sampled(cases):
    """The first case; the others are slow."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


SMALL = Case(batch=1, q_len=13, kv_len=13, listed=3, q_heads=2, kv_heads=1)
CASES = [
    # Rows of several queries, cells of several keys, lists of each query head, which
    # share key heads; documents differ.
    Case(groups=4, lists=2, block_q=3, block_kv=4, listed=3, soft_cap=2.0, q_len=38,
         dim_v=11, predicate=documents),
    # One key for each entry; batch entries share the lists.
    Case(q_len=13, kv_len=37, dim_v=11, predicate=documents),
    Case(groups=2, kv_heads=4, listed=40),
    Case(groups=2, lists=2, block_kv=20, listed=2, kv_len=130, dim=11),
    Case(q_heads=1, kv_heads=1, q_len=1, kv_len=130, predicate=documents),
    Case(q_heads=1, kv_heads=1, batch=1, q_len=130, kv_len=2, listed=1),
    Case(q_heads=6, kv_heads=1, groups=2, block_q=5, dtype="bfloat16", dim_v=16),
    Case(block_q=16, block_kv=16, listed=2, dtype="float16", predicate=documents),
    # More members than a program has rows, and blocks of more keys than one has.
    Case(q_heads=40, kv_heads=1, block_q=2, q_len=5, kv_len=150, block_kv=70, listed=2,
         batch=1, dim_v=200),
    # Values are channels of the keys: some of them, then all.
    Case(q_heads=6, kv_heads=1, groups=2, block_q=3, block_kv=4, listed=3, lists=2,
         dim=40, dim_v=32, values=(0, 32), soft_cap=2.0, predicate=documents),
    Case(q_heads=4, kv_heads=2, dim=16, dim_v=16, values=(0, 16)),
    # All queries list the same few keys, so their span has several stretches.
    Case(q_heads=32, kv_heads=1, q_len=130, kv_len=200, listed=4, popular=4, batch=1),
]  # fmt: skip


@pytest.mark.parametrize("case", sampled(CASES), ids=str)
def test_table(case):
    found, pairs = case.run(), case.pairs()
    inputs, (do, dlse) = case.arrays()
    if case.values:
        inputs = inputs._replace(v=of_keys(inputs.k, case.values))
    assert not pairs.any(axis=-1).all()  # some row is empty
    clean = (np.nan_to_num(np.asarray(x, np.float64)) for x in inputs)
    expected = oracle.with_gradients(
        *clean, pairs, case.dim**-0.5, case.soft_cap, do=do, dlse=dlse
    )
    if case.values:
        rest = [(0, 0)] * 3 + [(case.values[0], case.dim - case.values[1])]
        dk = expected.dk + np.pad(expected.dv, rest)
        expected = expected._replace(dk=dk, dv=0 * expected.dv)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        oracle.assert_close(a, b, case.dtype, f"{case} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6], CASES[9]], ids=str)
def test_equals_the_xla_path(case):
    tolerance = 2e-6 if case.dtype == "float32" else 2e-2
    for a, b in zip(case.run(), case.run("xla"), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.slow
def test_gradients_repeat_bitwise():
    case = replace(CASES[0], dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, case.run(), case.run())


@pytest.mark.slow
def test_second_derivative():
    inputs = jax.tree.map(jnp.nan_to_num, SMALL.arrays()[0])

    def slope(loss, inputs):
        return sum(jnp.sum(g**2) for g in jax.grad(loss)(inputs))

    actual, expected = (
        jax.jit(jax.grad(partial(slope, SMALL.loss(impl))))(inputs)
        for impl in ("triton", "xla")
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["vmap", "checkpoint", "shard_map"])
def test_transformations(way):
    """The gradients of a loss, for each of four inputs."""
    gradient = jax.grad(SMALL.loss())
    inputs = SMALL.arrays()[0]
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1, -x]), inputs)
    expected = jax.jit(partial(jax.lax.map, gradient))(several)
    mapped = jax.vmap(gradient)
    if way == "checkpoint":
        mapped = jax.vmap(jax.grad(jax.checkpoint(SMALL.loss())))
    if way == "shard_map":
        mesh = jax.make_mesh((4,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = PartitionSpec("b")
        mapped = jax.shard_map(
            mapped, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False
        )
    for a, b in zip(jax.jit(mapped)(several), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_public_call():
    rng = np.random.default_rng(4)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 37, h, 8)), jnp.float32) for h in (4, 2, 2)
    )
    map = sa.causal() & sa.topk(
        5, block=1, block_q=1, scope="shared", eligible=sa.causal()
    )

    def gradients(**options):
        def total(*qkv):
            return jnp.sum(jnp.cos(sa.attention(*qkv, map, **options)))

        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    config = sa.KernelConfig(lists=True)
    found = gradients(impl="triton", interpret=True, config=config)
    for a, b in zip(found, gradients(impl="reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    text = str(jax.make_jaxpr(lambda: gradients(
        impl="triton", interpret=True, config=config
    ))())  # fmt: skip
    assert "sadsl_lists_backward_kv" in text


def test_refuses_lists_that_32_bits_cannot_count():
    q = jax.ShapeDtypeStruct((1, 128, 2**21, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 1, 2**21, 64), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((1, 1, 2**21, 8), jnp.int32)
    f = partial(dispatch.attend, call=ListCall(causal, 1.0), impl="triton")
    with pytest.raises(NotImplementedError, match=r"2097152 lists.*128.*fewer queries"):
        jax.eval_shape(f, Inputs(q, kv, kv), Vectors(), index)


# --- Lowering for GPUs, without one ---

NAMES = ["forward", "backward_q", "backward_kv", "backward_kv_sum"]
LONG = Case(batch=1, q_heads=64, kv_heads=1, q_len=131_072, kv_len=131_072, dim=576,
            dim_v=512, listed=2048, dtype="bfloat16")  # fmt: skip
LOWERED = [
    Case(q_heads=8, kv_heads=1, listed=200, dim=128, dim_v=128, dtype="bfloat16"),
    Case(dim=64, dim_v=48, groups=4, lists=2, block_q=3, block_kv=4, listed=100,
         dtype="float16", soft_cap=30.0, predicate=documents),
    Case(dim=128, dim_v=128, groups=2, kv_heads=4, listed=100),
    Case(dim=64, dim_v=64, block_q=16, block_kv=64, dtype="bfloat16"),
    LONG,
    replace(LONG, values=(0, 512)),
    Case(dim=64, dim_v=64, values=(0, 64), listed=300, dtype="bfloat16"),
]  # fmt: skip


def lowered(case, batched=0):
    """The gradient of a case, lowered for a GPU; perhaps a batch of them."""
    call = case.call(interpret=False)
    q = case.batch, case.q_heads, case.q_len, case.dim
    kv = case.batch, case.kv_heads, case.kv_len
    rows = num_blocks(case.q_len, case.block_q)
    index = case.lists, case.groups, rows, case.listed
    lead = (batched,) if batched else ()

    def struct(shape, dtype=case.dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    inputs = Inputs(struct(q), struct((*kv, case.dim)), struct((*kv, case.dim_v)))

    def gradient(inputs, index):
        def total(inputs):
            o, lse = dispatch.attend(inputs, case.vectors(), index, call, impl="triton")
            return o.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(total)(inputs)

    f = jax.vmap(gradient) if batched else gradient
    return compiling.lower_for(f, (inputs, struct(index, "int32")), "h100")


@pytest.mark.parametrize("case", sampled(LOWERED), ids=str)
def test_lowers_for_a_gpu(case):
    kernels = triton_ir.triton_kernels(lowered(case))
    assert [kernel.name for kernel in kernels] == [f"sadsl_lists_{n}" for n in NAMES]
    for kernel in kernels:
        # Loops that Triton pipelines are scf.for.
        assert "scf.for" in kernel.code
        assert "scf.while" not in kernel.code
        assert "atomic" not in kernel.code
    for kernel in kernels[:3]:
        exact = case.dtype == "float32"
        assert ("inputPrecision = tf32" in kernel.code) == (not exact)
    rows, units = num_blocks(case.q_len, case.block_q), max(case.groups, case.kv_heads)
    members = case.block_q * case.q_heads // units
    like = Inputs(*(jnp.zeros(n) for n in (case.dim, case.dim, case.dim_v)))
    tile = tiles(members, 16, dims_of(like, case.values), case.dtype).forward
    grid = rows * tile.parts(members), units, case.batch
    assert kernels[0].grid == grid
    assert kernels[2].grid[1:] == kernels[3].grid[1:] == (case.kv_heads, case.batch)


@pytest.mark.slow
def test_vmap_adds_no_loop_around_the_kernels():
    program = lowered(LOWERED[0], batched=3)
    assert len(triton_ir.triton_kernels(program)) == 4
    assert "stablehlo.while" not in program.as_text()
