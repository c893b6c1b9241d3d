"""Arrays and choices of map parts that simplification removes are accepted."""

import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from calls import IMPLS, arrays, assert_matches
from hypothesis import given, settings
from hypothesis import strategies as st

import sadsl as sa
from sadsl.catalog.kinetics import kinetics
from sadsl.maps.base import PerHead
from sadsl.selections import kmeans, lsh, topk

pytestmark = pytest.mark.usefixtures("quick")

N, HEADS = 23, 2
SIZES = {"batch": 2, "q_len": N, "kv_len": N, "heads": HEADS, "kv_heads": 1, "dim": 8}
AT = sa.operand
RNG = np.random.default_rng(5)
GIVEN = {
    "stop": jnp.asarray(RNG.integers(0, N, (2, N)), jnp.int32),
    "pairs": jnp.asarray(RNG.integers(0, 2, (N, N)), jnp.int32),
    "kind": jnp.asarray(RNG.integers(0, 2, (HEADS,)), jnp.int32),
    "q_segment_ids": jnp.asarray(RNG.integers(0, 2, (2, N)), jnp.int32),
    "kv_segment_ids": jnp.asarray(RNG.integers(0, 2, (2, N)), jnp.int32),
    "gate": jnp.asarray(RNG.normal(size=(HEADS, N, 6)), jnp.float32),
    "projections": jnp.asarray(RNG.normal(size=(1, 1, 8, 2)), jnp.float32),
    "centroids": jnp.asarray(RNG.normal(size=(HEADS, 3, 8)), jnp.float32),
}
READ_AT_RUN_TIME = [
    topk(2, block=8, block_q=1, eligible=sa.causal()),
    topk(2, block=4, block_q=1, score="gate"),
    topk(3, block=8, scope="shared"),
    kmeans(3),
    kmeans(3, members="argmax"),
    lsh(4),
    sa.segments(),
    sa.where(lambda q, k: k <= AT("stop")[q]),
    sa.where(lambda q, k: AT("pairs")[q, k] == 1),
    sa.where(lambda q, k, h: (AT("kind")[h] == 1) & (k <= q)),
]
SWALLOWED_BY = [
    lambda a: a | sa.full(),
    lambda a: sa.full() | a,
    lambda a: a | sa.window(N, N),
    lambda a: a & ~sa.full(),
    lambda a: a - sa.full(),
    lambda a: sa.keys(0, 0) & a,
    lambda a: a & sa.queries(N, N) & sa.queries(0, N),
    lambda a: a | ~a,
    lambda a: a - a,
    lambda a: (a | sa.full()).T,
    lambda a: (a | sa.full()) @ sa.causal(),
    lambda a: (a & sa.keys(0, 0)).permute(range(strategies.POSITIONS)),
    lambda a: PerHead((a | sa.full(), a & ~sa.full())),
]
LIVE = st.one_of(
    strategies.named_maps(), strategies.composed(2), st.sampled_from(READ_AT_RUN_TIME)
)


def _with_live(kind, swallowed, live):
    return {
        "and": lambda: swallowed & live,
        "or": lambda: live | swallowed,
        "minus": lambda: live - swallowed,
        "alone": lambda: swallowed,
    }[kind]()


SPECS = st.builds(
    _with_live,
    st.sampled_from(["and", "or", "minus", "alone"]),
    st.builds(
        lambda part, by: by(part),
        st.sampled_from(READ_AT_RUN_TIME), st.sampled_from(SWALLOWED_BY),
    ),
    LIVE,
)  # fmt: skip


def check(impl, spec, chosen_before):
    """Against float64 on the pairs of the map as it is written."""
    q, k, v, do = arrays(**SIZES)
    read = {n: x for n, x in GIVEN.items() if sa.softmax(spec).reads(n)}
    chosen = sa.select(spec, q, k, operands=read)
    every = {**read, **chosen}
    ranks = {"stop": 1, "q_segment_ids": 1, "kv_segment_ids": 1}
    held = [
        {
            n: np.asarray(x)[b % x.shape[0]] if n in chosen or n in ranks else x
            for n, x in every.items()
        }
        for b in range(2)
    ]
    pairs = np.stack([spec.dense(N, num_heads=HEADS, operands=x) for x in held])
    operands = every if chosen_before else read
    assert_matches(impl, spec, pairs, q, k, v, do, operands=operands)


