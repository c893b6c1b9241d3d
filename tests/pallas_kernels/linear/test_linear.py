"""Linear attention on every backend, against a float64 loop over tokens."""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from recurrence_oracle import exact, recurrence

from lowering.cost import inspect_code, targets
from pallas_kernels import linear
from pallas_kernels.linear import Recurrence, marks
from pallas_kernels.linear import tpu as linear_tpu
from pallas_kernels.linear.chunk import normalised

# Compiled without optimisations: no test here measures speed.
pytestmark = pytest.mark.usefixtures("quick")

EPS = 1e-10
BACKENDS = ("xla", "tpu", "triton")


@pytest.fixture(autouse=True)
def quick():
    """Compiles without optimisations: compiling takes longer than running once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclass(frozen=True)
class Case:
    """The sizes of a call; ``has`` lists what it has.

    "d" decays by head, "c" by channel, "e" erase vectors, "E" erase vectors that read
    the old state, "b" reads before the write, "s" starts, "n" a normaliser, "0" a state
    before the first key.
    """

    seq: int = 45
    has: str = "dsn"
    group: int = 1
    dim: int = 8
    dim_v: int = 6
    dtype: str = "float32"
    chunk: int = 16
    batch: int = 2
    heads: int = 2

    @property
    def rule(self):
        eps = EPS if "n" in self.has else None
        return Recurrence(eps, "b" in self.has, "E" in self.has)

    def inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        lead = self.batch, self.heads

        def array(x, dtype=self.dtype):
            return jnp.asarray(x, "float32").astype(dtype)

        # With a normaliser, features are positive, so that their sum is not near 0.
        sign = np.abs if "n" in self.has else np.asarray
        q = sign(rng.normal(size=(*lead, self.group, self.seq, self.dim)))
        k = sign(rng.normal(size=(*lead, self.seq, self.dim)))
        v = rng.normal(size=(*lead, self.seq, self.dim_v))
        erase = decay = starts = state = None
        if set("eE") & set(self.has):
            k = k / np.linalg.norm(k, axis=-1, keepdims=True)
            erase = rng.uniform(0, 2, size=(*lead, self.seq, 1)) * k
            erase = array(erase + 0.1 * rng.normal(size=k.shape))
        if set("dc") & set(self.has):
            # Most decays are weak; a few forget nearly everything, a few nothing.
            size = (self.dim,) if "c" in self.has else ()
            decay = -np.exp(rng.normal(size=(*lead, self.seq, *size)) - 2)
            decay[rng.random(decay.shape) < 0.05] = -40
            decay[rng.random(decay.shape) < 0.05] = 0
            decay = array(decay, "float32")
        if "s" in self.has:
            starts = jnp.asarray(rng.random((self.batch, self.seq)) < 0.08)
        if "0" in self.has:
            s = array(rng.normal(size=(*lead, self.dim, self.dim_v)), "float32")
            z = array(np.abs(rng.normal(size=(*lead, 1, self.dim))), "float32")
            state = linear.State(s, z if "n" in self.has else None)
        q, k, v = array(q), array(k), array(v)
        return linear.LinearInputs(q, k, v, erase, decay, starts, state)

    def call(self, impl):
        return linear.LinearCall(self.rule, self.chunk, impl != "xla")

    def cotangent(self):
        inputs = replace(self, dtype="float32").inputs()
        shapes = jax.eval_shape(partial(recurrence, self.rule), inputs)
        rng = np.random.default_rng(7)
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), shapes)


slow = pytest.mark.slow
ALL = Case(130, group=2)
VARIANTS = [
    Case(45, "e"),
    Case(50, "des0", group=2),
    Case(37, "cb0"),
    Case(45, "cs0n", dim=5),
    Case(61, "ce0", group=2, chunk=32),
    Case(45, "cEs"),
    Case(33, "ceb", chunk=32),
    Case(45, "de", dtype="bfloat16", dim=16),
    Case(45, "ce", dtype="float16", dim=16),
]
CASES = [
    *(pytest.param(Case(13, "dn", dim=5, dtype="bfloat16"), i) for i in BACKENDS),
    *(pytest.param(ALL, impl) for impl in BACKENDS),
    pytest.param(Case(1), "xla"),
    pytest.param(Case(257, "", chunk=32), "xla"),
    *(pytest.param(Case(1), impl, marks=slow) for impl in BACKENDS[1:]),
    *(pytest.param(Case(257, "", chunk=32), i, marks=slow) for i in BACKENDS[1:]),
    *(
        pytest.param(Case(45, "dn", dtype="bfloat16", dim=16), i, marks=slow)
        for i in BACKENDS
    ),
    # A sum of f16 inputs in f32.
    pytest.param(Case(33, "n", dtype="float16"), "tpu", marks=slow),
]
MOST_SLOW = ["xla", *(pytest.param(impl, marks=slow) for impl in BACKENDS[1:])]


def check(case, impl):
    """Values and gradients of a backend equal those of the recurrence in float64."""
    inputs, cotangent = case.inputs(), case.cotangent()
    call = case.call(impl)

    @jax.jit
    def run(inputs):
        fixed = inputs._replace(starts=None)
        f = lambda x: linear.attend(x._replace(starts=inputs.starts), call, impl=impl)
        found, pull = jax.vjp(f, fixed)
        return found, pull(
            jax.tree.map(lambda x, y: x.astype(y.dtype), cotangent, found)
        )[0]

    found = run(inputs)
    wanted = exact(case.rule, inputs, cotangent)
    paths = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(paths, jax.tree.leaves(wanted), strict=True):
        name = f"{impl} {case} {jax.tree_util.keystr(path)}"
        oracle.assert_close(a, b, case.dtype, name)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("case", "impl"), CASES, ids=str)
def test_values_and_gradients(case, impl):
    check(case, impl)


@pytest.mark.sample(2)
@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(case, impl):
    check(case, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", MOST_SLOW)
def test_features_of_zero(impl):
    case = Case(20, "dsn")
    inputs = case.inputs()
    # No query before the tenth sees a key whose features are not all zero.
    k = inputs.k.at[:, :, :10].set(0)
    q = inputs.q.at[:, :, :, 12].set(0)

    def f(q, k, v):
        made = inputs._replace(q=q, k=k, v=v)
        out, total, _ = linear.attend(made, case.call(impl), impl=impl)
        return jnp.sum(jnp.sin(out)), (out, total)

    run = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    (_, (out, total)), grads = run(q, k, inputs.v)
    for dead in (slice(0, 10), 12):
        assert not out[:, :, :, dead].any()
        assert not total[:, :, :, dead].any()
        assert not grads[0][:, :, :, dead].any()
    assert all(np.isfinite(x).all() for x in (out, *grads))


class TestNormaliser:
    def test_signed_weights_that_cancel(self):
        total = jnp.asarray([[0.0], [-EPS], [1e-12], [-2.0], [3.0]])
        f = lambda out, total: normalised(out, total, EPS)
        (out, kept), pull = jax.vjp(f, jnp.ones((5, 2)), total)
        np.testing.assert_allclose(out[:, 0], [0, 0, 1 / (EPS + 1e-12), -0.5, 1 / 3])
        np.testing.assert_allclose(kept[:, 0], [0, 0, EPS + 1e-12, -2, 3])
        assert all(np.isfinite(x).all() for x in pull((out, kept)))

    def test_no_epsilon(self):
        total = jnp.asarray([[0.0], [1e-20], [2.0]])
        out, _ = normalised(jnp.ones((3, 1)), total, 0.0)
        np.testing.assert_array_equal(out[:, 0], [0, 0, 0.5])


class TestMarks:
    def test_differences_have_no_rounding_error_to_speak_of(self):
        rng = np.random.default_rng(0)
        decay = np.where(rng.random(512) < 0.5, -59.9, -rng.random(512) * 1e-3)
        decay = decay.astype("float32")
        fine, coarse, run = marks.of_chunks(jnp.asarray(decay)[None], None, 512)
        fine, coarse = np.asarray(fine)[0, 0], np.asarray(coarse)[0, 0]
        past = (coarse[:, None] - coarse) + (fine[:, None] - fine)
        exact = np.cumsum(decay.astype(np.float64))
        exact = exact[:, None] - exact
        near = np.abs(exact) < 1
        assert near.sum() > 1000
        assert np.abs(past - exact)[near].max() < 2e-7
        assert run is None

    def test_forgetting_everything(self):
        decay = jnp.asarray([[-0.5, -jnp.inf, -1e9, -0.5]], "float32")
        fine, coarse, _ = marks.of_chunks(decay, None, 4)
        np.testing.assert_allclose((fine + coarse)[0, 0], [-0.5, -60.5, -120.5, -121])


class TestDerivatives:
    CASE = Case(21, "dsn", dim=3, dim_v=2, chunk=16, batch=1, heads=1)

    def arrays(self):
        inputs = self.CASE.inputs()
        return *inputs[:3], inputs.log_decay

    def loss(self, impl, arrays):
        *arrays, decay = arrays
        inputs = self.CASE.inputs()
        inputs = linear.LinearInputs(*arrays, None, decay, inputs.starts)
        out, total, _ = linear.attend(inputs, self.CASE.call(impl), impl=impl)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.log(total))

    @pytest.mark.slow
    def test_forward_over_reverse(self):
        """A Hessian times a vector equals a difference of gradients."""
        arrays = self.arrays()
        turn = jax.tree.map(jnp.cos, arrays)
        gradient = jax.grad(partial(self.loss, "xla"))

        @jax.jit
        def both(arrays, turn):
            product = jax.jvp(gradient, (arrays,), (turn,))[1]
            steps = jnp.asarray([-1e-2, 1e-2])
            at = lambda h: jax.tree.map(lambda x, u: x + h * u, arrays, turn)
            ends = jax.lax.map(lambda h: gradient(at(h)), steps)
            return product, jax.tree.map(lambda x: (x[1] - x[0]) / 2e-2, ends)

        for a, b in zip(*both(arrays, turn), strict=True):
            assert np.abs(a).max() > 0.1
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max())

    @slow
    def test_second_order(self):
        f = jax.jit(partial(self.loss, "xla"))
        arrays = *self.CASE.inputs()[:3], jnp.full((1, 1, 21), -0.3)
        check_grads(f, (arrays,), order=2, rtol=2e-2, eps=1e-2)

    @slow
    def test_second_order_of_a_kernel(self):
        arrays = self.arrays()

        def second(impl):
            gradient = jax.grad(partial(self.loss, impl))
            inner = lambda x: sum(jnp.sum(jnp.sin(g)) for g in gradient(x))
            return jax.jit(jax.grad(inner))(arrays)

        for a, b in zip(second("tpu"), second("xla"), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    @slow
    @pytest.mark.parametrize("impl", ["tpu", "triton"])
    def test_vmap_of_a_gradient(self, impl):
        arrays = self.arrays()
        two = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)
        together = jax.jit(jax.vmap(jax.grad(partial(self.loss, impl))))(two)
        alone = jax.jit(jax.grad(partial(self.loss, "xla")))
        for i in range(2):
            one = alone(jax.tree.map(lambda x, i=i: x[i], two))
            for a, b in zip(together, one, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("has", ["n", "dn"])
def test_a_long_sequence(has):
    """131,072 tokens, compared with some rows of the recurrence in float64."""
    case = Case(131_072, has, dim=2, dim_v=2, chunk=256, batch=1, heads=1)
    inputs = case.inputs()
    q, k, v, decay = *inputs[:3], inputs.log_decay
    call = case.call("xla")
    out, total, _ = jax.jit(partial(linear.attend, call=call, impl="xla"))(inputs)
    assert np.isfinite(out).all()
    # The last 40,000 keys before a row determine it: older ones have decayed to 0.
    q, k, v = (np.asarray(x, np.float64) for x in (q[0, 0, 0], k[0, 0], v[0, 0]))
    steps = np.zeros(case.seq) if decay is None else np.asarray(decay[0, 0], np.float64)
    for row in (0, 1, 255, 256, 65_537, 131_071):
        past = np.cumsum(np.append(0, steps[row:0:-1]))[::-1]
        weights = (k[: row + 1] @ q[row]) * np.exp(past)
        want = weights @ v[: row + 1] / (weights.sum() + EPS)
        np.testing.assert_allclose(out[0, 0, 0, row], want, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(total[0, 0, 0, row], weights.sum() + EPS, rtol=2e-5)


@pytest.mark.optimised
def test_memory_grows_as_the_length():
    def temporaries(seq):
        case = Case(seq, "n", chunk=64, dim=16, dim_v=16, batch=1)
        shapes = jax.eval_shape(case.inputs)
        loss = lambda x: jnp.sum(linear.attend(x, case.call("xla"), impl="xla").out)
        compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.2 * small


# --- lowering for other chips ---


def program(case, impl):
    """The value and gradient of a case as a function, and its argument shapes."""
    call = replace(case.call(impl), interpret=False)
    shapes = jax.eval_shape(case.inputs)

    def loss(arrays, starts):
        made = arrays._replace(starts=starts)
        out, total, state = linear.attend(made, call, impl=impl)
        some = 0.0 if total is None else jnp.sum(jnp.log(total))
        return jnp.sum(out.astype(jnp.float32)) + some + jnp.sum(state.s)

    return jax.value_and_grad(loss), (shapes._replace(starts=None), shapes.starts)


CHIP = Case(600, "dsn", group=2, dim=128, dim_v=128, dtype="bfloat16", chunk=256)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", pytest.param("tpu-v6e", marks=slow)])
def test_machine_code(target):
    compiled = targets.compile_for(*program(CHIP, "tpu"), target)
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.slow
def test_many_query_heads_of_a_key_head_fit_a_chip():
    case = replace(CHIP, seq=256, has="dn", group=32, chunk=128, batch=1, heads=1)
    compiled = targets.compile_for(*program(case, "tpu"), "tpu-v5e")
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.slow
def test_groups_are_split_to_fit(monkeypatch):
    """With a copy of the keys for each two query heads, values and gradients stay."""
    monkeypatch.setattr(linear_tpu, "MOST_ROWS", 32)
    assert linear_tpu.members_of(6, 16) == 2
    check(Case(20, "ds0n", group=6, heads=1, batch=1), "tpu")


@pytest.mark.sample(1)
@pytest.mark.parametrize("has", ["des", "dsn", "ceb", ""])
def test_lowers_for_a_gpu(has):
    case = replace(CHIP, has=has, chunk=64, dim=100, dim_v=64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        lowered = targets.lower_for(*program(case, "triton"), "h200")
    names = [kernel.name for kernel in inspect_code.triton_kernels(lowered)]
    assert set(names) == {
        "sadsl_linear_states",
        "sadsl_linear_forward",
        "sadsl_linear_backward_q",
        "sadsl_linear_backward_states",
        "sadsl_linear_backward_kv",
    } | ({"sadsl_linear_updates"} if "e" in has else set())


class TestErrors:
    def test_a_chunk_that_is_no_whole_registers(self):
        f, shapes = program(replace(CHIP, chunk=96), "tpu")
        with pytest.raises(ValueError, match=r"chunk of 96.*multiple of 128.* 128"):
            jax.eval_shape(f, *shapes)

    def test_a_chunk_that_is_no_power_of_two(self):
        f, shapes = program(replace(CHIP, chunk=96), "triton")
        with pytest.raises(ValueError, match=r"chunk of 96.*power of two.* 128"):
            jax.eval_shape(f, *shapes)
