"""The linear family of the catalogue: loops from the papers, and published vectors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent_oracle as oracle
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl import catalog
from sadsl.catalog import models
from sadsl.layers import parts

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, HEADS, DIM = 2, 13, 2, 4
SCALE = DIM**-0.5


NOTHING: dict[str, Any] = {}


class Case(NamedTuple):
    """A spec and its definition.

    ``named`` are the operands: the name that the loop has, and the shape after batch
    and position. ``fixed`` are further arguments of the loop.
    """

    spec: sa.IndexMap | Any
    loop: Any
    named: dict[str, tuple[str, tuple[int, ...]]] = NOTHING
    fixed: dict[str, Any] = NOTHING
    steps: int = 1
    v_heads: int = HEADS
    sm_scale: float | None = None


BY_HEAD, BY_CHANNEL = (HEADS,), (HEADS, DIM)
GATES = {"g": ("g", BY_HEAD), "beta": ("beta", BY_HEAD)}
CHANNELS = {"g": ("g", BY_CHANNEL), "beta": ("beta", BY_HEAD)}
PLAIN = {"unit": False}


def fixed_decays(spec):
    """The log-decays of a spec with numbers."""
    return np.broadcast_to(np.log(spec.decay), (BATCH, SEQ, HEADS))


CASES = {
    "light_net": Case(catalog.light_net(), oracle.light_net),
    "hebb": Case(catalog.hebbian(), oracle.added, fixed={"scale": 1.0}),
    "hebb decay": Case(
        catalog.hebbian("decay", decay=0.7), oracle.added,
        fixed={"scale": 1.0, "g": np.full((BATCH, SEQ, HEADS), np.log(0.7))},
    ),
    "hebb delta": Case(
        catalog.hebbian("delta"), oracle.delta, {"beta": ("beta", BY_HEAD)},
        {"scale": 1.0, **PLAIN}, sm_scale=1.0,
    ),
    "ret_net": Case(
        catalog.ret_net(HEADS), oracle.added,
        fixed={"g": fixed_decays(catalog.ret_net(HEADS))},
    ),
    "minimax_lightning": Case(
        catalog.minimax_lightning(HEADS, 3, 8), oracle.added,
        fixed={"g": fixed_decays(catalog.minimax_lightning(HEADS, 3, 8)), "scale": 1.0},
    ),
    "gla": Case(catalog.gla(), oracle.added, {"g": ("g", BY_CHANNEL)}),
    "rwkv6": Case(
        catalog.rwkv6(), oracle.rwkv6, {"w": ("w", BY_CHANNEL), "u": ("u", BY_CHANNEL)},
        {"scale": 1.0},
    ),
    "mamba2": Case(
        catalog.mamba2(), oracle.added, {"g": ("g", (4,))}, {"scale": 1.0}, v_heads=4
    ),
    "delta_net": Case(catalog.delta_net(), oracle.delta, {"beta": ("beta", BY_HEAD)}),
    "gated_delta_net": Case(
        catalog.gated_delta_net(), oracle.delta,
        {"g": ("g", (4,)), "beta": ("beta", (4,))}, v_heads=4,
    ),
    "kimi_delta": Case(catalog.kimi_delta(), oracle.delta, CHANNELS),
    "gated_delta_product": Case(
        catalog.gated_delta_product(3), oracle.delta, GATES, steps=3
    ),
    "comba": Case(catalog.comba(), oracle.delta, {**GATES, "p": ("e", BY_CHANNEL)}),
    "rwkv7": Case(
        catalog.rwkv7(), oracle.rwkv7,
        {name: (name, BY_CHANNEL) for name in "abg"}, {"scale": 1.0}, sm_scale=1.0,
    ),
    "precond_kda": Case(
        catalog.precond_kda(), oracle.delta, {**CHANNELS, "erase": ("e", BY_CHANNEL)},
        PLAIN,
    ),
}  # fmt: skip


def drawn(case):
    """Queries, keys, values, and operands by name."""
    rng = np.random.default_rng(5)
    keys = case.steps * SEQ
    normal = lambda *shape: 0.5 * rng.normal(size=shape)
    qkv = (
        normal(BATCH, SEQ, HEADS, DIM),
        normal(BATCH, keys, HEADS, DIM),
        normal(BATCH, keys, case.v_heads, 3),
    )
    given = {}
    for name, (_, shape) in case.named.items():
        lead = () if name == "u" else (BATCH, SEQ)
        if case.steps > 1 and name == "beta":
            lead = BATCH, keys
        x = normal(*lead, *shape)
        given[name] = {"g": -np.abs(x), "w": -np.abs(x), "beta": 1 / (1 + np.exp(-x))
                       }.get(name, x)  # fmt: skip
    return qkv, given


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CASES)
def test_is_what_the_paper_says(name):
    case = CASES[name]
    assert sa.parse(repr(case.spec)) == case.spec
    qkv, given = drawn(case)
    arrays = dict(zip("qkv", qkv, strict=True)) | {"scale": SCALE} | case.fixed
    arrays |= {case.named[key][0]: x for key, x in given.items()}
    out, state = case.loop(arrays)
    narrow = lambda x: jnp.asarray(x, jnp.float32)

    @jax.jit
    def call(qkv, given):
        return sa.attention(
            *qkv, case.spec, operands=given, sm_scale=case.sm_scale, return_state=True
        )

    found, end = call([*map(narrow, qkv)], {key: narrow(x) for key, x in given.items()})
    assert_agrees(found, out, name)
    assert_agrees(end.s, state, name)


# --- what published code gives ---


def arrays_of(file, case):
    return {key: jnp.asarray(x) for key, x in cases(file)[case][0].items()}


def hgrn2(a):
    g, k = parts.hgrn2_gates(a["f"])
    return sa.attention(
        a["q"], k, a["v"], catalog.hgrn2(), operands={"g": g}, return_state=True
    )


def mamba2(a):
    """Published with ``A = -exp(A_log)``, and with the key and value axes exchanged."""
    g = parts.decay_gate(a["dt"], jnp.log(-a["A"]), a["dt_bias"])
    steps = jax.nn.softplus(a["dt"] + a["dt_bias"][None, None])
    state0 = sa.linear_state(catalog.mamba2(), 1, 4, 8, 6)
    if "state0" in a:
        state0 = state0._replace(s=jnp.swapaxes(a["state0"], 2, 3))
    out, state = sa.attention(
        a["C"], a["B"], steps[..., None] * a["x"], catalog.mamba2(),
        operands={"g": g}, state0=state0, return_state=True,
    )  # fmt: skip
    out = out + a["D"].reshape(1, 1, -1, 1) * a["x"]
    return out, state._replace(s=jnp.swapaxes(state.s, 2, 3))


def precond_kda(a):
    w, size = catalog.preconditioned_keys(a["k"], a["g_atk"], a["beta_atk"])
    out, state = sa.attention(
        a["q"], w, a["v"], catalog.precond_kda(), return_state=True,
        operands={"g": a["g"], "beta": a["beta"], "erase": a["k"]},
    )  # fmt: skip
    return out, state._replace(z=size)


def of_spec(spec):
    """A call of ``spec``, which has no operands."""
    return lambda a: sa.attention(a["q"], a["k"], a["v"], spec, return_state=True)


VECTORS = {
    "ret_net": ("fla_retention", "retention", of_spec(catalog.ret_net(2))),
    "minimax_lightning": (
        "minimax_lightning", "lightning", of_spec(catalog.minimax_lightning(4, 1, 4)),
    ),
    "hgrn2": ("fla_gla", "hgrn2", hgrn2),
    "mamba2": ("nemotron_h_mamba2", "scan_from_state", mamba2),
    "precond_kda": ("fla_precond_kda", "zero_state", precond_kda),
}  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", VECTORS)
def test_is_what_published_code_gives(name):
    """What the catalogue adds to a recurrence: decays, gates, keys."""
    file, case, call = VECTORS[name]
    a = arrays_of(file, case)
    inputs = {key: x for key, x in a.items() if f"d_{key}" in a}

    @jax.jit
    def run(a, inputs):
        out, pull, state = jax.vjp(lambda x: call({**a, **x}), inputs, has_aux=True)
        return out, state, pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))[0]

    out, state, gradients = run(a, inputs)
    assert_agrees(out, a["out"], f"{name}: out")
    if "final_state" in a:
        assert_agrees(state.s, a["final_state"], f"{name}: state")
    if "final_A" in a:
        assert_agrees(state.z, a["final_A"], f"{name}: size")
    for key, gradient in gradients.items():
        assert_agrees(gradient, a[f"d_{key}"], f"{name}: d_{key}")


def test_slopes_of_minimax():
    a = arrays_of("minimax_lightning", "lightning")
    assert_agrees(
        -np.log(catalog.minimax_lightning(4, 1, 4).decay), a["slope"], "slope"
    )


def test_preconditioned_keys_go_on_from_a_size():
    rng = np.random.default_rng(2)
    k = rng.normal(size=(2, 14, 2, 3))
    g, weight = -np.abs(rng.normal(size=(2, 2, 14, 2)))
    wanted, size = oracle.preconditioned(k, g, -weight)
    args = [jnp.asarray(x, jnp.float32) for x in (k, g, -weight)]
    run = jax.jit(catalog.preconditioned_keys)
    first, middle = run(*(x[:, :7] for x in args), size=jnp.zeros((2, 2, 3)))
    rest, last = run(*(x[:, 7:] for x in args), size=middle)
    assert_agrees(jnp.concatenate([first, rest], axis=1), wanted, "keys")
    assert_agrees(last, size, "size")


# --- properties ---


def test_orthonormal_keys_are_remembered_exactly():
    rng = np.random.default_rng(1)
    dim, number = 16, 16
    keys = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:, :number].T
    values = rng.normal(size=(number, 5))
    k, v = (jnp.asarray(x[None, :, None], jnp.float32) for x in (keys, values))
    found = sa.attention(k, k, v, catalog.hebbian(map=sa.full()))
    np.testing.assert_allclose(found[0, :, 0], values, atol=1e-5)


def test_random_keys_interfere():
    """The error of recall grows as the root of keys by channels."""
    rng = np.random.default_rng(3)
    errors = []
    for number, dim in ((8, 64), (32, 64)):
        keys = rng.choice([-1.0, 1.0], size=(40, number, 1, dim)) / np.sqrt(dim)
        values = rng.normal(size=(40, number, 1, 4))
        k, v = (jnp.asarray(x, jnp.float32) for x in (keys, values))
        found = sa.attention(k, k, v, catalog.hebbian(map=sa.full()))
        errors.append(np.sqrt(np.mean((np.asarray(found) - values) ** 2)))
    np.testing.assert_allclose(errors, np.sqrt([8 / 64, 32 / 64]), rtol=0.15)


def test_light_net_scans_a_grid_once():
    """Both ways, the order of the tokens of an image changes nothing."""
    rng = np.random.default_rng(4)
    q, k, v = jnp.asarray(rng.normal(size=(3, 1, 12, 2, 4)), jnp.float32)
    rows = partial(sa.attention, spec=catalog.light_net(sa.full()))
    by_column = np.arange(12).reshape(3, 4).T.ravel()
    moved = rows(q[:, by_column], k[:, by_column], v[:, by_column])
    np.testing.assert_allclose(moved, rows(q, k, v)[:, by_column], atol=1e-6)


# --- schedules ---


@pytest.mark.parametrize(
    ("made", "num_layers", "full"),
    [
        (models.qwen3_next(), 48, range(3, 48, 4)),
        (models.kimi_linear(), 27, [3, 7, 11, 15, 19, 23]),
        (models.olmo_hybrid(), 32, range(3, 32, 4)),
        (models.bailing_hybrid(), 42, range(5, 42, 6)),
        (models.minimax_01(), 80, range(7, 80, 8)),
        (models.nemotron_h(), 28, [4, 10, 16, 22]),
    ],
)
def test_schedules(made, num_layers, full):
    assert len(made) == num_layers
    softmax = sa.softmax(sa.causal())
    assert [i for i, term in enumerate(made) if term == softmax] == [*full]
    assert all(sa.parse(repr(term)) == term for term in made)


def test_the_linear_layers_of_published_hybrids():
    gated = catalog.gated_delta_net(), catalog.kimi_delta(), catalog.mamba2()
    assert models.qwen3_next(1) == models.olmo_hybrid(1) == gated[:1]
    assert models.kimi_linear(1) == models.bailing_hybrid(1) == gated[1:2]
    assert models.nemotron_h("M") == gated[2:]
    lightning = models.minimax_01(3, 4, period=9)
    assert lightning[2] == catalog.minimax_lightning(4, 2, 3)


def test_what_the_catalogue_refuses():
    with pytest.raises(ValueError, match=r"rule='oja' must be 'hebb'"):
        catalog.hebbian("oja")
    with pytest.raises(ValueError, match=r"num_heads=0 must be at least 1"):
        catalog.ret_net(0)
    with pytest.raises(ValueError, match=r"layer=4 must be at least 0 and below"):
        catalog.minimax_lightning(4, 4, 4)
    with pytest.raises(ValueError, match=r"base=0.5 must be at least 1"):
        catalog.preconditioned_keys(*jnp.ones((3, 1, 1, 1, 1)), base=0.5)
    with pytest.raises(ValueError, match=r"pattern='MX' has 'X'"):
        models.nemotron_h("MX")
    with pytest.raises(ValueError, match=r"num_layers=0 must be at least 1"):
        models.qwen3_next(0)
    with pytest.raises(ValueError, match=r"period=0 must be at least 1"):
        models.minimax_01(period=0)