def _random(examples):
    def of(impl):
        @settings(max_examples=examples, deadline=None)
        @given(SPECS, st.booleans())
        def run(spec, chosen_before):
            check(impl, spec, chosen_before)

        run()

    return of


@pytest.mark.parametrize("impl", IMPLS)
def test_a_part_that_another_swallows(impl):
    _random(3 if impl in ("reference", "xla") else 1)(impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_many_parts_that_others_swallow(impl):
    _random(60 if impl in ("reference", "xla") else 25)(impl)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("impl", "chosen_before"), [("reference", False), ("xla", True)]
)
def test_a_choice_that_falls_out_of_the_expression(impl, chosen_before):
    choice = topk(5, block=8, block_q=1, eligible=sa.causal())
    check(impl, sa.causal() & (choice | sa.full()), chosen_before)
    # A budget longer than the sequence: all of it is seen.
    check(impl, kinetics(2, 16, block=8), chosen_before)


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_what_nothing_reads_need_not_be_given(impl):
    q, k, v, _ = arrays(**SIZES)
    call = lambda spec, **given: sa.attention(q, k, v, spec, impl=impl, **given)
    wanted = call(sa.causal())
    for part in READ_AT_RUN_TIME[1::3]:
        found = call(sa.causal() & (part | sa.full()))
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="'stop' was given, but no part of the map"):
        call(sa.causal() | sa.full(), operands={"stop": GIVEN["stop"]})
    with pytest.raises(ValueError, match="'x' was given, but no part of the map"):
        call(sa.causal(), operands={"x": jnp.zeros((1, 2, 3), jnp.int32)})
    spec = sa.where(lambda q, k: k <= AT("stop")[q]) | sa.full()
    with pytest.raises(ValueError, match="must have 1 axes"):
        call(spec, operands={"stop": jnp.zeros((1, 2, 3), jnp.int32)})


@pytest.mark.slow
def test_other_terms_take_what_their_maps_read_as_written():
    q, k, v, _ = arrays(**SIZES | {"kv_heads": 2})
    ids = {n: GIVEN[n] for n in ("q_segment_ids", "kv_segment_ids")}
    swallowed = sa.causal() & (sa.segments() | sa.full())
    centroids = {"centroids": GIVEN["centroids"]}
    pairs = [
        (sa.linear(map=swallowed), sa.linear(), {}),
        (sa.softmax(swallowed, 5.0), sa.softmax(sa.causal(), 5.0), {}),
        (sa.joint(swallowed, sa.full()), sa.full(), {}),
        (
            sa.scatter_mean(kmeans(3) & swallowed),
            sa.scatter_mean(kmeans(3) & sa.causal()), centroids,
        ),
    ]  # fmt: skip
    for i, (spec, plain, mine) in enumerate(pairs):
        impl = ("xla", "reference")[i // 2 % 2]
        wanted = sa.attention(q, k, v, plain, impl=impl, operands=mine)
        for more in ({}, ids):
            found = sa.attention(q, k, v, spec, impl=impl, operands={**mine, **more})
            np.testing.assert_allclose(found, wanted, atol=2e-6)
    # The other backend of the last.
    found = sa.attention(q, k, v, spec, impl="xla", operands={**mine, **ids})
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_plan_and_a_lowered_call_take_them_too():
    q, k, v, _ = arrays(**SIZES)
    choice = topk(2, block=8, block_q=1)
    spec = sa.causal() & (choice | sa.full())
    chosen = sa.select(spec, q, k)
    assert sa.plan_for(spec, q, k, operands=chosen).num_partial > 0
    low = sa.lower(spec, q, k, v, operands=chosen)
    out, _ = low.run(q, k, v, chosen)
    np.testing.assert_allclose(
        out, sa.attention(q, k, v, sa.causal()), atol=1e-6
    )  # fmt: skip
