"""Random nested specs with all options, against their definitions in float64."""

import jax
import jax.numpy as jnp
import mixture_oracle
import numpy as np
import oracle
import pytest
import strategies
from calls import BACKENDS, IMPLS, arrays
from hypothesis import given, settings
from hypothesis import strategies as st

import sadsl as sa
from sadsl.maps.named import full
from sadsl.terms.base import LayerSizes, reads

pytestmark = pytest.mark.usefixtures("quick")

N, HEADS = 13, 2
SIZES = {"batch": 1, "q_len": N, "kv_len": N, "heads": HEADS, "kv_heads": HEADS}
NEAR = sa.causal() & sa.window(4)
FAR = sa.causal() & sa.strided(3)


def _floats():
    """Every array that a spec below may read, by a name that says its heads."""
    rng = np.random.default_rng(3)
    shapes = {}
    for h in (1, HEADS):
        shapes |= {f"sink{h}": (h,), f"other{h}": (h,)}
        shapes |= {f"pairs{h}": (h, N, N), f"keys{h}": (h, N)}
        shapes |= {f"gates{h}x{m}": (N, h, m) for m in (1, 2, 3)}
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


FLOATS = _floats()
MAPS = st.one_of(st.sampled_from([NEAR, FAR, full()]), strategies.composed(2))


def softmaxes(h, maps=MAPS):
    """Softmax terms with all options, for ``h`` heads."""
    biases = [sa.alibi(), sa.pair_bias(f"pairs{h}"), sa.key_bias(f"keys{h}")]
    return st.builds(
        sa.softmax,
        maps,
        logits_soft_cap=st.sampled_from([None, None, 2.0]),
        bias=st.sampled_from([None, None, *biases]),
        sink=st.sampled_from([False, f"sink{h}", f"other{h}"]),
    )


WEIGHTS = st.sampled_from([-1.0, 0.0, 0.5])


def joinable(h, depth):
    """What has one normaliser."""
    leaf = st.one_of(MAPS, softmaxes(h))
    if depth == 0:
        return leaf
    inner = joinable(h, depth - 1)
    several = st.lists(inner, min_size=1, max_size=3)
    halves = [
        softmaxes(h, MAPS.map(lambda m, half=half: m & half))
        for half in (sa.keys(0, 6), sa.keys(6, N))
    ]
    return st.one_of(
        leaf,
        st.builds(sa.weighted, inner, WEIGHTS),
        st.builds(
            lambda terms, how: sa.joint(*terms, overlap=how),
            several, st.sampled_from(["remove", "count", "count", "refuse"]),
        ),
        st.builds(lambda *terms: sa.joint(*terms, overlap="refuse"), *halves),
    )  # fmt: skip


def specs(h, depth):
    """Any mixture, for ``h`` heads."""
    if depth == 0:
        return joinable(h, 0)
    inner = specs(h, depth - 1)
    several = st.lists(inner, min_size=1, max_size=3)
    found = [
        joinable(h, depth),
        joinable(h, depth),
        st.builds(lambda terms: sa.average(*terms), several),
        st.builds(lambda x: sa.gated(*x, gates=f"gates{h}x{len(x)}"), several),
        st.builds(sa.weighted, inner, WEIGHTS),
    ]
    if h > 1:
        by_head = st.lists(specs(1, depth - 1), min_size=h, max_size=h)
        found.append(by_head.map(lambda x: sa.heads(*((each, 1) for each in x))))
    return st.one_of(found)


def masks(of_map, heads):
    return of_map.dense(N, num_heads=heads)[None]


def check(impl, spec):
    """Output, lse and all gradients; or the error that the oracle has too."""
    q, k, v, do = arrays(**SIZES, dim=8, dim_v=8)
    dlse = jnp.asarray(np.random.default_rng(9).normal(size=(1, HEADS, N)), "float32")
    floats = {name: x for name, x in FLOATS.items() if reads(spec, name)}
    options = BACKENDS[impl] | {"impl": impl}
    try:
        out, lse, grads = mixture_oracle.with_gradients(
            spec, (q, k, v), floats, masks, do, dlse
        )
    except mixture_oracle.Shared:
        with pytest.raises(ValueError, match="overlap='refuse', but query"):
            sa.attention(q, k, v, spec, operands=floats, **options)
        return

    def loss(arrays, floats):
        found = sa.attention(
            *arrays, spec, operands=floats, return_lse=lse is not None, **options
        )
        found_out, found_lse = found if lse is not None else (found, None)
        total = jnp.sum(found_out * do)
        if found_lse is not None:
            total += jnp.sum(jnp.where(jnp.isneginf(found_lse), 0, found_lse) * dlse)
        return total, (found_out, found_lse)

    found = jax.grad(loss, (0, 1), has_aux=True)((q, k, v), floats)
    every = jax.tree.leaves((found[1], found[0]))
    expected = jax.tree.leaves(((out, lse), grads))
    assert sa.parse(repr(spec)) == spec
    for i, (a, b) in enumerate(zip(every, expected, strict=True)):
        oracle.assert_close(a, b, "float32", f"{impl} {spec!r} {i}")


