"""The routing layers and the learning of their centroids, against literal loops."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sadsl as sa
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers import state as clusters
from sadsl.layers.routing import Routing
from sadsl.selections.kmeans import normalized

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

ROUTING = Routing(num_clusters=3, window=9, local_window=6, decay=0.9)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens():
    """Vectors of two heads, of which some are padding."""
    x = normalized(jnp.asarray(normal(2, 2, 25, 6)), "layer")
    return x.at[0, :, 20:].set(0)


def loops(x, means):
    """The cluster of every token and head, None for padding; float64."""
    label = {}
    for b, h, i in np.ndindex(*x.shape[:3]):
        affinity = means[h] @ x[b, h, i]
        label[b, h, i] = int(np.argmax(affinity)) if np.any(x[b, h, i]) else None
    return label


@pytest.mark.slow
def test_the_centroids_follow_the_published_moving_average():
    x, start = tokens(), clusters.initial(jax.random.key(1), 2, 4, 6)
    np.testing.assert_array_equal(start.sums, start.means)
    np.testing.assert_allclose(start.means.std(axis=-1), 1, atol=1e-5)
    moved = jax.jit(partial(clusters.update, decay=0.9, epsilon=1e-3))(start, x)
    vectors, means = np.asarray(x, np.float64), np.asarray(start.means, np.float64)
    label = loops(vectors, means)
    for h in range(2):
        count, total = np.zeros(4), np.zeros((4, 6))
        for (b, head, i), c in label.items():
            if head == h and c is not None:
                count[c] += 1
                total[c] += vectors[b, h, i]
        count = 0.9 * 1 + 0.1 * count
        total = 0.9 * means[h] + 0.1 * total
        every = count.sum()
        smooth = (count + 1e-3) / (every + 4 * 1e-3) * every
        np.testing.assert_allclose(moved.counts[h], count, rtol=1e-5)
        np.testing.assert_allclose(moved.sums[h], total, atol=1e-5)
        np.testing.assert_allclose(moved.means[h], total / smooth[:, None], atol=1e-5)


def test_a_centroid_without_tokens_stays():
    start = clusters.initial(jax.random.key(1), 1, 3, 6)
    far = start._replace(means=start.means.at[0, 2].set(-100 * start.means[0, 0]))
    far = far._replace(sums=far.means)
    x = jnp.broadcast_to(start.means[:, :1], (1, 1, 30, 6))
    for step in (clusters.update, clusters.update_means):
        found = jax.jit(partial(step, decay=0.9))(far, x)
        np.testing.assert_allclose(found.means[0, 2], far.means[0, 2], rtol=1e-4)
        assert float(jnp.abs(found.means - far.means).max()) > 0


@pytest.mark.slow
def test_directions_of_sums_and_first_centroids():
    x = normalized(tokens(), "unit")
    start = clusters.initial(jax.random.key(1), 2, 4, 6, "unit")
    vectors, means = np.asarray(x, np.float64), np.asarray(start.means, np.float64)
    wanted = means.copy()
    for h in range(2):
        for c in range(4):
            mine = [vectors[at] for at, is_c in loops(vectors, means).items()
                    if is_c == c and at[1] == h]  # fmt: skip
            if mine:
                direction = np.sum(mine, axis=0)
                wanted[h, c] = 0.9 * means[h, c] + 0.1 * direction / np.linalg.norm(
                    direction
                )
    found = jax.jit(partial(clusters.update_means, decay=0.9))(start, x)
    np.testing.assert_allclose(found.means, wanted, atol=1e-5)
    # Three tight bunches are found from any three tokens that lie in all of them.
    bunches = np.eye(6)[np.arange(60) % 3] + 0.01 * normal(60, 6)
    bunches = normalized(jnp.asarray(bunches[None, None], jnp.float32), "unit")
    for seed in range(20):
        fit = clusters.lloyd(jax.random.key(seed), bunches, 3)
        nearest = np.sort(np.asarray(fit.means[0] @ np.eye(6)[:3].T).argmax(1))
        if len(set(nearest)) == 3:
            break
    np.testing.assert_allclose(np.linalg.norm(fit.means[0], axis=-1), 1, atol=1e-5)
    assert np.asarray(fit.means[0] @ np.eye(6)[:3].T).max(axis=1).min() > 0.99
    with pytest.raises(ValueError, match="61 exceeds the 60 tokens"):
        clusters.lloyd(jax.random.key(0), bunches, 61)


@pytest.mark.slow
def test_the_commitment_loss_and_its_gradient():
    x, means = tokens(), clusters.initial(jax.random.key(1), 2, 4, 6).means
    vectors, centres = np.asarray(x, np.float64), np.asarray(means, np.float64)
    apart = {at: vectors[at] - centres[at[1], c]
             for at, c in loops(vectors, centres).items() if c is not None}  # fmt: skip
    found, (of_x, of_means) = jax.jit(
        jax.value_and_grad(clusters.commitment, argnums=(0, 1))
    )(x, means)
    wanted = np.mean([d @ d for d in apart.values()])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    gradient = np.zeros(x.shape)
    for at, d in apart.items():
        gradient[at] = 2 * d / len(apart)
    np.testing.assert_allclose(of_x, gradient, atol=1e-6)
    np.testing.assert_array_equal(of_means, 0)
    nothing = clusters.commitment(jnp.zeros_like(x), means)
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.slow
def test_devices_of_an_axis_share_their_centroids():
    x, start = tokens(), clusters.initial(jax.random.key(1), 2, 4, 6)
    unit = normalized(x, "unit")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.P("data"), jax.P()

    def sharded(f, *args, specs):
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False
        )
        return jax.jit(mapped)(*args)

    for step, vectors in ((clusters.update, x), (clusters.update_means, unit)):
        both = partial(step, axis_name="data", decay=0.9)
        found = sharded(both, start, vectors, specs=(whole, split))
        for a, b in zip(found, step(start, vectors, decay=0.9), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    first = partial(clusters.lloyd, num_clusters=4, steps=0, axis_name="data")
    found = sharded(first, jax.random.key(3), unit, specs=(whole, split))
    alone = clusters.lloyd(jax.random.key(3), unit[:1], 4, 0)
    np.testing.assert_allclose(found.means, alone.means, atol=1e-6)


# ---- The layers

X = normal(2, 20, 12, seed=4)


def nnx_layer(routing=ROUTING, **options):
    return nnx_layers.RoutingAttention(
        4, 12, routing=routing, rngs=nnx.Rngs(1), **options
    )


def by_hand(layer, x):
    """The output of a layer and its centroids' vectors, from its own parameters."""
    project = lambda linear: jnp.einsum("bsf,fhd->bshd", x, linear.kernel[...])
    q, v = project(layer.query), project(layer.value)
    k = None if layer.key is None else project(layer.key)
    options, local = layer.routing, layer.num_local
    near, routed = options.spec(4).parts
    here = q[:, :, :local], k[:, :, :local], v[:, :, :local]
    there = q[:, :, local:], q[:, :, local:] if options.share_qk else k[:, :, local:]
    if options.variant == "official":
        there = [normalized(y, "layer") for y in there]
    elif options.share_qk:
        there = there[0], normalized(there[1], "unit")
    centroids = {"centroids": layer.centroids[...]}
    outs = [
        sa.attention(*here, near),
        sa.attention(*there, v[:, :, local:], routed, operands=centroids),
    ]
    return jnp.einsum(
        "bshd,hdf->bsf", jnp.concatenate(outs, axis=2), layer.out.kernel[...]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "share_qk"),
    [("official", True), ("lucidrains", True), ("official", False)],
)
def test_a_step_of_the_nnx_layer(variant, share_qk):
    routing = Routing(
        num_clusters=3, window=9, local_window=6, decay=0.9,
        variant=variant, share_qk=share_qk, beta=0.5,
    )  # fmt: skip
    layer, x = nnx_layer(routing), jnp.asarray(X)
    wanted = nnx.jit(by_hand)(layer, x)
    q = jnp.einsum("bsf,fhd->bhsd", x, layer.query.kernel[...])[:, 2:]
    k = jnp.einsum("bsf,fhd->bhsd", x, layer.key.kernel[...])[:, 2:]
    norm = "layer" if variant == "official" else "unit"
    vectors = [normalized(y, norm) for y in ([q] if share_qk else [q, k])]
    before = clusters.ClusterState(
        layer.centroids[...], layer.counts[...], layer.sums[...]
    )
    if variant == "official":
        both = [vectors[0], vectors[-1]]
        loss = 0.5 * sum(clusters.commitment(y, before.means) for y in both)
        step = clusters.update
    else:
        loss = 0.5 * clusters.commitment(vectors[0], before.means) / 3
        step = clusters.update_means
    together = jnp.concatenate(vectors, axis=2)
    moved = jax.jit(partial(step, decay=0.9))(before, together)

    def total_of(layer, x):
        out = layer(x)
        return jnp.sum(out**2) + nnx_layers.commitment_loss(layer), out

    if variant == "official" and share_qk:
        run = nnx.jit(nnx.value_and_grad(total_of, has_aux=True))
        (total, out), gradient = run(layer, x)
        kernels = jax.tree.leaves(nnx.to_pure_dict(gradient))
        assert all(jnp.isfinite(g).all() and jnp.any(g != 0) for g in kernels)
    else:
        total, out = nnx.jit(total_of)(layer, x)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(layer.commitment_loss[...], loss, rtol=1e-5)
    np.testing.assert_allclose(total, jnp.sum(wanted**2) + loss, rtol=1e-5)
    np.testing.assert_allclose(layer.centroids[...], moved.means, atol=1e-5)
    np.testing.assert_allclose(layer.counts[...], moved.counts, atol=1e-5)


