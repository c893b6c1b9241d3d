"""Layers that make what their spec learns, and that have a spec of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sadsl as sa
from sadsl import catalog
from sadsl.layers import attention_fn, per_layer
from sadsl.layers import linen as sparse_linen
from sadsl.layers import nnx as sparse_nnx
from sadsl.layers.learned import operands_of, started
from sadsl.terms.base import Learned

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

SEQ, FEATURES, HEADS = 13, 12, 4
MIXED = "gated(softmax(causal() & window(3), sink=True), causal())"


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


X = normal(2, SEQ, FEATURES)


def nnx_layer(spec, impl="reference", **options):
    return sparse_nnx.SparseAttention(
        spec, HEADS, FEATURES, impl=impl, rngs=nnx.Rngs(1), **options
    )


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def projected(params, x):
    names = ("query", "key", "value")
    q, k, v = (jnp.einsum("bsf,fhd->bshd", x, params[n]["kernel"]) for n in names)
    group = q.shape[2] // k.shape[2]
    return q, *(jnp.repeat(y, group, axis=2) for y in (k, v))


def softmaxed(q, k, v, pairs, sink=None):
    """Attention written out, with one more logit of no value."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    e = jnp.where(pairs, jnp.exp(s), 0.0)
    total = e.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink)[None, :, None, None]
    return jnp.einsum("bhqk,bkhd->bqhd", e / total, v)


def mixed_by_hand(params, x):
    q, k, v = projected(params, x)
    at = jnp.arange(SEQ)
    past = (at[:, None] >= at[None, :])[None, None]
    near = past & (at[:, None] - at[None, :] <= 3)[None, None]
    outs = softmaxed(q, k, v, near, params["learned"]["sink"]), softmaxed(q, k, v, past)
    gates = params["learned"]["gates"]
    logits = jnp.einsum("bsf,fg->bsg", x, gates["kernel"]) + gates["bias"][None, None]
    gate = jax.nn.sigmoid(logits).reshape(2, SEQ, HEADS, 2)
    out = sum(gate[..., m, None] * out for m, out in enumerate(outs))
    return jnp.einsum("bshd,hdf->bsf", out, params["out"]["kernel"])


