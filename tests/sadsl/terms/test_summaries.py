"""Partitions against sets of tokens, pools, and the errors of summaries."""

import combiner_oracle as by_sets
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl import catalog, plot
from sadsl.run import pools
from sadsl.terms.cluster_regions import tokens_read

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


LENGTHS = (1, 2, 7, 13, 60, 130, 257)
# The name of a pattern of sets, and the partition whose regions are the same.
PARTITIONS = {
    "fixed": (by_sets.fixed, sa.spans),
    "fixed both ways": (
        lambda n, s: by_sets.fixed(n, s, causal=False),
        lambda s: sa.spans(s, causal=False),
    ),
    "logsparse": (lambda n, s: by_sets.logsparse(n), lambda s: sa.tower()),
    "vertical": (by_sets.vertical, sa.columns),
    "vertical both ways": (
        lambda n, w: by_sets.vertical(n, w, causal=False),
        lambda w: sa.columns(w, causal=False),
    ),
    "horizontal": (by_sets.horizontal, sa.rows),
    "horizontal both ways": (
        lambda n, w: by_sets.horizontal(n, w, causal=False),
        lambda w: sa.rows(w, causal=False),
    ),
    "rowmajor": (by_sets.rowmajor, sa.rowmajor),
}


def sets_of(partition, n):
    """The members of the regions that each query reads, as sorted tuples."""
    regions = partition.num_regions(n)
    members = partition.members(n).dense(regions, n)[0]
    seen = partition.seen(n).dense(n, regions)[0]
    tuples = [tuple(map(int, np.flatnonzero(row))) for row in members]
    return [sorted(tuples[j] for j in np.flatnonzero(row)) for row in seen]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PARTITIONS)
def test_regions_are_the_sets_of_the_paper(name):
    sets, partition = PARTITIONS[name]
    for n in LENGTHS:
        for size in (1, 2, 5, 64):
            pattern, found = sets(n, size), partition(size)
            wanted = [sorted(r.members for r in row) for row in pattern.regions]
            assert sets_of(found, n) == wanted, (n, size)
            support = [{j for r in row for j in r} for row in wanted]
            dense = found.support.dense(n)[0]
            assert [set(np.flatnonzero(row)) for row in dense] == support, (n, size)


def test_the_halves_of_rows_are_those_of_the_published_mixture():
    for n, w in ((1, 3), (13, 5), (16, 4)):
        wanted = by_sets.mixture(n, w).regions
        parts = sa.columns(w), sa.rows(w, part="before"), sa.rows(w, part="after")
        found = zip(*(sets_of(part, n) for part in parts), strict=True)
        for rows, row in zip(found, wanted, strict=True):
            assert sorted(r for part in rows for r in part) == sorted(
                r.members for r in row
            )


def test_the_sets_of_a_worked_example():
    # Three rows of four, query 10: row 2, column 2.
    assert sets_of(sa.columns(4), 12)[10] == [(0, 4), (1, 5), (3, 7)]
    assert sets_of(sa.rows(4), 12)[10] == [(0, 1, 3), (4, 5, 7)]
    assert sets_of(sa.rowmajor(4), 12)[10] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sets_of(sa.spans(4), 12)[10] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sets_of(sa.tower(), 12)[10] == [tuple(range(8)), (8, 9)]
    assert sets_of(sa.tower(), 12)[11] == [tuple(range(8)), (8, 9), (10,)]
    direct = catalog.combiner_axial_vertical(4).terms[:2]
    held = np.any([m.dense(12)[0, 10] for m in direct], axis=0)
    assert list(np.flatnonzero(held)) == [2, 6, 8, 9, 10]


def test_a_tower_has_a_region_a_token_and_a_few_blocks_a_query():
    n = 1 << 14
    partition = sa.tower()
    regions = partition.num_regions(n)
    assert regions == n + n // 128
    for held, sizes in (
        (partition.seen(n), (n, regions)),
        (partition.members(n), (regions, n)),
    ):
        plan = sa.plan(held, *sizes)
        # The bits that are set in all numbers below 2**14.
        assert plan.num_pairs == 14 * n // 2
        assert plan.num_full + plan.num_partial <= 2 * n // 128 + 1


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_pools_are_those_of_the_members_that_exist(pool):
    n = 13
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, n, 1, 3)).astype(np.float32)
    valid = np.ones((2, n), bool)
    valid[0, 9:] = valid[1, :5] = False
    operation = {"max": np.max, "mean": np.mean, "sum": np.sum}[pool]
    for partition in (
        sa.spans(5), sa.tower(), sa.columns(5), sa.columns(5, causal=False),
        sa.rows(5), sa.rows(5, part="before"), sa.rows(5, part="after"),
        sa.regions(sa.blocks(3).lift(1), sa.full(), 4),
    ):  # fmt: skip
        found = pools.pooled(x, jnp.asarray(valid), partition=partition, pool=pool)
        counts = pools.counted(jnp.asarray(valid), partition=partition)
        held = partition.members(n).dense(partition.num_regions(n), n)[0]
        for b in range(2):
            for j, row in enumerate(held & valid[b]):
                wanted = operation(x[b, row], axis=0) if row.any() else 0 * x[b, 0]
                np.testing.assert_allclose(found[b, j], wanted, atol=1e-6)
                assert counts[b, j] == row.sum()