def _random(impl, examples):
    @settings(max_examples=examples, deadline=None)
    @given(specs(HEADS, 3))
    def run(spec):
        check(impl, spec)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_a_nested_spec_is_its_definition(impl):
    _random(impl, {"reference": 4, "xla": 3}.get(impl, 1))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_many_nested_specs_are_their_definitions(impl):
    _random(impl, {"reference": 100, "xla": 60}.get(impl, 20))


SINK = sa.softmax(NEAR, sink="sink2")
CAPPED = sa.softmax(FAR, 2.0, sink="sink2")
NESTED = [
    sa.joint(sa.joint(NEAR, FAR, overlap="count"), sa.sinks(2)),
    sa.joint(sa.sinks(2), sa.weighted(sa.joint(NEAR, FAR, overlap="count"), 0.5)),
    # One sink in two terms that cannot be one, under each rule.
    sa.joint(SINK, CAPPED),
    sa.joint(SINK, CAPPED, overlap="count"),
    sa.joint(SINK, sa.joint(sa.sinks(2), sa.weighted(CAPPED, -1.0))),
    sa.joint(sa.weighted(CAPPED, -1.0), SINK),
    # The term with the sink has no pair left, or none at all.
    sa.joint(sa.softmax(full(), 2.0), sa.softmax(NEAR, sink="other2")),
    sa.joint(sa.softmax(~full(), sink="other2"), sa.weighted(NEAR, 0.5)),
    # Several sinks in terms that run as one.
    sa.joint(SINK, sa.softmax(FAR, sink="other2"), sa.sinks(1)),
    # Weights add up, and weighted terms give up pairs.
    sa.joint(NEAR, sa.weighted(sa.weighted(FAR, 0.5), -1.0)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spec", NESTED, ids=repr)
def test_no_option_is_lost_on_the_way(spec):
    check("reference", spec)
    held = spec.resolved(N, num_heads=HEADS)
    names = [x.sink for part in held for x in (getattr(part, "term", part),)]
    assert len([x for x in names if x]) == len({x for x in names if x})


def test_a_lowered_call_has_its_sink():
    q, k, v, _ = arrays(**SIZES, dim=8, dim_v=8)
    given = {"sink2": FLOATS["sink2"]}
    for spec in (SINK, sa.joint(SINK, FAR, sa.softmax(FAR, sink="sink2"))):
        low = sa.lower(spec, q, k, v, operands=given)
        found = low.run(q, k, v, {"sink2": given["sink2"][None]})
        wanted = sa.attention(q, k, v, spec, operands=given, return_lse=True)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert sa.plan(spec, N).num_pairs
    with pytest.raises(ValueError, match="reads its sinks from 'sink2', which was not"):
        sa.lower(SINK, q, k, v)
    with pytest.raises(ValueError, match=r"the sinks of .* must have shape \(2,\)"):
        sa.lower(SINK, q, k, v, operands={"sink2": FLOATS["sink1"]})


TWICE = [
    sa.gated(sa.gated(NEAR, FAR, NEAR), FAR),
    sa.average(NEAR, sa.softmax(FAR, sink="x"), sa.gated(NEAR, gates="x")),
    sa.softmax(NEAR, bias=sa.distance_bias("x", 3), sink="x"),
]


@pytest.mark.parametrize("spec", TWICE, ids=repr)
def test_one_name_is_one_array_to_learn(spec):
    sizes = LayerSizes(4, 4, 8, 8)
    with pytest.raises(ValueError, match=r"learns '.*' twice, of shapes"):
        spec.learned(sizes)
    same = sa.average(sa.softmax(NEAR, sink="x"), sa.softmax(FAR, sink="x"))
    assert set(same.learned(sizes)) == {"x"}