@pytest.mark.slow
def test_sinks_and_gates_are_made_and_learned():
    layer, weights = nnx_layer(MIXED), normal(2, SEQ, FEATURES, seed=3)
    layer.learned["sink"][...] = normal(HEADS, seed=4)
    layer.learned["gates"].bias[...] = normal(HEADS * 2, seed=5)
    params = params_of(layer)
    assert set(params) == {"query", "key", "value", "out", "learned"}
    assert params["learned"]["gates"]["kernel"].shape == (FEATURES, HEADS * 2)

    def loss(layer):
        out = layer(X)
        return jnp.sum(out * weights), out

    @jax.jit
    def expected(params):
        return jnp.sum(mixed_by_hand(params, X) * weights)

    found, out = nnx.jit(nnx.grad(loss, has_aux=True))(layer)
    np.testing.assert_allclose(out, jax.jit(mixed_by_hand)(params, X), atol=2e-6)
    wanted = jax.grad(expected)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5),
        nnx.to_pure_dict(found),
        wanted,
    )
    # The other layer has the same parameters, and does the same.
    other = sparse_linen.SparseAttention(MIXED, HEADS, impl="reference")
    shapes = jax.eval_shape(other.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    # What is given goes before what was learned.
    gates = {"gates": jnp.zeros((2, SEQ, HEADS, 2))}

    @jax.jit
    def three(params):
        apply = partial(other.apply, {"params": params}, X)
        return apply(), apply(operands=gates), layer(X, operands=gates)

    own, closed, also_closed = three(params)
    np.testing.assert_allclose(own, out, atol=2e-6)
    np.testing.assert_array_equal(closed, jnp.zeros_like(X))
    np.testing.assert_array_equal(also_closed, jnp.zeros_like(X))


def test_nothing_is_made_where_nothing_is_learned():
    assert set(params_of(nnx_layer("causal()"))) == {"query", "key", "value", "out"}


def test_starts_and_squashes():
    key = jax.random.key(0)
    for start, mean, deviation in (
        ("zeros", 0, 0),
        ("ones", 1, 0),
        ("normal", 0, 0.02),
    ):
        made = started(Learned((4000,), start))(key, (4000,), jnp.float32)
        np.testing.assert_allclose(made.mean(), mean, atol=2e-3)
        np.testing.assert_allclose(made.std(), deviation, atol=2e-3)
    wanted = {
        "a": Learned((2, 3), per_query=True, squash="log_sigmoid"),
        "b": Learned((6,), per_query=True),
    }
    x = normal(2, 5, 6)
    found = operands_of(wanted, {"a": lambda x: x, "b": lambda x: x}, x)
    np.testing.assert_allclose(
        found["a"], -np.log1p(np.exp(-x)).reshape(2, 5, 2, 3) / 16, atol=1e-6
    )
    np.testing.assert_array_equal(found["b"], x)


def test_modules_are_handed_over_and_learned():
    spec = "compressed(4, 2, key='squeeze')"
    sizes = {"num_kv_heads": 2, "head_dim": 3}
    squeeze = sparse_nnx.BlockCompressor(4, 3, rngs=nnx.Rngs(2))
    layer = nnx_layer(spec, modules={"squeeze": squeeze}, **sizes)
    params = params_of(layer)
    assert set(params) == {"query", "key", "value", "out", "modules"}

    def by_hand(params, x):
        q, k, v = (
            jnp.einsum("bsf,fhd->bshd", x, params[n]["kernel"])
            for n in ("query", "key", "value")
        )
        own = params["modules"]["squeeze"]
        short_k, short_v = [], []
        for start in range(0, SEQ - 3, 2):
            block = k[:, start : start + 4] + own["positions"][None, :, None]
            flat = jnp.swapaxes(block, 1, 2).reshape(2, 2, 12)
            wide = flat @ own["wide"]["kernel"] + own["wide"]["bias"][None, None]
            short_k.append(
                jax.nn.gelu(wide) @ own["narrow"]["kernel"]
                + own["narrow"]["bias"][None, None]
            )
            short_v.append(v[:, start : start + 4].mean(axis=1))
        k, v = (jnp.repeat(jnp.stack(y, 1), 2, axis=2) for y in (short_k, short_v))
        last = jnp.arange(k.shape[1]) * 2 + 3
        pairs = last[None, :] <= jnp.arange(SEQ)[:, None]
        # The first queries see no block.
        out = jnp.nan_to_num(softmaxed(q, k, v, pairs[None, None]))
        return jnp.einsum("bshd,hdf->bsf", out, params["out"]["kernel"])

    def loss(layer):
        out = layer(X)
        return jnp.sum(out**2), out

    gradient, found = nnx.jit(nnx.grad(loss, has_aux=True))(layer)
    np.testing.assert_allclose(found, jax.jit(by_hand)(params, X), atol=2e-6)
    gradient = nnx.to_pure_dict(gradient)
    own = gradient["modules"]["squeeze"]
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(own["wide"]))
    other = sparse_linen.SparseAttention(
        spec, num_heads=HEADS, modules={"squeeze": sparse_linen.BlockCompressor()},
        impl="reference", **sizes,
    )  # fmt: skip
    theirs = {name: params[name] for name in ("query", "key", "value", "out")}
    theirs["modules_squeeze"] = params["modules"]["squeeze"]
    shapes = jax.eval_shape(other.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, theirs)
    found_there = jax.jit(other.apply)({"params": theirs}, X)
    np.testing.assert_allclose(found_there, found, atol=2e-6)