@pytest.mark.slow
def test_evaluation_changes_nothing():
    layer, x = nnx_layer(), jnp.asarray(X)
    layer.eval()
    before = nnx.to_pure_dict(nnx.state(layer))
    out = layer(x)
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(layer))
    )
    layer.train()
    np.testing.assert_array_equal(layer(x, use_running_average=True), out)
    assert float(layer.commitment_loss[...]) == 0
    # Parameters and centroids are apart, so that optimizers see the former alone.
    names = set(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    assert names == {"query", "key", "value", "out"}
    names = set(nnx.to_pure_dict(nnx.state(layer, nnx_layers.Centroids)))
    assert names == {"centroids", "counts", "sums"}
    layer.start_from(x, jax.random.key(0))
    np.testing.assert_allclose(
        np.linalg.norm(layer.centroids[...], axis=-1), 1, atol=1e-5
    )


@pytest.mark.slow
def test_the_linen_layer_is_the_nnx_layer():
    same, x = nnx_layer(), jnp.asarray(X)
    layer = linen_layers.RoutingAttention(4, ROUTING)
    start = {name: getattr(same, name)[...] for name in ("centroids", "counts", "sums")}
    params = nnx.to_pure_dict(nnx.state(same, nnx.Param))
    variables = {"params": params, "routing": start}
    made = layer.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(made["routing"]["sums"], made["routing"]["centroids"])
    train = jax.jit(partial(layer.apply, train=True, mutable=["routing", "losses"]))
    out, changed = train(variables, x)
    np.testing.assert_allclose(out, same(x), atol=1e-6)
    (loss,) = changed["losses"]["commitment"]
    np.testing.assert_allclose(loss, same.commitment_loss[...], rtol=1e-5)
    for name, x_ in changed["routing"].items():
        np.testing.assert_allclose(x_, getattr(same, name)[...], atol=1e-6)
    np.testing.assert_allclose(layer.apply(variables, x), out, atol=1e-6)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, x, train=True)


