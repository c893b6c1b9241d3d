"""Selections on every backend: composed, sorted, with skipped blocks, traced once."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BACKENDS, IMPLS, SMALL, arrays, assert_matches

import sadsl as sa
from lowering import pipeline
from sadsl.layers import attention_fn
from sadsl.run import softmax as execution
from sadsl.run.options import Options
from sadsl.run.types import Setting
from sadsl.selections import Selection, modalities

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


@dataclass(frozen=True)
class Cells(Selection):
    """A table of blocks from the signs of sums: a head and a batch entry each."""

    block_q: int
    block_kv: int

    def choose(self, content):
        def sums(x, block):
            x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))
            return x.reshape(*x.shape[:2], -1, block, x.shape[3]).sum(axis=3)

        q, k = content.queries(), content.keys()
        scores = jnp.einsum(
            "bhid,bhjd->bhij", sums(q, self.block_q), sums(k, self.block_kv)
        )
        return {"chosen": scores > 0}

    def pairs(self, q, k, h):
        return self.part("chosen")[h, q // self.block_q, k // self.block_kv] == 1


@dataclass(frozen=True)
class Slashes(Selection):
    """Distances that a head sees, the same for all batch entries."""

    def choose(self, content):
        heads, length = content.q.shape[1], content.k.shape[2]
        head, distance = jnp.arange(heads)[:, None], jnp.arange(length)[None]
        return {"slash": ((distance * 7 + head) % 5 < 2)[None]}

    def pairs(self, q, k, h):
        return (k <= q) & (self.part("slash")[h, sa.maximum(q - k, 0)] == 1)


@dataclass(frozen=True)
class Limits(Selection):
    """Keys of a small rank, one limit for each query: no pair is looked up."""

    def choose(self, content):
        rank = jnp.argsort(jnp.argsort(content.keys()[..., 0], axis=-1), axis=-1)
        return {"rank": rank, "limit": jnp.where(content.q[..., 1] > 0, 30, 10)}

    def pairs(self, q, k, h):
        return self.part("rank")[h, k] <= self.part("limit")[h, q]


@dataclass(frozen=True)
class Labels(Selection):
    """Queries and keys of one label."""

    count: int

    @property
    def order(self):
        return {"q": "q", "k": "k"}

    def choose(self, content):
        def label(x):
            return jnp.floor(x[..., 0] * 2.5).astype(jnp.int32) % self.count

        return {"q": label(content.queries()), "k": label(content.keys())}

    def pairs(self, q, k, h):
        return self.part("q")[h, q] == self.part("k")[h, k]


WINDOWS = sa.per_head(sa.window(3), sa.window(9))
KERNELS = "tpu", "triton"
SPECS = [
    sa.causal() & (sa.window(9) | Cells(7, 5)),
    (Cells(32, 16) | WINDOWS) - Cells(1, 64),
    Slashes() | (Cells(9, 70).T & sa.keys(0, 40)),
    sa.causal() & Limits(),
    sa.causal() & Labels(4),
    Labels(3) | WINDOWS,
]


def dense(spec, q, k):
    """The pairs of every batch entry and head, from what was chosen."""
    parts = sa.select(spec, q, k)
    return np.stack(
        [
            spec.dense(
                q.shape[1], k.shape[1], q.shape[2],
                operands={n: np.asarray(x)[b % len(x)] for n, x in parts.items()},
            )
            for b in range(len(q))
        ]
    )  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("impl", "spec"),
    [
        pytest.param(
            impl, spec, marks=pytest.mark.slow if i % 2 and impl in KERNELS else ()
        )
        for i, spec in enumerate(SPECS)
        for impl in IMPLS
    ],
    ids=repr,
)
def test_composed(impl, spec):
    q, k, v, do = arrays()
    pairs = dense(spec, q, k)
    assert 0 < pairs.mean() < 0.9
    assert_matches(impl, spec, pairs, q, k, v, do)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_of_blocks_of_the_user(impl):
    text = "where(lambda q, k, h: operand('mask')[h, q // 16, k // 24] == 1)"
    mask = np.random.default_rng(5).integers(0, 2, (2, 4, 5, 3)).astype(bool)
    pairs = np.kron(mask, np.ones((1, 1, 16, 24), bool))[:, :, :70, :70]
    q, k, v, do = arrays()
    assert_matches(impl, text, pairs, q, k, v, do, operands={"mask": mask})


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "triton"])
def test_query_offset(impl):
    q, k, v, do = arrays(q_len=20)
    spec = sa.causal() & (Slashes() | Cells(4, 16))
    parts = sa.select(spec, q, k, q_offset=50)
    parts = {name: np.asarray(x) for name, x in parts.items()}
    cells = np.kron(parts["Cells(block_q=4, block_kv=16).chosen"], np.ones((4, 16)))
    q_at, k_at = np.arange(50, 70)[:, None], np.arange(70)[None]
    slash = parts["Slashes().slash"][:, :, np.maximum(q_at - k_at, 0)]
    pairs = (k_at <= q_at) & (slash | (cells[:, :, :20, :70] > 0))
    assert_matches(impl, spec, pairs, q, k, v, do, q_offset=50)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton"])
def test_documents_that_cannot_meet_are_not_visited(impl):
    """Two documents in a sequence: what is wrong in one is not read by the other."""
    ids = jnp.repeat(jnp.array([[7, 3], [1, 1]]), 64, axis=1)
    q, k, v, _ = arrays(q_len=128, kv_len=128)
    k, v = (x.at[0, 64:].set(jnp.nan) for x in (k, v))
    options = BACKENDS[impl] | {"impl": impl, "config": SMALL}
    spec = sa.causal() & sa.segments()

    def call(q, k, v):
        return sa.attention(
            q, k, v, spec, q_segment_ids=ids, kv_segment_ids=ids, **options
        )

    o, pull = jax.vjp(call, q, k, v)
    dq, *_ = pull(jnp.ones_like(o))
    for x in (o, dq):
        assert np.isfinite(x[0, :64]).all()
        assert np.isnan(x[0, 64:]).all()
        assert np.isfinite(x[1]).all()


def test_one_trace_serves_any_content():
    def call(q, k, v):
        return sa.attention(q, k, v, SPECS[0], impl="xla", config=SMALL)

    q, k, v, _ = arrays(q_len=67)
    outs = [call(q, k, v)]
    # However many other tests have traced: from the first call on, none is added.
    before = execution.traced._cache_size()
    outs += [call(-q, k, v), call(q, 0 * k, v)]
    assert execution.traced._cache_size() == before > 0
    assert not np.allclose(outs[0], outs[1])


def largest(jaxpr):
    """The greatest number of entries of any array in a program."""
    sizes = [int(np.prod(x.aval.shape)) for e in jaxpr.eqns for x in e.outvars]
    params = jax.tree.leaves([list(e.params.values()) for e in jaxpr.eqns])
    inner = [getattr(x, "jaxpr", x) for x in params]
    return max([*sizes, *(largest(x) for x in inner if hasattr(x, "eqns"))], default=0)


def test_no_array_has_all_pairs():
    n = 4096
    q = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
    for spec in (sa.causal() & (sa.window(99) | Cells(64, 64)), Slashes(), Labels(8)):
        low = sa.lower(spec, q, q, q, gradient=True)
        jaxpr = jax.make_jaxpr(low.run)(*low.arguments)
        assert n * 16 <= largest(jaxpr.jaxpr) <= n * n / 8


def test_chosen_once_used_often():
    q, k, v, _ = arrays()
    spec = SPECS[0]
    parts = sa.select(spec, q, k)
    assert list(parts) == ["Cells(block_q=7, block_kv=5).chosen"]
    other = q[::-1]
    kept = sa.attention(other, k, v, spec, operands=parts, impl="reference")
    pairs = dense(spec, q, k)
    table = {"t": jnp.asarray(pairs)}
    told = "where(lambda q, k, h: operand('t')[h, q, k] == 1)"
    wanted = sa.attention(other, k, v, told, operands=table, impl="reference")
    np.testing.assert_allclose(kept, wanted, atol=1e-6)


def test_the_order_follows_the_label():
    """What is sorted is what was asked for, and a union is left in the given order."""
    problem = pipeline.Problem(64, 64, 4)

    def sorts(spec):
        options = Options(sa.softmax(spec), problem, Setting(1.0))
        return options.sorted_by is not None

    assert sorts(Labels(4))
    assert sorts(sa.causal() & Labels(4))
    assert not sorts(sa.causal() | Labels(4))
    assert not sorts(sa.per_head(Labels(4), sa.causal()))


@pytest.mark.slow
def test_second_derivatives_and_vmap():
    q, k, v, do = (x[0, :, :2] for x in arrays(kv_heads=4))
    spec = SPECS[0]

    def call(q, impl):
        o = sa.attention(*(x[None] for x in (q, k, v)), spec, impl=impl, config=SMALL)
        return jnp.vdot(o[0], do)

    def twice(impl):
        return jax.grad(lambda q: jnp.sum(jax.grad(call)(q, impl) ** 2))(q)

    np.testing.assert_allclose(twice("xla"), twice("reference"), atol=2e-4)
    many = jnp.stack([q, -q])
    mapped = jax.vmap(lambda q: call(q, "xla"))(many)
    np.testing.assert_allclose(mapped, [call(x, "xla") for x in many], atol=1e-4)


BAD = [
    ({"mask": np.ones((4, 3, 3), bool)}, r"shape \(4, 3, 3\) .* \[batch, 4, 5, 3\]"),
    ({"mask": np.ones((4, 5), bool)}, "must have 3 axes"),
    ({"mask": np.ones((4, 5, 3))}, "must be of integers"),
    ({}, "reads the run-time array 'mask', which was not given"),
]  # fmt: skip


@pytest.mark.parametrize(("operands", "message"), BAD)
def test_bad_operands(operands, message):
    text = "where(lambda q, k, h: operand('mask')[h, q // 16, k // 24] == 1)"
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match=message):
        sa.attention(q, k, v, text, operands=operands)


def test_one_size_of_key_blocks_where_pairs_are_looked_up():
    """Defaults that differ by kernel, as those of GPUs do, are brought into line."""
    shape = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)
    low = sa.lower(
        sa.causal() & Cells(64, 64), *[shape] * 3, target="h100", gradient=True
    )
    plain = sa.lower(sa.causal(), *[shape] * 3, target="h100")
    sizes = [
        {x.tiles.forward.block_kv, x.tiles.dq.block_kv, x.tiles.dkv.block_kv}
        for x in (low, plain)
    ]
    assert sizes[0] == {min(sizes[1])} != sizes[1]
    assert "dkv_kernel" in low.module
    config = sa.KernelConfig(block_kv=32, dkv=sa.Tile(block_q=32, block_kv=64))
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match=r"block_kv is 32 in the forward .* 64 in dkv"):
        sa.attention(q, k, v, SPECS[0], impl="xla", config=config)


def test_an_array_that_a_selection_and_the_map_read():
    mine = sa.where(lambda q, k: sa.operand("modality")[k] == 0)
    q, k, v, _ = arrays()
    given = {"modality": jnp.arange(70) // 20 % 2}
    spec = sa.causal() & (modalities(0, 0) | mine)
    found = sa.attention(q, k, v, spec, operands=given, impl="xla", config=SMALL)
    wanted = sa.attention(q, k, v, sa.causal() & mine, operands=given, impl="reference")
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_flax_calls_and_what_a_cache_holds():
    q, k, v, _ = arrays(kv_heads=4)
    spec = sa.causal() & (sa.window(9) | Cells(7, 5))
    found = attention_fn(spec, impl="xla", config=SMALL)(q, k, v)
    np.testing.assert_array_equal(
        found, sa.attention(q, k, v, spec, impl="xla", config=SMALL)
    )
    with pytest.raises(ValueError, match=r"reads the run-time arrays \['centroids'\]"):
        attention_fn(sa.causal() & sa.kmeans(4))
    near = sa.causal() & sa.window(19) & Cells(7, 5)
    assert sa.cache(near, 70).size == sa.cache(sa.causal() & sa.window(19), 70).size


def test_refusals():
    q, k, v, _ = arrays()
    mixed = "where(lambda q, k: operand('t')[(q + k) // 2] == 1)"
    with pytest.raises(NotImplementedError, match="an index of the query alone"):
        sa.attention(q, k, v, mixed, operands={"t": np.ones(70, int)}, impl="xla")
    with pytest.raises(
        ValueError, match=r"Cells\(.*chosen.*sadsl.select\(spec, q, k\)"
    ):
        Cells(4, 4).dense(8)
    with pytest.raises(TypeError, match="the index must be made of q, k and h"):
        sa.operand("t")[3]
