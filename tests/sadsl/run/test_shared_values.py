"""``softmax(values=)``: kernels take values from the keys that they have loaded."""

import re
from dataclasses import dataclass, replace
from functools import partial

import calls
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from lowering.targets import compiling, triton_ir
from pallas_kernels.shared_values import loaded_once

CAUSAL = sa.causal() & sa.window(20)
LISTED = CAUSAL & sa.topk(5, block=1, block_q=1, scope="shared", eligible=CAUSAL)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call whose values are channels of its keys: two key heads, four of queries."""

    impl: str
    dim: int
    values: tuple[int, int]
    map: object = CAUSAL
    sink: bool = True
    soft_cap: float | None = 2.0
    q_len: int = 37
    dtype: str = "float32"

    def __str__(self):
        kind = "lists" if self.map is LISTED else "blocks"
        return f"{self.impl}-{kind}-{self.values}-of-{self.dim}-{self.q_len}"

    @property
    def term(self):
        return sa.softmax(self.map, self.soft_cap, sink=self.sink, values=self.values)

    def options(self):
        config = calls.SMALL
        if self.map is LISTED:
            config = sa.KernelConfig(lists=True)
        options = calls.BACKENDS[self.impl] | {"config": config, "impl": self.impl}
        if self.sink:
            options["operands"] = {"sink": jnp.linspace(-1.0, 1.0, 4)}
        return options | {"q_offset": 4, "return_lse": True}

    def arrays(self):
        rng = np.random.default_rng(3)
        shapes = [(2, self.q_len, 4, self.dim), (2, self.q_len + 4, 2, self.dim)]
        return [jnp.asarray(rng.normal(size=s), self.dtype) for s in shapes]

    def loss(self, **changed):
        """A scalar of both results as a function of q and k."""
        options = self.options() | changed

        def f(q, k):
            o, lse = sa.attention(q, k, k, self.term, **options)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(lse))

        return f

    def wanted(self, q, k):
        """The loss by the definition, in float64 if the arrays are."""
        term = replace(self.term, values=None)
        options = self.options() | {"impl": "reference", "config": None}
        options.pop("interpret", None)
        o, lse = sa.attention(q, k, k[..., slice(*self.values)], term, **options)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(lse))


CASES = [
    Case(impl="triton", dim=40, values=(0, 32), q_len=13),
    Case(impl="tpu", dim=160, values=(0, 128)),
    Case(impl="xla", dim=24, values=(4, 20), map=LISTED),
    Case(impl="triton", dim=24, values=(0, 16), map=LISTED),
    Case(impl="tpu", dim=256, values=(128, 256), q_len=13, sink=False),
    Case(impl="tpu", dim=16, values=(0, 16), q_len=130, soft_cap=None),
    Case(impl="triton", dim=16, values=(0, 16), q_len=130, soft_cap=None),
    Case(impl="xla", dim=16, values=(0, 16), map=LISTED, q_len=130, soft_cap=None),
    Case(impl="tpu", dim=16, values=(0, 16), q_len=1),
    Case(impl="triton", dim=40, values=(0, 32), q_len=1),
    # Kernels load these values by themselves.
    Case(impl="xla", dim=24, values=(4, 20)),
    Case(impl="tpu", dim=24, values=(4, 20)),
    Case(impl="triton", dim=24, values=(4, 20)),
    Case(impl="xla", dim=24, values=(4, 9), map=LISTED),
    Case(impl="reference", dim=24, values=(4, 20)),
]  # fmt: skip
SOME = [CASES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradients_have_both_parts(case):
    """Against float64, where keys have the gradients of both their uses."""
    q, k = case.arrays()
    found = jax.jit(jax.value_and_grad(case.loss(), (0, 1)))(q, k)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k))
        expected = jax.jit(jax.value_and_grad(case.wanted, (0, 1)))(*wide)
        expected = jax.tree.map(np.asarray, expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        oracle.assert_close(a, b, "float32", str(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_second_derivatives(case):
    def slope(loss, q, k):
        return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(q, k))

    case = replace(case, q_len=13)
    found, expected = (
        jax.jit(jax.grad(partial(slope, loss), (0, 1)))(*case.arrays())
        for loss in (case.loss(), case.wanted)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_forward_mode_by_lists():
    """A tangent of the keys moves scores and values."""
    case = CASES[2]
    q, k = case.arrays()
    moved = jnp.cos(q), jnp.sin(k)
    found, expected = (
        jax.jit(lambda q, k, f=f: jax.jvp(f, (q, k), moved))(q, k)
        for f in (case.loss(), case.wanted)
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_a_gpu_loads_each_channel_of_a_key_once():
    """Keys of 576 channels are two tiles, of which one has the values."""
    q, k = (jax.ShapeDtypeStruct((1, 256, h, 576), jnp.bfloat16) for h in (4, 1))
    term = sa.softmax(CAUSAL, values=(0, 512))

    def loss(q, k):
        return sa.attention(q, k, k, term, impl="triton").astype(jnp.float32).sum()

    program = compiling.lower_for(jax.grad(loss, (0, 1)), (q, k), "h100")
    for kernel in triton_ir.triton_kernels(program):
        loads = re.findall(r"tt\.load .*tensor<\d+x(\d+)x!tt\.ptr<bf16", kernel.code)
        assert set(loads) == {"512", "64"}, kernel.name


@pytest.mark.slow
def test_a_learned_bias_keeps_its_gradient():
    """Its gradient comes from a pass of its own, which reads values too."""
    rng = np.random.default_rng(5)
    q, k = (jnp.asarray(rng.normal(size=(1, 13, h, 16)), jnp.float32) for h in (2, 1))
    table = jnp.asarray(rng.normal(size=(13, 13)), jnp.float32)
    added = sa.bias(lambda q, k, h: sa.weights("table")[q, k])
    shared = sa.softmax(CAUSAL, bias=added, values=(0, 16))

    def loss(k, table, term, **options):
        given = options | {"operands": {"table": table}}
        return jnp.sum(jnp.sin(sa.attention(q, k, k, term, **given)))

    tpu = {"impl": "tpu"} | calls.BACKENDS["tpu"]
    found = jax.jit(jax.grad(partial(loss, term=shared, **tpu), (0, 1)))(k, table)
    plain = partial(loss, term=sa.softmax(CAUSAL, bias=added), impl="reference")
    for a, b in zip(found, jax.grad(plain, (0, 1))(k, table), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("impl", "by_lists", "values", "dim", "once"),
    [
        ("tpu", False, (0, 512), 576, True),
        ("tpu", False, (128, 512), 512, True),
        ("tpu", False, (0, 64), 64, True),
        ("tpu", False, (0, 64), 128, False),
        ("tpu", False, (64, 128), 128, False),
        ("triton", False, (0, 512), 576, True),
        ("triton", True, (0, 64), 64, True),
        ("triton", True, (0, 48), 64, False),
        ("triton", True, (64, 128), 128, False),
        ("triton", True, (0, 8), 64, False),
        ("xla", True, (3, 9), 12, True),
        ("xla", True, (3, 8), 12, False),
        ("xla", False, (0, 12), 12, False),
        ("reference", False, (0, 12), 12, False),
    ],
)
def test_one_place_decides(impl, by_lists, values, dim, once):
    wanted = values if once else None
    assert loaded_once(values, dim, impl, by_lists=by_lists) == wanted
    assert loaded_once(None, dim, impl, by_lists=by_lists) is None