def test_positions_turn_for_the_local_heads_alone():
    turned = []

    def turn(q, k, scale):
        turned.append((q.shape, k.shape))
        return q * scale, k

    layer, x = nnx_layer(), jnp.asarray(X)
    local, plain = layer.num_local, layer(x)
    for scale, same in ((1.0, True), (3.0, False)):
        found = nnx_layer(transform_qk=partial(turn, scale=scale))(x)
        assert np.allclose(found, plain, atol=1e-6) == same
    assert set(turned) == {((2, 20, local, 3), (2, 20, local, 3))}
    last = partial(turn, scale=2.0)
    of_linen = linen_layers.RoutingAttention(4, routing=ROUTING, transform_qk=last)
    of_linen.init(jax.random.key(0), x)
    assert len(turned) == 3


def test_plain_layers_take_terms_of_several_softmaxes():
    spec = "heads((causal(), 2), (scatter_mean(causal() & kmeans(2)), 2))"
    operands, x = {"centroids": jnp.asarray(normal(2, 2, 3))}, jnp.asarray(X)
    layer = nnx_layers.SparseAttention(spec, 4, 12, rngs=nnx.Rngs(1))
    out = layer(x, operands=operands)
    same = linen_layers.SparseAttention(spec, 4)
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    np.testing.assert_allclose(same.apply(params, x, operands=operands), out, atol=1e-6)
    assert same.spec == sa.parse(spec)


def test_layers_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="num_local=4 of num_heads=4"):
        nnx_layer(Routing(num_local=4))
    layer = nnx_layer(Routing(num_clusters=2, window=21, local_window=6))
    with pytest.raises(ValueError, match="window=21 exceeds the 20 positions"):
        layer(jnp.asarray(X))
    assert nnx_layer(Routing(num_local=0)).key is None