def test_specs_are_text():
    for text in (
        "summaries(spans(4))",
        "summaries(spans(4, causal=False, own=True), pool='mean', phi='relu')",
        "summaries(tower(), phi=('f', 'g'), valid='there')",
        "summaries(columns(8, causal=False), pool='sum')",
        "summaries(rows(8, part='before'))",
        "summaries(rowmajor(8, key='wsum_proj', proj='dense'))",
        "summaries(clusters(kmeans(4, members='argmax'), causal=False))",
        "summaries(regions(blocks(4), causal(), 4, full()))",
        "joint(blocks(4) & causal(), summaries(spans(4)))",
    ):
        spec = sa.parse(text)
        assert repr(spec) == text
        assert sa.parse(repr(spec)) == spec


def test_the_support_is_the_pairs_in_regions():
    spec = catalog.combiner_fixed(4)
    assert (spec.support.dense(13)[0] == sa.causal().dense(13)[0]).all()
    own = sa.regions(
        sa.where(lambda q, k: k // 4 == q), sa.where(lambda q, k: k < q // 4), 4
    )
    assert (own.support.dense(13, 13) == sa.spans(4).support.dense(13, 13)).all()


REFUSED = {
    "spans: size=0 must be at least 1": lambda: sa.spans(0),
    "later tokens, which a causal query": lambda: sa.spans(4, own=True),
    "columns: width=0 must be at least 1": lambda: sa.columns(0),
    "rows: part='left' must be one of others": lambda: sa.rows(4, part="left"),
    "rowmajor: key='v' must be one of none": lambda: sa.rowmajor(4, key="v"),
    "proj='a b' must be the name of an operand": lambda: sa.rowmajor(4, proj="a b"),
    "members='argmax'": lambda: sa.clusters(sa.kmeans(4)),
    "pool='min' must be one of max": lambda: sa.summaries(sa.spans(4), "min"),
    "'a b' must be 'identity', 'relu' or": lambda: sa.summaries(sa.spans(4), phi="a b"),
    "are not pooled: leave both": lambda: sa.summaries(sa.rowmajor(4), "mean"),
    "causal=False is not defined": lambda: catalog.combiner_logsparse(causal=False),
    "form='both' must be 'paper' or 'code'": lambda: catalog.combiner_mixture(
        4, "both"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_makes_no_partition_is_refused(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        REFUSED[message]()


def test_what_is_of_another_type_is_refused():
    with pytest.raises(TypeError, match="summaries takes a partition"):
        sa.summaries(sa.causal())
    with pytest.raises(TypeError, match="one name for the queries and one for"):
        sa.summaries(sa.spans(4), phi=("f",))
    with pytest.raises(TypeError, match="members=3 must be an index map"):
        sa.regions(3, sa.full(), 4)
    with pytest.raises(NotImplementedError, match="weight to empty regions"):
        catalog.combiner_mixture(4, "code", causal=False)


def refused(spec, message, error=ValueError, kv=None, **options):
    q = jnp.ones((1, 13, 2, 8))
    k = q if kv is None else q[:, :kv]
    with pytest.raises(error, match=message):
        sa.attention(q, k, k, spec, impl="reference", **options)


def test_calls_that_do_not_fit_are_refused():
    far = sa.summaries(sa.spans(4))
    refused(far, "keys must belong to the same", NotImplementedError, kv=12)
    refused(far, "at offset 2", NotImplementedError, q_offset=2)
    bidirectional = sa.summaries(sa.rowmajor(4, causal=False, key="wsum"))
    refused(bidirectional, "does not cover 13 tokens: the last row is short")
    learned = sa.summaries(sa.spans(4), phi="deep")
    refused(learned, "summaries read 'deep'.*pass operands=")
    refused(learned, "must be a function", TypeError, operands={"deep": 3})
    wide = {"deep": lambda x: jnp.concatenate([x, x], axis=-1)}
    refused(learned, r"returned shape \(1, 13, 2, 16\) for", operands=wide)
    padded = sa.summaries(sa.spans(4), valid="there")
    refused(padded, "'there', which has shape None: pass operands=")
    refused(padded, r"has shape \(12,\)", operands={"there": jnp.ones(12)})


def test_regions_of_your_own_must_cover_what_they_claim():
    members = sa.where(lambda q, k: k // 4 == q)
    seen = sa.where(lambda q, k: k < q // 4)
    far = sa.where(lambda q, k: k // 4 < q // 4)
    hole = sa.where(lambda q, k: (k < q // 4) & (k >= 1))
    refused(
        sa.summaries(sa.regions(members, hole, 4, far)),
        "does not cover .* query 4 has key 0 in no region that it sees",
    )
    more = sa.where(lambda q, k: k <= q // 4)
    refused(
        sa.summaries(sa.regions(members, more, 4, far)),
        "query 0 has key 0 in a region that it sees",
    )
    double = sa.where(lambda q, k: (k // 4 == q) | (k // 4 == q - 1))
    refused(
        sa.summaries(sa.regions(double, seen, 4, far)),
        "query 8 has key 0 in 2 of the regions that it sees: they must be disjoint",
    )


def test_regions_of_your_own_without_members_are_not_seen():
    # Region 0 is empty, and sees to it that spans count from 1.
    own = sa.regions(
        sa.where(lambda q, k: k // 4 == q - 1), sa.where(lambda q, k: k <= q // 4), 5
    )
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 13, 2, 8)), jnp.float32)
    specs = (sa.joint(sa.causal() & sa.blocks(4), sa.summaries(p)) for p in (
        own, sa.spans(4)
    ))  # fmt: skip
    mine, theirs = (sa.attention(q, q, q, s, impl="reference") for s in specs)
    oracle.assert_close(mine, np.asarray(theirs, np.float64), "float32")


@pytest.mark.slow
def test_tokens_of_no_cluster_and_empty_clusters_are_left_out():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 1, 4)), jnp.float32)
    kmeans = sa.kmeans(3, members="argmax", norm="none")
    # The third centroid is the first one again, and loses every tie.
    means = jnp.asarray([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [1.0, 0, 0, 0]]])
    spec = sa.summaries(sa.clusters(kmeans, causal=False))
    given = {"centroids": means}
    out, lse = sa.attention(
        q, q, q, spec, operands=given, return_lse=True, impl="reference"
    )
    assert np.isfinite(lse).all()
    assert np.isfinite(out).all()
    found = sa.select(spec, q, q, operands=given)
    assert set(np.unique(found[kmeans.key("k_label")])) <= {0, 1}


@pytest.mark.parametrize("clusters", [3, 130])
def test_a_block_of_queries_lists_the_last_of_each_cluster_before_it(clusters):
    n = 300
    kmeans = sa.kmeans(clusters, members="argmax")
    partition = sa.clusters(kmeans)
    block = partition.block()
    assert block == (128 if clusters == 3 else 256)
    # Someone is in no cluster, and the second half of the clusters is empty.
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, -(-clusters // 2), size=(1, 2, n))
    found = tokens_read(jnp.asarray(labels, jnp.int32), partition=partition)
    listed = partition.num_listed(n)
    assert listed == clusters * -(-n // block)
    np.testing.assert_array_equal(found[0, :, listed:], [range(n)] * 2)
    of_block = found[..., :listed].reshape(2, -1, clusters)
    for head, row in enumerate(labels[0]):
        for b in range(of_block.shape[1]):
            last = [
                max((j for j in range(b * block) if row[j] == c), default=-1)
                for c in range(clusters)
            ]
            np.testing.assert_array_equal(of_block[head, b], last)


@pytest.mark.slow
def test_labels_may_be_given():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 13, 2, 8)), jnp.float32)
    spec = catalog.routing_combiner(3)
    means = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    chosen = sa.select(spec, q, q, operands={"centroids": means})
    again = sa.attention(
        q, q, q, spec, operands={"centroids": means, **chosen}, impl="reference"
    )
    once = sa.attention(q, q, q, spec, operands={"centroids": means}, impl="reference")
    np.testing.assert_array_equal(again, once)


def test_a_matrix_of_weights_is_drawn_with_its_sums():
    matrix = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    ax = plot.weights(matrix, title="causal")
    assert ax.get_title() == "causal\n62.5% of the pairs; rows sum to 1"
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(drawn.mask, matrix == 0)
    note = plot.weights(np.zeros((2, 2)), ax=ax).get_title()
    assert note == "weights\n0.0% of the pairs; rows sum to 0"
    plt.close(ax.figure)


def test_a_matrix_of_weights_needs_keys_that_values_do_not_make():
    q = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match="look at key='wsum' instead"):
        sa.induced(q, q, catalog.combiner_axial_rowmajor(2))
