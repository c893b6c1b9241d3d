"""Published selections of blocks equal their descriptions, head by head."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sadsl as sa
from sadsl import catalog
from sadsl.catalog.kinetics import Decoding, block_topk_cost, dense_cost
from sadsl.catalog.sparsed import plan_step

N, HEADS, KV_HEADS, DIM = 50, 4, 2, 8
SCALE = DIM**-0.5
GRID, TILE, CUBE = (3, 4, 5), (3, 2), (2, 3, 3)
NAN = np.nan


@pytest.fixture(autouse=True)
def quickly_compiled(quick_compilation):
    jax.config.update("jax_disable_most_optimizations", True)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qk(n=N, kv_heads=KV_HEADS):
    return drawn(1, n, HEADS, DIM), drawn(1, n, kv_heads, DIM, seed=1)


@partial(jax.jit, static_argnames=("spec", "q_offset", "sm_scale"))
def select(spec, q, k, operands, q_offset=0, sm_scale=None):
    return sa.select(
        spec, q, k, operands=operands, q_offset=q_offset, sm_scale=sm_scale
    )


def seen(spec, q, k, operands=None):
    """The pairs of a spec, ``[heads, q, k]``, and its parts."""
    parts = select(spec, q, k, operands or {})
    one = {name: np.asarray(x)[0] for name, x in parts.items()}
    return spec.dense(q.shape[1], k.shape[1], HEADS, operands=one), parts


def of_heads(q, k):
    """Query and key of every head, float64."""
    wide = np.repeat(k[0].astype(np.float64), q.shape[2] // k.shape[2], axis=1)
    return [(q[0, :, h].astype(np.float64), wide[:, h]) for h in range(q.shape[2])]


def means(x, size):
    return np.array([x[i : i + size].mean(axis=0) for i in range(0, len(x), size)])


def best(scores, k, among):
    """The ``k`` best of some indices."""
    return sorted(among, key=lambda i: -scores[i])[: max(0, k)]


def causal(n=N):
    return np.tri(n, dtype=bool)


@pytest.mark.parametrize("k", [3, 9])
def test_moba(k):
    q, keys = qk()
    pairs, _ = seen(catalog.moba(k, chunk=8), q, keys)
    for h, (x, y) in enumerate(of_heads(q, keys)):
        gate = x @ means(y, 8).T
        for i in range(N):
            own = i // 8
            chunks = [own, *best(gate[i], k - 1, range(own))]
            wanted = [j for j in range(i + 1) if j // 8 in chunks]
            assert np.flatnonzero(pairs[h, i]).tolist() == wanted
    if k == 9:
        assert (pairs == causal()).all()


def chunks_of(layer):
    """The chunk of every position of the grid in a layer: frames, tiles, cubes."""
    label = []
    for t, y, x in product(*map(range, GRID)):
        cells = (t // 2,), (y // TILE[0], x // TILE[1])
        cubes = t // CUBE[0], y // CUBE[1], x // CUBE[2]
        label.append((*cells, cubes)[layer % 3])
    order = {chunk: i for i, chunk in enumerate(sorted(set(label)))}
    return np.array([order[chunk] for chunk in label])


def vmoba(layer, **options):
    return catalog.vmoba(GRID, layer, frames=2, tile=TILE, cube=CUBE, **options)


def vmoba_sets(shape, scope):
    """Entries (head, query, chunk) by what shares a selection."""
    keys = {"query": lambda x: x[:2], "head": lambda x: x[0], "block": lambda x: x[2]}
    sets = {}
    for entry in np.ndindex(*shape):
        sets.setdefault(keys.get(scope, lambda x: 0)(entry), []).append(entry)
    return sets.values()


def vmoba_mass(gate, own, tau, scope):
    chosen = own.copy()
    for entries in vmoba_sets(gate.shape, scope):
        x = np.array([gate[e] for e in entries])
        extent = x.max() - x.min()
        x = (x - x.min()) / (extent if extent > 1e-6 else 1)
        share = x / (x.sum() + 1e-6)
        mine = np.array([own[e] for e in entries])
        left = max(tau - share[mine].sum(), 0)
        order = best(share, len(x), np.flatnonzero(~mine))
        reached = np.cumsum(share[order]) >= left
        count = int(reached.argmax()) + 1 if reached.any() else len(order)
        for i in order[:count]:
            chosen[entries[i]] = True
    return chosen


def vmoba_topk(gate, own, k, scope):
    chosen = own.copy()
    for entries in vmoba_sets(gate.shape, scope):
        x = np.array([gate[e] for e in entries])
        others = [i for i, e in enumerate(entries) if not own[e]]
        for i in best(x, k * len(entries) // gate.shape[2], others):
            chosen[entries[i]] = True
    return chosen


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (0, {}),
        (1, {"tau": 0.6}),
        (2, {"tau": 0.6, "scope": "query"}),
        (4, {"tau": 0.4, "scope": "block"}),
        (5, {"tau": 0.5, "scope": "overall"}),
        (2, {"k": 2, "scope": "head"}),
        (0, {"k": 1, "scope": "overall"}),
    ],
)
def test_vmoba(layer, options):
    q, k = qk(60, HEADS)
    label = chunks_of(layer)
    scores = []
    for x, y in of_heads(q, k):
        mean = [y[label == c].mean(axis=0) for c in range(label.max() + 1)]
        scores.append(x @ np.array(mean).T)
    gate = np.array(scores)
    own = np.broadcast_to(label[:, None] == np.arange(gate.shape[2]), gate.shape).copy()
    scope = options.get("scope", "head")
    if "k" in options:
        chosen = vmoba_topk(gate, own, options["k"], scope)
    else:
        chosen = vmoba_mass(gate, own, options.get("tau", 0.25), scope)
    pairs, _ = seen(vmoba(layer, **options), q, k)
    assert (pairs == chosen[:, :, label]).all()


@pytest.mark.parametrize(
    ("tau", "extra"), [(0.25, [(1, 2)]), (0.75, [(1, 2)]), (0.85, [(1, 2), (0, 1)])]
)
def test_vmoba_global_selection_of_three_chunks(tau, extra):
    # Queries are unit vectors, so that the table is their scores: [chunk, query].
    gate = np.array([[4, 1, 0], [2, 5, 1], [0, 3, 6]], np.float32)
    q, k = np.eye(3, dtype=np.float32)[None, :, None], gate[None, :, None]
    spec = catalog.vmoba((3, 1, 1), 0, frames=1, tile=(1, 1), cube=(1, 1, 1), tau=tau)
    (chosen,) = select(spec, q, k, {}, sm_scale=1.0).values()
    found = np.argwhere(np.asarray(chosen)[0, 0] & ~np.eye(3, dtype=bool))
    assert sorted(map(tuple, found.tolist())) == sorted(extra)


def test_vmoba_is_dense_where_nothing_is_chosen_and_above_a_mass_of_1():
    q, k = qk(60, HEADS)
    assert seen(vmoba(2, tau=1.1), q, k)[0].all()
    assert seen(vmoba(0), q, np.full_like(k, NAN))[0].all()


@pytest.mark.parametrize("k", [2, 9])
def test_biformer(k):
    q, keys = qk(40)
    # Three regions along each side of 8 by 5: 3, 3 and 2 rows, 2, 2 and 1 columns.
    label = np.array([y // 3 * 3 + x // 2 for y, x in product(range(8), range(5))])
    wide = np.repeat(keys[0], HEADS // KV_HEADS, axis=1).reshape(40, -1)
    mean_q, mean_k = (
        np.array([x[label == r].astype(np.float64).mean(axis=0) for r in range(9)])
        for x in (q[0].reshape(40, -1), wide)
    )
    routes = [best(row, k, range(9)) for row in mean_q @ mean_k.T]
    wanted = [[label[j] in routes[label[i]] for j in range(40)] for i in range(40)]
    pairs, _ = seen(catalog.biformer((8, 5), k, regions=3), q, keys)
    assert (pairs == np.array(wanted)).all()
    assert pairs.all() == (k == 9)


def test_block_sparse():
    q, k = qk()
    pairs, _ = seen(catalog.block_sparse(2, block=8), q, k)
    for h, (x, y) in enumerate(of_heads(q, k)):
        scores = means(x, 8) @ means(y, 8).T
        for i in range(N):
            some = best(scores[i // 8], 2, range(i // 8 + 1))
            wanted = [j for j in range(i + 1) if j // 8 in some]
            assert np.flatnonzero(pairs[h, i]).tolist() == wanted


def gate_scores(n, heads):
    logits = drawn(heads, n, n, seed=5).astype(np.float64)
    p = np.where(causal(n), np.exp(logits), 0)
    return (p / p.sum(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.2}, {"tau": 0.3, "diagonal": True, "dense_rows": 1}, {"ratio": 0.5}],
    ids=str,
)
def test_seer_attention(options):
    q, k = qk(75)
    gate = gate_scores(10, KV_HEADS)
    spec = catalog.seer_attention(**options, block=8)
    pairs, _ = seen(spec, q, k, {"gate": gate})
    rows = options.get("dense_rows", 2)
    kept = max(1, int((1 - np.sqrt(1 - options.get("ratio", 0))) * 10))
    for h in range(HEADS):
        scores = gate[h // (HEADS // KV_HEADS)]
        for i in range(75):
            own = i // 8
            if "ratio" in options:
                some = best(scores[own], kept, range(own + 1))
            else:
                some = [c for c in range(own + 1) if scores[own, c] > options["tau"]]
            some += [own] if options.get("diagonal") else []
            some = range(own + 1) if own >= 10 - rows else some
            wanted = [j for j in range(i + 1) if j // 8 in some]
            assert np.flatnonzero(pairs[h, i]).tolist() == wanted


def test_seer_attention_that_keeps_all_is_dense():
    q, k = qk(75)
    gate = {"gate": gate_scores(10, 1)}
    for options in ({"tau": -1.0}, {"ratio": 1.0}):
        assert (
            seen(catalog.seer_attention(**options, block=8), q, k, gate)[0]
            == causal(75)
        ).all()


def test_nsa_topk():
    q, k = qk()
    pairs, _ = seen(catalog.nsa_topk(4, block=6), q, k)
    heads = of_heads(q, k)
    for group, i in product(range(KV_HEADS), range(N)):
        own, whole = i // 6, (i + 1) // 6
        shares = np.zeros(9)
        for x, y in heads[2 * group : 2 * group + 2]:
            p = np.exp(x[i] @ means(y, 6)[:whole].T * SCALE)
            shares[:whole] += p / p.sum()
        forced = {0, own, max(0, own - 1)}
        others = [c for c in range(own + 1) if c not in forced]
        some = forced | set(best(shares, 4 - len(forced), others))
        wanted = [j for j in range(i + 1) if j // 6 in some]
        for h in (2 * group, 2 * group + 1):
            assert np.flatnonzero(pairs[h, i]).tolist() == wanted


def sparsed_masks(x, y, ratio, new, scale):
    """The pairs of one head: two choices, each over blocks of 8 keys."""

    def importance(keys):
        p = np.exp(x @ keys.T * scale)
        p /= p.sum(axis=1, keepdims=True)
        rows, columns = -(-N // 8), -(-len(keys) // 8)
        padded = np.zeros((rows * 8, columns * 8))
        padded[:N, : len(keys)] = p
        return padded.reshape(rows, 8, columns, 8).mean(axis=(1, 3))

    def choice(scores):
        keep = min(scores.shape[1], max(1, int(scores.shape[1] * ratio) + 1))
        return [best(row, keep, range(len(row))) for row in scores]

    first = min(b for b in range(99) if N - b * 8 <= new)
    chosen = [[c for c in row if c < first] for row in choice(importance(y))]
    if first * 8 < N:
        own = choice(importance(y[first * 8 :]))
        chosen = [a + [first + c for c in b] for a, b in zip(chosen, own, strict=True)]
    return np.array([[j // 8 in chosen[i // 8] for j in range(N)] for i in range(N)])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("ratio", "new", "scale"), [(0.3, 0, None), (0.3, 20, 0.5), (1.0, 20, None)]
)
def test_sparsed(ratio, new, scale):
    q, k = qk()
    spec = catalog.sparsed(ratio, block=8, new_tokens=new, scale=scale)
    pairs, parts = seen(spec, q, k)
    for h, (x, y) in enumerate(of_heads(q, k)):
        assert (pairs[h] == sparsed_masks(x, y, ratio, new, scale or SCALE)).all()
    if ratio == 1.0:
        assert pairs.all()
    # The plan of one step in the next: nothing is chosen again.
    again = sa.select(spec, k.repeat(2, axis=2), k, operands=parts)
    assert all((np.asarray(parts[name]) == x).all() for name, x in again.items())


def test_steps_of_sparsed():
    assert [plan_step(10), plan_step(1024), plan_step(3, 0.0)] == [3, 205, 1]
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        plan_step(0)


def test_quest():
    n = 50
    _, k = qk(n)
    q = drawn(1, 1, HEADS, DIM, seed=3)
    spec = catalog.quest(12, page=4)
    (chosen,) = select(spec, q, k, {}, q_offset=n - 1).values()
    heads, last = of_heads(q, k), (n - 1) // 4
    for group in range(KV_HEADS):
        bounds = np.zeros(last + 1)
        for x, y in heads[2 * group : 2 * group + 2]:
            for page in range(last + 1):
                some = y[4 * page : 4 * page + 4]
                ends = x[0] * some.min(axis=0), x[0] * some.max(axis=0)
                bounds[page] += np.maximum(*ends).sum()
        wanted = sorted([last, *best(bounds, 2, range(last))])
        for h in (2 * group, 2 * group + 1):
            assert np.flatnonzero(np.asarray(chosen)[0, h, 0]).tolist() == wanted
    out = sa.attention(q, k, k, spec, q_offset=n - 1, impl="xla")
    pairs = np.asarray(chosen)[0].repeat(4, axis=2)[:, :, :n]
    turned = [np.swapaxes(x, 1, 2) for x in (q, k, k, np.zeros_like(q))]
    wanted = oracle.with_gradients(*turned[:3], pairs[None], SCALE, do=turned[3])
    oracle.assert_close(np.swapaxes(out, 1, 2), wanted.o, "float32")


def test_kinetics():
    q, k = qk()
    pairs, _ = seen(catalog.kinetics(2, 5, block=4, sink=3), q, k)
    heads = of_heads(q, k)
    for group, i in product(range(KV_HEADS), range(N)):
        mean = sum((x @ means(y, 4).T for x, y in heads[2 * group : 2 * group + 2]))
        some = best(mean[i], 2, range(i // 4 + 1))
        wanted = [j for j in range(i + 1) if j < 3 or i - j < 5 or j // 4 in some]
        for h in (2 * group, 2 * group + 1):
            assert np.flatnonzero(pairs[h, i]).tolist() == wanted
    # No longer than the budget of 5 + 2 * 4: all of it.
    short = seen(catalog.kinetics(2, 5, block=4, sink=0), q[:, :13], k[:, :13])[0]
    assert (short == causal(13)).all()


def test_costs_of_kinetics():
    of = Decoding(5, 2, 1, 4, context=10, generated=4, trials=3, intensity=2)
    assert [x * 1e12 for x in dense_cost(of)] == pytest.approx([4728, 2048])
    found = block_topk_cost(of, 1, 4, block=4)
    assert [x * 1e12 for x in found] == pytest.approx([3768, 3328])
    # A context of 2 lacks 6 of the budget of 8: 18 keys less are attended.
    of = Decoding(0, 2, 1, 4, context=2, generated=4)
    found = block_topk_cost(of, 1, 4, block=4)
    assert [x * 1e12 for x in found] == pytest.approx([448 + 64, 224 + 32])


@pytest.mark.slow
def test_values_and_gradients_given_the_choice():
    spec = vmoba(2)
    q, k = qk(60)
    v, do = drawn(1, 60, KV_HEADS, DIM, seed=3), drawn(1, 60, HEADS, DIM, seed=4)

    @jax.jit
    def value(q, k, v):
        out = sa.attention(q, k, v, spec, impl="xla")
        return jnp.sum(out * do), out

    gradient = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    (_, out), found = gradient(q, k, v)
    pairs, _ = seen(spec, q, k)
    turned = [np.swapaxes(x, 1, 2) for x in (q, k, v, do)]
    wanted = oracle.with_gradients(*turned[:3], pairs[None], SCALE, do=turned[3])
    arrays = {"o": out, "dq": found[0], "dk": found[1], "dv": found[2]}
    for name, x in arrays.items():
        oracle.assert_close(
            np.swapaxes(x, 1, 2), getattr(wanted, name), "float32", name
        )
