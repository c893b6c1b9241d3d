"""Every Combiner variant against the sets and sums of the paper, in float64."""

from functools import partial

import combiner_oracle as by_sets
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from calls import BACKENDS

import sadsl as sa
from sadsl import catalog
from sadsl.selections.kmeans import normalized

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

W = 5
# Name: the spec, its sets, and what the oracle has to know.
CASES = {
    "fixed": (catalog.combiner_fixed(W), partial(by_sets.fixed, s=W)),
    "fixed both ways": (
        catalog.combiner_fixed(W, causal=False),
        partial(by_sets.fixed, s=W, causal=False),
    ),
    "fixed with own": (
        catalog.combiner_fixed(W, causal=False, own=True),
        partial(by_sets.fixed, s=W, causal=False, own=True),
    ),
    "logsparse": (catalog.combiner_logsparse(), by_sets.logsparse),
    "vertical": (catalog.combiner_axial_vertical(W), partial(by_sets.vertical, w=W)),
    "vertical both ways": (
        catalog.combiner_axial_vertical(W, causal=False),
        partial(by_sets.vertical, w=W, causal=False),
    ),
    "horizontal": (
        catalog.combiner_axial_horizontal(W),
        partial(by_sets.horizontal, w=W),
    ),
    "horizontal both ways": (
        catalog.combiner_axial_horizontal(W, causal=False),
        partial(by_sets.horizontal, w=W, causal=False),
    ),
    "rowmajor": (
        catalog.combiner_axial_rowmajor(W, key="wsum"),
        partial(by_sets.rowmajor, w=W),
    ),
    "rowmajor both ways": (
        catalog.combiner_axial_rowmajor(W, causal=False, key="wsum"),
        partial(by_sets.rowmajor, w=W, causal=False),
    ),
    "mixture": (catalog.combiner_mixture(W, "code"), partial(by_sets.mixture, w=W)),
}


def tensors(n, batch=1, heads=2, kv_heads=1, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def options_of(name):
    return by_sets.Options(key="wsum") if "rowmajor" in name else by_sets.Options()


def assert_matches(spec, patterns, arrays, options, operands=None, **how):
    """Values, lse and gradients of a spec, compiled at once."""

    @jax.jit
    def found_of(q, k, v, do):
        def call(q, k, v):
            how_ = {"operands": operands, "return_lse": True, **how}
            return sa.attention(q, k, v, spec, **how_)

        (out, lse), pull = jax.vjp(call, q, k, v)
        return out, lse, *pull((do, jnp.sin(1 + lse)))

    found, wanted = found_of(*arrays), by_sets.attention(*arrays, patterns, options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        oracle.assert_close(a, b, "float32", f"{spec!r} {how} {name}")


def assert_case(name, n, **how):
    spec, sets = CASES[name]
    assert_matches(spec, [sets(n)] * 2, tensors(n), options_of(name), **how)


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "impl"),
    [
        # The last row is short.
        ("logsparse", 13, "reference"),
        pytest.param("vertical both ways", 13, "reference", **SLOW),
        ("horizontal", 13, "reference"),
        ("rowmajor", 13, "reference"),
        pytest.param("mixture", 13, "reference", **SLOW),
        ("fixed both ways", 43, "xla"),
        # Two groups of levels.
        ("logsparse", 130, "xla"),
        ("fixed", 13, "tpu"),
        ("fixed", 13, "triton"),
        *(
            pytest.param(name, 60, impl, **SLOW)
            for impl in ("reference", "xla", "tpu", "triton")
            for name in CASES
        ),
    ],
)
def test_values_and_gradients_are_those_of_the_sets(name, n, impl):
    spec, sets = CASES[name]
    how = BACKENDS[impl] | {"impl": impl}
    assert_matches(spec, [sets(n)] * 2, tensors(n), options_of(name), **how)


@pytest.mark.parametrize("impl", ["reference"])
def test_one_token_attends_to_itself(impl):
    q, k, v, _ = tensors(1)
    specs = [spec for name, (spec, _) in CASES.items() if name != "rowmajor both ways"]

    @jax.jit
    def run(q, k, v):
        return [sa.attention(q, k, v, spec, impl=impl) for spec in specs]

    for spec, out in zip(specs, run(q, k, v), strict=True):
        wanted = jnp.repeat(v, 2, axis=2)
        np.testing.assert_allclose(out, wanted, rtol=1e-6, err_msg=repr(spec))


def deep(x, weights):
    """A dense layer and a ReLU."""
    return jax.nn.relu(jnp.einsum("...d,de->...e", x, weights.astype(x.dtype)))