def test_modules_and_layers_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"modules has 'phi', but .* reads nothing"):
        nnx_layer("causal()", modules={"phi": lambda x: x})
    both = ["causal()", "full()"]
    for options, message in (
        ({"spec": both}, r"a list of 2, one for each layer: choose with layer="),
        ({"spec": both, "layer": 2}, r"layer=2 of a list of 2 .*per_layer"),
        ({"spec": "causal()", "layer": 0}, r"layer=0 chooses from a list"),
        ({"spec": "causal()", "dropout_rate": 1.0}, r"dropout_rate=1.0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx_layer(**options)
        with pytest.raises(ValueError, match=message):
            sparse_linen.SparseAttention(num_heads=HEADS, **options)
    with pytest.raises(TypeError, match=r"layer=True must be an integer"):
        nnx_layer(both, layer=True)


def test_specs_of_a_stack():
    dense, a, b = (sa.softmax(m) for m in (sa.causal(), sa.window(1), sa.window(2)))
    one = per_layer("window(1)", 4, first=["causal()"], last=[sa.causal()])
    assert one == (dense, a, a, dense)
    turns = per_layer([sa.window(1), b], 6, first=["causal()"])
    assert turns == (dense, a, b, a, b, a)
    assert per_layer(a, 2, first=[b, b]) == (b, b)
    for bad, message in (
        (([], 2), r"period=\(\) must have at least one spec"),
        (("causal()", 0), r"num_layers=0 with 0 first"),
        (("windw(1)", 2), r"unknown name 'windw'"),
    ):
        with pytest.raises(ValueError, match=message):
            per_layer(*bad)
    with pytest.raises(ValueError, match=r"num_layers=1 with 1 first and 1 last"):
        per_layer("causal()", 1, first=["full()"], last=["full()"])


class Stack(nnx.Module):
    def __init__(self, specs, rngs):
        self.layers = nnx.List(
            sparse_nnx.SparseAttention(
                specs, HEADS, FEATURES, layer=i, impl="reference", rngs=rngs
            )
            for i in range(len(specs))
        )

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.slow
def test_a_dense_first_stack_learns():
    specs = per_layer(MIXED, 3, first=["causal()"])
    model, wanted = Stack(specs, nnx.Rngs(0)), normal(2, SEQ, FEATURES, seed=7)
    assert [layer.learned is None for layer in model.layers] == [True, False, False]

    @nnx.jit
    def step(model):
        def loss(model):
            return jnp.mean((model(X) - wanted) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
        return value

    start = params_of(model)
    losses = [float(step(model)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max() > 0, start, params_of(model))
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_fewer_query_heads():
    counts = catalog.sqa(4, "SQA")
    assert counts == {"num_heads": 4, "num_q_heads": 2, "num_kv_heads": 1}
    layer = sparse_nnx.SparseAttention(
        "causal()", in_features=FEATURES, impl="xla", rngs=nnx.Rngs(1), **counts
    )
    params = params_of(layer)
    shapes = {name: params[name]["kernel"].shape for name in params}
    assert shapes == {"query": (12, 2, 3), "key": (12, 1, 3), "value": (12, 1, 3)} | {
        "out": (2, 3, 12)
    }
    past = jnp.tril(jnp.ones((SEQ, SEQ), bool))[None, None]
    out = softmaxed(*projected(params, X), past)
    wanted = jnp.einsum("bshd,hdf->bsf", out, params["out"]["kernel"])
    np.testing.assert_allclose(layer(X), wanted, atol=2e-6)
    other = sparse_linen.SparseAttention("causal()", impl="reference", **counts)
    np.testing.assert_allclose(other.apply({"params": params}, X), wanted, atol=2e-6)
    # As many query heads as heads: plain multi-head attention.
    np.testing.assert_array_equal(
        nnx_layer("causal()", num_q_heads=HEADS)(X), nnx_layer("causal()")(X)
    )


def test_published_head_counts():
    wanted = {"SQA": (8, 4), "sSQA": (8, 8), "xSQA": (4, 4), "xSMQA": (4, 1)}
    for variant, counts in wanted.items():
        found = catalog.sqa(16, variant)
        assert (found["num_q_heads"], found["num_kv_heads"]) == counts
    with pytest.raises(ValueError, match=r"variant='ySQA' must be one of 'SQA'"):
        catalog.sqa(16, "ySQA")
    with pytest.raises(ValueError, match=r"num_heads=6 .*multiple of 4 .*'xSQA'"):
        catalog.sqa(6, "xSQA")
    with pytest.raises(ValueError, match=r"num_q_heads=5 must be at most num_heads=4"):
        nnx_layer("causal()", num_q_heads=5)
    with pytest.raises(ValueError, match=r"num_q_heads=3 .*num_kv_heads=2"):
        nnx_layer("causal()", num_q_heads=3, num_kv_heads=2)


def test_a_drop_in_takes_any_spec_that_needs_no_arrays():
    q, k, v = (normal(1, SEQ, 2, 4, seed=s) for s in range(3))
    spec = sa.average(sa.causal(), sa.channel())
    fn = attention_fn(spec, impl="reference")
    assert fn == attention_fn(repr(spec), impl="reference")
    wanted = sa.attention(q, k, v, spec, impl="reference")
    np.testing.assert_array_equal(fn(q, k, v), wanted)
    with pytest.raises(NotImplementedError, match=r"is_causal=True: channel"):
        fn(q, k, v, is_causal=True)
    for text, names in (
        (MIXED, r"\['gates', 'sink'\]"),
        ("compressed(4, 2, key='squeeze')", r"\['squeeze'\]"),
        ("heads((causal() & kmeans(2), 1), (full(), 1))", r"\['centroids'\]"),
        ("linear('phi', decay='forget')", r"\['forget', 'phi'\]"),
        ("scatter_mean(kmeans(2, 8))", r"\['centroids'\]"),
    ):
        with pytest.raises(ValueError, match=f"{names}, .*use SparseAttention"):
            attention_fn(text)


def test_linen_says_which_spec_of_a_stack():
    x = normal(1, 5, FEATURES)
    specs = per_layer("full()", 2, first=["causal()"])
    layer = sparse_linen.SparseAttention(specs, HEADS, layer=1, impl="reference")
    assert layer.clone().spec == sa.softmax(sa.full())
    other = sparse_linen.SparseAttention("full()", HEADS, impl="reference")
    variables = other.init(jax.random.key(0), x)
    np.testing.assert_array_equal(layer.apply(variables, x), other.apply(variables, x))
    assert isinstance(layer, linen.Module)
