"""SeerAttention's gate and its loss, against the description in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sadsl as sa
from sadsl import catalog
from sadsl.layers.gate import BlockGate, distillation_loss, target
from sadsl.selections import cell_scores

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

CAUSAL = sa.causal()
N, HEADS, KV_HEADS, DIM = 50, 4, 2, 8
SCALE = DIM**-0.5


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qk():
    return drawn(1, N, HEADS, DIM), drawn(1, N, KV_HEADS, DIM, seed=1)


def of_heads(q, k):
    """Query and key of every head, float64."""
    wide = np.repeat(k[0].astype(np.float64), HEADS // KV_HEADS, axis=1)
    return [(q[0, :, h].astype(np.float64), wide[:, h]) for h in range(HEADS)]


def means(x, size):
    return np.array([x[i : i + size].mean(axis=0) for i in range(0, len(x), size)])


def causal(n=N):
    return np.tri(n, dtype=bool)


def a_gate(**options):
    options = {"block": 8, "gate_dim": 6, "num_kv_heads": KV_HEADS, **options}
    return BlockGate(HEADS, DIM, **options, rngs=nnx.Rngs(0))


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def gate_oracle(gate, q, k):
    """Pool, project, rotate, compare: head by head."""
    scores = []
    query, key = (np.asarray(w[...], np.float64) for w in (gate.query, gate.key))
    for h, (x, y) in enumerate(of_heads(q, k)):
        some = [y[i : i + 8] for i in range(0, len(y), 8)]
        pools = [[b.max(axis=0), b.min(axis=0), b.mean(axis=0)] for b in some]
        a = means(x, 8) @ query[h]
        key_pools = np.array([np.concatenate(p) for p in pools])
        b = key_pools @ key[h // (HEADS // KV_HEADS)]
        rotated = []
        for z in (a, b):
            angle = np.arange(len(z))[:, None] * 8 / 10_000.0 ** (np.arange(3) / 3)
            turned = (z[:, :3] + 1j * z[:, 3:]) * np.exp(1j * angle)
            rotated.append(np.concatenate([turned.real, turned.imag], axis=1))
        logits = rotated[0] @ rotated[1].T / np.sqrt(6)
        scores.append(np.where(causal(len(logits)), logits, -np.inf))
    return np.array(scores)


def target_oracle(q, k):
    """The true attention, the largest of each block, rows adding to 1."""
    found = []
    n = q.shape[1]
    for x, y in of_heads(q, k):
        p = softmax(np.where(causal(n), x @ y.T * SCALE, -np.inf))
        starts = range(0, n, 8)
        peaks = np.array(
            [[p[i : i + 8, j : j + 8].max() for j in starts] for i in starts]
        )
        found.append(peaks / peaks.sum(axis=1, keepdims=True))
    return np.array(found)


def test_the_gate_its_target_and_its_loss():
    q, k = qk()
    gate = a_gate()
    functions = gate.logits, gate, partial(target, block=8)
    logits, scores, wanted = (np.asarray(jax.jit(f)(q, k)[0]) for f in functions)
    expected = gate_oracle(gate, q, k)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores, softmax(expected), atol=1e-5)
    truth = target_oracle(q, k)
    np.testing.assert_allclose(wanted, truth, atol=1e-6)
    # 7 rows of blocks: the first of them is left out.
    some, p = truth[:, 1:], softmax(expected)[:, 1:]
    ratio = np.where(some > 0, some, 1) / np.where(some > 0, p, 1)
    terms = some * np.log(ratio)
    loss = partial(distillation_loss, logits[None])
    assert float(loss(wanted[None])) == pytest.approx(10 * terms.mean(), rel=1e-4)
    perfect = np.log(np.maximum(wanted, 1e-30)).astype(np.float32)
    assert float(distillation_loss(perfect[None], wanted[None])) == pytest.approx(
        0, abs=1e-5
    )


def test_the_target_a_few_blocks_at_a_time(monkeypatch):
    q, k = qk()
    # One row of blocks, and three of its seven blocks.
    monkeypatch.setattr(cell_scores, "LIMIT", HEADS * 8 * 8 * 3)
    np.testing.assert_allclose(target(q, k, block=8)[0], target_oracle(q, k), atol=1e-6)


def test_the_target_holds_no_matrix_of_all_pairs():
    """With the lse of the attention, memory is that of the blocks."""
    n, block = 2048, 64
    q = jax.ShapeDtypeStruct((1, n, 4, 8), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, 4, n), jnp.float32)
    call = jax.jit(lambda q, lse: target(q, q, lse, block=block))
    used = call.lower(q, lse).compile().memory_analysis()
    assert used.temp_size_in_bytes < 4 * n * n * 4 / 2


@pytest.mark.slow
def test_the_target_of_the_lse_of_a_call_and_its_gradients():
    q, k = qk()
    _, lse = sa.attention(q, k, k, CAUSAL, return_lse=True)
    gate = a_gate()

    def loss(k, lse):
        return distillation_loss(gate.logits(q, k), target(q, k, lse, block=8))

    found = jax.value_and_grad(loss, argnums=(0, 1))(k, lse)
    wanted = jnp.asarray(target_oracle(q, k), jnp.float32)[None]

    def by_hand(k):
        return distillation_loss(gate.logits(q, k), wanted)

    value, gradient = jax.value_and_grad(by_hand)(k)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1][0], gradient, atol=1e-6)
    assert not np.asarray(found[1][1]).any()


def test_an_lse_of_another_shape_is_refused():
    q, k = qk()
    with pytest.raises(ValueError, match=r"lse has shape \(1, 2, 50\): it must be"):
        target(q, k, jnp.zeros((1, 2, N)), block=8)


@pytest.mark.slow
def test_the_gate_learns_and_its_scores_decide():
    q, k = qk()
    wanted = target(q, k, block=8)
    graph, weights = nnx.split(a_gate())

    @jax.jit
    def step(weights):
        def loss(weights):
            return distillation_loss(nnx.merge(graph, weights).logits(q, k), wanted)

        value, gradient = jax.value_and_grad(loss)(weights)
        return value, jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)

    losses = []
    for _ in range(12):
        value, weights = step(weights)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    spec = catalog.seer_attention(0.2, block=8)
    gate = nnx.merge(graph, weights)(q, k)
    parts = sa.select(spec, q, k, operands={"gate": gate})
    one = {name: np.asarray(x)[0] for name, x in parts.items()}
    pairs = spec.dense(N, num_heads=HEADS, operands=one)
    wide = np.asarray(gate)[0].repeat(8, axis=1).repeat(8, axis=2)[:, :N, :N] > 0.2
    wide[:, 40:] = True  # the last two rows of blocks
    assert (pairs == wide & causal()).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"gate_dim": 5}, "gate_dim=5 must be even"),
        ({"block": 0}, "block=0 must be at least 1"),
    ],
)
def test_gates_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        a_gate(**options)


def test_arrays_that_do_not_fit_the_gate():
    q, k = qk()
    with pytest.raises(ValueError, match=r"k has shape .* \[batch, seq, 2, 8\]"):
        a_gate()(q, q)
    with pytest.raises(ValueError, match=r"wanted \(1, 4, 4, 4\)"):
        distillation_loss(jnp.zeros((1, 4, 7, 7)), jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"skip=1\.0 must be"):
        distillation_loss(jnp.zeros((1, 4, 7, 7)), jnp.zeros((1, 4, 7, 7)), skip=1.0)
    small = {"gate": np.zeros((HEADS, 4, 4), np.float32)}  # of blocks of 16
    with pytest.raises(ValueError, match=r"it must be \(heads, 7, 7\)"):
        sa.select(catalog.seer_attention(block=8), q, k, operands=small)