WEIGHTS = np.asarray(np.random.default_rng(5).normal(size=(8, 8)) / 8**0.5, np.float32)
FEATURES = {"identity": lambda x: x, "relu": jax.nn.relu, "deep": None}


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize(
    ("make", "sets", "pool", "phi"),
    [
        (catalog.combiner_fixed, by_sets.fixed, "mean", "relu"),
        (catalog.combiner_axial_vertical, by_sets.vertical, "sum", "deep"),
        pytest.param(
            catalog.combiner_axial_horizontal, by_sets.horizontal, "max", "deep", **SLOW
        ),
    ],
)
def test_pools_and_features_are_options(make, sets, pool, phi, impl):
    spec = make(W, pool=pool, phi=phi)
    function = partial(deep, weights=jnp.asarray(WEIGHTS))
    options = by_sets.Options(pool, function if phi == "deep" else FEATURES[phi])
    operands = {"deep": function} if phi == "deep" else None
    assert_matches(spec, [sets(13, W)] * 2, tensors(13), options, operands, impl=impl)


@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize(
    "key", ["proj", *(pytest.param(x, **SLOW) for x in ("none", "wsum_proj"))]
)
def test_keys_of_rows_are_options(key, impl):
    spec = catalog.combiner_axial_rowmajor(W, key=key)
    function = partial(deep, weights=jnp.asarray(WEIGHTS))
    operands = {"proj": function} if "proj" in key else None
    options = by_sets.Options(key=key, proj=function)
    patterns = [by_sets.rowmajor(13, W)] * 2
    assert_matches(spec, patterns, tensors(13), options, operands, impl=impl)


def test_parameters_of_features_have_gradients():
    q, k, v, do = tensors(13, kv_heads=2)
    spec = catalog.combiner_fixed(W, phi="deep")

    def loss(weights):
        operands = {"deep": partial(deep, weights=weights)}
        out = sa.attention(q, k, v, spec, operands=operands, impl="reference")
        return jnp.sum(out * do)

    wide = [np.asarray(x, np.float64) for x in (q, k, v, do)]

    def wanted(weights):
        pattern = by_sets.stacked([by_sets.fixed(13, W)] * 2)
        options = by_sets.Options(phi=partial(deep, weights=weights))
        each = (
            by_sets.head(
                *(jnp.asarray(x[0, :, h]) for x in wide[:3]),
                by_sets.Arrays(*(x[h] for x in pattern)), 8**-0.5, options,
            )[0]
            for h in range(2)
        )  # fmt: skip
        return sum(jnp.sum(o * wide[3][0, :, h]) for h, o in enumerate(each))

    found = jax.jit(jax.grad(loss))(jnp.asarray(WEIGHTS))
    with jax.enable_x64(True):
        expected = jax.jit(jax.grad(wanted))(jnp.asarray(WEIGHTS, jnp.float64))
        expected = np.asarray(expected)
    oracle.assert_close(found, expected, "float32")


VALID = {
    "fixed": (sa.spans(W), by_sets.fixed),
    "logsparse": (sa.tower(), lambda n, w: by_sets.logsparse(n)),
    "vertical": (
        sa.columns(W, causal=False),
        partial(by_sets.vertical, causal=False),
    ),
    "rowmajor": (sa.rowmajor(W, key="wsum"), by_sets.rowmajor),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize(
    "name",
    [
        "fixed",
        "vertical",
        *(pytest.param(x, **SLOW) for x in ("logsparse", "rowmajor")),
    ],
)  # fmt: skip
def test_keys_that_do_not_exist_are_in_no_region(name, impl):
    partition, sets = VALID[name]
    # Of the first span nothing is left, of the first row neither.
    gone = {0, 1, 2, 3, 4, 11}
    there = np.isin(np.arange(13), list(gone), invert=True)
    pattern = by_sets.without(sets(13, W), gone)
    direct = by_sets.arrays_of(pattern).direct.astype(np.int32)
    own = sa.where(lambda q, k: sa.operand("direct")[q, k] == 1)
    # A query of no key at all has one.
    direct[:, 12] |= 1
    pattern = pattern._replace(direct=[sorted({*row, 12}) for row in pattern.direct])
    far = sa.summaries(partition, valid="there")
    spec = sa.joint(own, far, overlap="count")
    operands = {"there": there, "direct": direct}
    args = [pattern] * 2, tensors(13), options_of(name), operands
    assert_matches(spec, *args, impl=impl)


def routed(n, share_qk=True, causal=True, clusters=4):
    """Tensors, centroids, the spec, and the clusters of each head by the definition."""
    q, k, v, do = tensors(n, kv_heads=2)
    rng = np.random.default_rng(2)
    means = rng.normal(size=(2, clusters, 8)).astype(np.float32)
    # The last cluster loses every tie with the first: it is empty.
    means[:, -1] = means[:, 0]
    spec = catalog.routing_combiner(clusters, causal, share_qk=share_qk)

    def nearest(x):
        x = np.asarray(normalized(x, "layer"), np.float64)[0]
        return np.einsum("nhd,hcd->hnc", x, means).argmax(axis=-1)

    return (q, k, v, do), means, spec, nearest(q)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("n", "causal", "impl"),
    # From 129 tokens on, blocks of queries have lists.
    [(13, True, "reference"), (13, False, "reference"),
     pytest.param(130, True, "xla", **SLOW), pytest.param(130, False, "xla", **SLOW),
     pytest.param(60, True, "tpu", **SLOW), pytest.param(60, True, "triton", **SLOW)],
)  # fmt: skip
def test_other_clusters_are_summarised(n, causal, impl):
    arrays, means, spec, of_head = routed(n, causal=causal)
    patterns = [by_sets.routing(list(row), causal) for row in of_head]
    how = BACKENDS[impl] | {"impl": impl}
    operands = {"centroids": jnp.asarray(means)}
    assert_matches(spec, patterns, arrays, by_sets.DEFAULTS, operands, **how)


