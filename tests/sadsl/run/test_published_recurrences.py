"""``linear`` and ``delta`` against the recurrences of other people's code.

Outputs, final states and gradients of ``tests/vectors`` agree within 3e-6 of the
greatest entry of each array, in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors_of import assert_agrees, cases

import sadsl as sa

FILES = (
    "fla_delta_rule", "fla_gated_delta_rule", "fla_kda", "fla_gla", "fla_comba",
    "fla_gated_delta_product", "fla_dplr", "fla_iplr", "fla_rwkv6", "fla_simple_gla",
    "fla_retention", "fla_linear_attn", "fla_based", "fla_gdn2", "fla_precond_kda",
    "fla_hgrn", "qwen3_next", "kimi_linear", "bailing_hybrid", "olmo_hybrid",
    "minimax_lightning", "nemotron_h_mamba2",
)  # fmt: skip
PLAIN = {"normalise": False, "scaled": True}


def delta(arrays, options, **more):
    decay = "g" if "g" in arrays else None
    by = "channel" if decay and arrays["g"].ndim == 4 else "head"
    unit = bool(options.get("l2norm"))
    return sa.delta("beta", decay, by=by, normalise_keys=unit, **more)


def linear(arrays, options, **more):
    del options
    by = "channel" if arrays["g"].ndim == 4 else "head"
    return sa.linear("identity", "g", by=by, **PLAIN, **more)


def constant(factors):
    return lambda arrays, options: sa.linear(
        "identity", tuple(factors(arrays)), normalise=False, scaled="scale" in options
    )


def general(arrays, options):
    del options
    decay = "gk" if "gk" in arrays else None
    return sa.delta(
        None, decay, by="channel", erase="alpha", write="beta", normalise_keys=False
    )


SPECS = {
    "gdn": delta,
    "kda": delta,
    "gla": linear,
    "hgrn2": lambda *_: sa.linear("identity", "g", by="channel", **PLAIN),
    "mamba2": lambda *_: sa.linear("identity", "g", normalise=False),
    "hgrn": lambda *_: sa.linear("identity", "g", normalise=False),
    "comba": lambda a, p: delta(a, p, erase="p"),
    "gdn2": lambda *_: sa.delta(
        None, "g", by="channel", erase="erase", normalise_keys=False
    ),
    "precond_kda": lambda a, p: delta(a, p, erase="raw"),
    "delta_product": lambda a, p: delta(a, p, steps=p["steps"]),
    "dplr": general,
    "rwkv6": lambda *_: sa.linear(
        "identity", "w", by="channel", read="before", bonus="u", **PLAIN
    ),
    "lightnet": lambda *_: sa.linear("identity", normalise="channel", scaled=True),
    "retention": constant(lambda a: 1 - 2.0 ** (-5 - np.arange(a["q"].shape[2]))),
    "lightning": constant(lambda a: np.exp(-np.float64(a["slope"]))),
    "linear": lambda _, p: sa.linear("identity", normalise=p["normalise"], scaled=True),
    "based": lambda *_: sa.linear("taylor", scaled=True, eps=1e-6),
    "rebased": lambda *_: sa.linear("square", scaled=True, eps=1e-6),
}


def made(kind, options, a):
    """The arrays of the call, from those of a layer in front of the recurrence."""
    match kind:
        case "hgrn2":
            g = jax.nn.log_sigmoid(a["f"])
            return a | {"g": g, "k": 1 - jnp.exp(g)}
        case "mamba2":
            dt = jax.nn.softplus(a["dt"] + a["dt_bias"][None, None])
            v = dt[..., None] * a["x"]
            return a | {"g": a["A"][None, None] * dt, "k": a["B"], "q": a["C"], "v": v}
        case "hgrn":
            one = jnp.ones_like(a["x"])[..., None]
            return a | {"q": one, "k": one, "v": a["x"][..., None]}
        case "gdn2":
            return a | {"v": a["w"] * a["v"], "erase": a["b"] * a["k"]}
        case "precond_kda":
            return a | {"raw": a["k"], "k": preconditioned(options, a)}
    return a


def preconditioned(options, a):
    """The write keys: ``k`` times a power that depends on the past size of ``k``."""

    def step(size, x):
        g, beta, k = x
        size = jnp.exp(g)[..., None] * size + beta[..., None] * k**2
        r = jnp.log(size + options["eps"]) - options["log_atk_scale"]
        return size, k * options["x"] ** (-r / (1 + jnp.abs(r)))

    xs = (jnp.moveaxis(a[n], 1, 0) for n in ("g_atk", "beta_atk", "k"))
    return jnp.moveaxis(
        jax.lax.scan(step, jnp.zeros_like(a["k"][:, 0]), (*xs,))[1], 0, 1
    )


def state_of(kind, spec, x):
    """The published state as a ``LinearState``."""
    if kind == "mamba2":
        x = jnp.swapaxes(x, 2, 3)
    if kind == "hgrn":
        x = x[..., None, None]
    return sa.linear_state(spec, *x.shape)._replace(s=x)


def published(kind, out, state, a):
    """Output and state in the published layout."""
    if kind == "mamba2":
        return out + a["D"][None, None, :, None] * a["x"], jnp.swapaxes(state, 2, 3)
    if kind == "hgrn":
        return out[..., 0], state[..., 0, 0]
    return out, state


def result(arrays, options, impl, config):
    """Output, final state, and gradients by name."""
    kind = options["kind"]
    wanted = [n[2:] for n in arrays if n.startswith("d_")]
    fixed = {
        n: x for n, x in arrays.items() if not n.startswith(("d_", "out", "final"))
    }
    spec = SPECS[kind](made(kind, options, fixed), options)
    weights = np.cos(np.arange(arrays["out"].size)).reshape(arrays["out"].shape)

    def loss(some):
        a = made(kind, options, fixed | some)
        more = {"state0": state_of(kind, spec, a["state0"])} if "state0" in a else {}
        out, state = sa.attention(
            *(a[n] for n in "qkv"), spec, sm_scale=options.get("scale"), impl=impl,
            interpret=impl in ("tpu", "triton"), config=config, return_state=True,
            operands={n: x for n, x in a.items() if spec.reads(n)}, **more,
        )  # fmt: skip
        out, state = published(kind, out, state.s, a)
        return jnp.sum(out * weights.astype("float32")), (out, state)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (out, state)), grads = run({n: jnp.asarray(fixed[n]) for n in wanted})
    return out, state, grads


EVERY = [
    f"{name}:{case}"
    for name in FILES
    for case, (_, options) in cases(name).items()
    if options["kind"] in SPECS
]


def check(name, impl, config=None):
    file, case = name.split(":")
    arrays, options = cases(file)[case]
    out, state, grads = result(arrays, options, impl, config)
    assert_agrees(out, arrays["out"], f"{name} out")
    if "final_state" in arrays:
        assert_agrees(state, arrays["final_state"], f"{name} state")
    for each, found in grads.items():
        assert_agrees(found, arrays[f"d_{each}"], f"{name} d_{each}")


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", EVERY)
def test_xla(name):
    check(name, "xla", sa.KernelConfig(block_kv=16))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tpu", "triton"])
@pytest.mark.parametrize("name", EVERY)
def test_other_backends(name, impl):
    config = None if impl == "reference" else sa.KernelConfig(block_kv=16)
    check(name, impl, config)