INDUCED = {
    name: spec for name, (spec, _) in CASES.items() if name != "fixed with own"
} | {
    "paper's mixture": catalog.combiner_mixture(W),
    "paper's mixture both ways": catalog.combiner_mixture(W, causal=False),
    "routing": catalog.routing_combiner(4),
    "routing both ways": catalog.routing_combiner(4, causal=False),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize("name", INDUCED)
def test_the_weights_are_full_sum_to_one_and_know_no_later_token(name, impl):
    n = 15
    (q, k, *_), means, *_ = routed(n)
    operands = {"centroids": jnp.asarray(means)} if "routing" in name else None

    @jax.jit
    def matrix(q, k):
        return sa.induced(q, k, INDUCED[name], operands=operands, impl=impl)

    found = matrix(q, k)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    seen = sa.full() if "both ways" in name else sa.causal()
    np.testing.assert_array_equal(found[0] > 0, seen.dense(n, num_heads=2))
    if "both ways" in name:
        return
    for cut in (0, 4, 7, 13):
        later = (np.arange(n) > cut)[:, None, None]
        # Large values, which a maximum would not miss, and small ones.
        for value in (30.0, -30.0):
            changed = (jnp.where(later, value * x[:, ::-1], x) for x in (q, k))
            after = matrix(*changed)
            held = np.s_[:, :, : cut + 1]
            np.testing.assert_array_equal(after[held], found[held])


@pytest.mark.parametrize("impl", ["reference"])
def test_learned_keys_of_rows_know_no_later_token(impl):
    q, k, v, do = tensors(13)
    spec = catalog.combiner_axial_rowmajor(W)
    operands = {"proj": partial(deep, weights=jnp.asarray(WEIGHTS))}

    @jax.jit
    def gradients(cut):
        kept = jnp.where(jnp.arange(13)[:, None, None] <= cut, do, 0)
        call = partial(sa.attention, spec=spec, operands=operands, impl=impl)
        return jax.vjp(call, q, k, v)[1](kept)

    for cut in (0, 4, 7, 11):
        found = gradients(cut)
        assert not any(np.any(x[:, cut + 1 :]) for x in found)
        assert np.any(found[2][:, : cut + 1])


@pytest.mark.slow
def test_a_mean_of_outputs_is_a_mean_of_matrices():
    q, k, *_ = tensors(13)
    specs = (
        catalog.combiner_mixture(W),
        catalog.combiner_axial_vertical(W),
        catalog.combiner_axial_horizontal(W),
    )
    whole, *parts = jax.jit(lambda: [sa.induced(q, k, spec) for spec in specs])()
    np.testing.assert_allclose(whole, sum(parts) / 2, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize(("causal", "pool"), [(True, "max"), (False, "mean")])
def test_spans_of_one_token_and_of_all_are_dense_attention(causal, pool, impl):
    q, k, *_ = tensors(13)
    dense = sa.causal() if causal else sa.full()
    specs = [catalog.combiner_fixed(span, causal, pool) for span in (1, 13, 20)]
    run = jax.jit(lambda: [sa.induced(q, k, x, impl=impl) for x in [dense, *specs]])
    wanted, *found = run()
    for matrix in found:
        np.testing.assert_allclose(matrix, wanted, atol=2e-6)
