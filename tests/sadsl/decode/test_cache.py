"""Caches: what they hold, ragged batches, arrays by key, rings and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.selections import rules, share
from sadsl.terms.base import read_by

N = 37
RING = sa.causal() & (sa.window(5) | sa.sinks(2))
SPECS = {
    "ring": RING,
    "heads": sa.per_head(sa.causal() & sa.window(4), RING),
    "shares": sa.heads((RING, 2), (sa.causal(), 2)),
    "strided": sa.causal() & (sa.strided(8) | sa.window(2)),
    "grid": sa.causal() & sa.Grid(h=1, w=N).neighborhood((1, 7)),
    "documents": sa.causal() & sa.segments() & sa.window(9),
    "images": RING
    | sa.causal()
    & sa.where(lambda q, k: sa.operand("image")[q] == sa.operand("image")[k]),
    "options": sa.softmax(
        RING, logits_soft_cap=20.0, sink=True, bias=sa.alibi() + sa.key_bias("c"),
        scale=sa.bias(lambda q, k: 1 + 0.01 * q),
    ),
    "distances": sa.softmax(RING, bias=sa.distance_bias("d", 4)),
    "values": sa.softmax(RING, values=(0, 5)),
    "latent": sa.latent(sa.causal()),
    "indexer": sa.causal()
    & sa.topk(
        6, block=1, block_q=1, score=sa.dot(weights="iw", act="relu"), scope="shared",
        eligible=sa.causal(),
    ),
    "joint": sa.joint(
        sa.softmax(sa.causal() & sa.window(4), sink=True),
        sa.compressed(6, 4),
        sa.over("entries", sa.where(lambda q, k: k < (q + 1) // 4), values="values"),
    ),
    "gated": sa.gated(RING, sa.linear(decay="g")),
    "delta in documents": sa.delta(decay="g", map=sa.causal() & sa.segments()),
}  # fmt: skip
BY_TOKEN = {"ik", "iq", "iw", "g", "gates", "beta", "image", "ids"}


def made(name, batch=3):
    """q, k, v, and the arrays that a spec reads, in float32."""
    rng = np.random.default_rng(3)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = drawn(batch, N, 4, 8), drawn(batch, N, 2, 8), drawn(batch, N, 2, 5)
    if name in ("values", "latent"):
        k = drawn(batch, N, 1, 8)
        v = k
        q = drawn(batch, N, 4, 8 if name == "values" else 5)
    given = {
        "image": jnp.asarray(rng.integers(0, 3, (batch, N))),
        "ids": jnp.cumsum(jnp.asarray(rng.integers(0, 9, (batch, N)) == 0), axis=1),
        "c": drawn(batch, 4, N), "d": drawn(4, 5), "sink": drawn(4),
        "kv_b": drawn(4, 9, 6),
        "iq": drawn(batch, N, 3, 4), "ik": drawn(batch, N, 1, 4),
        "iw": drawn(batch, N, 3), "entries": drawn(batch, 9, 2, 8),
        "values": drawn(batch, 9, 2, 5), "gates": drawn(batch, N, 4, 2),
        "g": -abs(drawn(batch, N, 2)), "beta": jax.nn.sigmoid(drawn(batch, N, 2)),
    }  # fmt: skip
    ids = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), given["ids"])
    return (q, k, v), read_by(SPECS[name], {**given, **ids})


def split(given):
    """Segment ids as arguments, and the rest."""
    ids = {n: x for n, x in given.items() if n.endswith("segment_ids")}
    return ids, {n: x for n, x in given.items() if n not in ids}


def whole(spec, inputs, given):
    """The outputs of one call."""
    ids, rest = split(given)
    return sa.attention(*inputs, spec, operands=rest, **ids)


def part_of(name, x, start, stop):
    """The entries of some tokens."""
    if name == "c":
        return x[:, :, start:stop]
    by_token = name in BY_TOKEN or name.endswith("segment_ids")
    return x[:, start:stop] if by_token else x


def new_cache(name, inputs, given, **options):
    q, k, v = inputs
    return sa.init_cache(
        SPECS[name], len(q), N, k.shape[2], k.shape[3], num_heads=q.shape[2],
        head_dim_v=v.shape[3], operands=given, **options,
    )  # fmt: skip


def run(cache, inputs, given, start, stop, **options):
    ids, rest = split({n: part_of(n, x, start, stop) for n, x in given.items()})
    new = (x[:, start:stop] for x in inputs)
    return PREFILL(cache, *new, operands=rest, **ids, **options)


PREFILL = jax.jit(sa.prefill)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", SPECS)
def test_pieces_and_tokens_equal_the_whole(name):
    inputs, given = made(name)
    expected = whole(SPECS[name], inputs, given)
    cache, found, at = new_cache(name, inputs, given), [], 0
    for size in (12, 1, 1, 12, *[1] * 11):
        cache, out = run(cache, inputs, given, at, at + size)
        found.append(out)
        at += size
    assert at == N
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1), expected, rtol=2e-5, atol=2e-5
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", [n for n in SPECS if n not in ("gated", "delta in documents")]
)
def test_sequences_of_several_lengths(name):
    inputs, given = made(name)
    lengths = np.array([3, 12, 7])
    cache = new_cache(name, inputs, given, ragged=True)
    cache, out = run(cache, inputs, given, 0, 12, lengths=jnp.asarray(lengths))
    expected = np.asarray(whole(SPECS[name], inputs, given))
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(out[b, :n], expected[b, :n], rtol=2e-5, atol=2e-5)
    for i in range(9):
        at = jnp.asarray(lengths + i)
        take = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 1))
        own = tuple(take(x, at) for x in inputs)
        now = {}
        for name_of, x in given.items():
            axis = 2 if name_of == "c" else 1
            by_token = part_of(name_of, x, 0, 1).shape != x.shape
            front = jnp.moveaxis(x, axis, 1) if by_token else x
            now[name_of] = jnp.moveaxis(take(front, at), 1, axis) if by_token else x
        ids, rest = split(now)
        cache, out = PREFILL(cache, *own, operands=rest, **ids)
        wanted = np.stack([expected[b, n + i] for b, n in enumerate(lengths)])
        np.testing.assert_allclose(out[:, 0], wanted, rtol=2e-5, atol=2e-5)


def test_a_chunk_may_be_longer_than_the_ring():
    inputs, given = made("ring")
    cache = new_cache("ring", inputs, given)
    found = []
    for start, stop in ((0, 1), (1, 36), (36, 37)):
        cache, out = run(cache, inputs, given, start, stop)
        found.append(out)
    expected = whole(RING, inputs, given)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_arrays_by_key_need_no_batch_axis():
    (q, k, v), _ = made("ring")
    c = jax.random.normal(jax.random.key(0), (4, N))
    spec = sa.softmax(RING, bias=sa.bias(lambda q, k, h: sa.weights("c")[h, k]))
    cache = sa.init_cache(
        spec, 3, N, 2, 8, num_heads=4, head_dim_v=5, operands={"c": c}
    )
    expected = sa.attention(q, k, v, spec, operands={"c": c})
    found = []
    for start, stop in ((0, 30), (30, N)):
        own = (x[:, start:stop] for x in (q, k, v))
        cache, out = sa.prefill(cache, *own, operands={"c": c[:, start:stop]})
        found.append(out)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    flat = sa.softmax(sa.causal(), bias=sa.bias(lambda q, k: sa.weights("x")[k]))
    with pytest.raises(ValueError, match="'x' at the key"):
        sa.init_cache(flat, 1, 8, 1, 4)


def test_an_array_of_queries_in_one_part_and_of_keys_in_another():
    (q, k, v), given = made("images")
    image = given["image"]
    same = sa.where(lambda q, k: sa.operand("image")[k] == 1)
    own = sa.where(lambda q, k: sa.operand("image")[q] == 1)
    spec = sa.average(RING & same, sa.softmax(RING & own))
    cache = sa.init_cache(spec, 3, N, 2, 8, num_heads=4, head_dim_v=5)
    expected = sa.attention(q, k, v, spec, operands={"image": image})
    found = []
    for start, stop in ((0, 9), (9, 10), (10, N)):
        new = (x[:, start:stop] for x in (q, k, v))
        own = {"image": image[:, start:stop]}
        cache, out = sa.prefill(cache, *new, operands=own)
        found.append(out)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_maps_by_head_within_a_share_of_the_heads():
    three = sa.per_head(*[sa.causal() & sa.window(n) for n in (2, 3, 4)])
    spec = sa.heads((three, 3), (sa.causal() & sa.sinks(2), 1))
    cache = sa.init_cache(spec, 1, N, 4, 8)
    assert cache.keys.k.shape[2] == 2 + 5


def test_its_size_is_what_properties_promise():
    for name in ("ring", "heads", "strided"):
        inputs, given = made(name)
        promised = sa.properties(SPECS[name], N, num_heads=4).cache
        cache = new_cache(name, inputs, given)
        slots = promised.pinned + promised.slots
        assert cache.keys.k.shape == (3, 2, slots, 8)
        assert cache.nbytes == 3 * 2 * slots * (8 + 5) * 4 + 4
    state = sa.init_cache(sa.linear(), 1, 1 << 20, 2, 8)
    assert state.nbytes == 2 * (8 * 8 + 8) * 4 + 4
    assert "all keys" in str(sa.init_cache("causal()", 1, 8, 1, 4))


def test_one_program_serves_every_position():
    traces = []

    @jax.jit
    def step(cache, x):
        traces.append(1)
        return sa.step(cache, x, x, x)

    cache = sa.init_cache(RING, 1, N, 1, 4)
    for _ in range(N):
        cache, out = step(cache, jnp.ones((1, 1, 4)))
    assert len(traces) == 1
    assert int(cache.length) == N
    _, beyond = step(cache, jnp.ones((1, 1, 4)))
    assert np.isnan(beyond).all()
    assert not np.isnan(out).any()


def test_what_is_refused():
    def refused(error, match, spec="causal()", **options):
        with pytest.raises(error, match=match):
            sa.init_cache(spec, 1, 8, 1, 4, **options)

    refused(ValueError, r"not causal.*query 0 sees key 1", "full()")
    refused(ValueError, "not causal", sa.linear(map=sa.full()))
    refused(ValueError, "causal=True", sa.compressed(2, 2, causal=False))
    refused(NotImplementedError, "channel", sa.channel())
    refused(
        NotImplementedError,
        "later tokens",
        sa.causal() & sa.topk(1, block=2, block_q=1, eligible=sa.causal()),
    )
    refused(NotImplementedError, "several queries", sa.causal() & sa.topk(1, block=2))
    single = {"block": 1, "block_q": 1, "eligible": sa.causal()}
    columns = sa.causal() & sa.topk(share(0.5), **single)
    refused(NotImplementedError, "depends on the length", columns)
    late = sa.where(lambda q, k, h, n: (k <= q) & (k >= n // 2))
    by_length = sa.causal() & sa.topk(1, **{**single, "eligible": late})
    refused(NotImplementedError, "depends on the length", by_length)
    everywhere = sa.causal() & sa.topk(1, **single, rules=rules(otherwise="eligible"))
    refused(NotImplementedError, "depends on the length", everywhere)
    twice = sa.bias(lambda q, k: sa.weights("x")[q] + sa.weights("x")[k])
    floats = {"operands": {"x": jnp.ones(8)}}
    both = sa.softmax(sa.causal(), bias=twice)
    refused(NotImplementedError, "at the query and at the key", both, **floats)
    refused(
        ValueError, "'c' at the key", sa.softmax(sa.causal(), bias=sa.key_bias("c"))
    )
    with pytest.raises(ValueError, match="max_len=0"):
        sa.init_cache("causal()", 1, 0, 1, 4)
    cache, x = sa.init_cache("causal()", 1, 8, 1, 4), jnp.ones((1, 9, 1, 4))

    def misfit(match, size=2, cache=cache, **options):
        y = x[:, :size]
        inputs = {"q": y, "k": y, "v": y} | options.pop("new", {})
        with pytest.raises(ValueError, match=match):
            sa.prefill(cache, **inputs, **options)

    misfit("9 tokens do not fit a cache of max_len=8", 9)
    full, _ = sa.prefill(cache, *[x[:, :7]] * 3)
    misfit("holds 7 tokens, and 2 more", cache=full)
    misfit("q has 2 heads", new={"q": jnp.ones((1, 2, 2, 4))})
    misfit("v has shape", new={"v": jnp.ones((1, 2, 1, 3))})
    misfit("ragged=True", lengths=jnp.array([1]))
    misfit("'c' was given", operands={"c": x})
    ragged = sa.init_cache("causal()", 1, 8, 1, 4, ragged=True)
    misfit("lengths have shape", cache=ragged, lengths=jnp.array([1, 2]))
    misfit("dtype float32", cache=ragged, lengths=jnp.array([1.0]))
    misfit("from 0 to the 2 tokens", cache=ragged, lengths=np.array([3]))
    documents = sa.init_cache(sa.causal() & sa.segments(), 1, 8, 1, 4)
    misfit("keeps 'kv_segment_ids', which was not given", cache=documents)
    ids = {
        "q_segment_ids": jnp.ones((1, 2), int),
        "kv_segment_ids": jnp.ones((1, 1), int),
    }
    misfit("entries for the new tokens, \\(1, 2\\)", cache=documents, **ids)
    recurrent = sa.init_cache(sa.linear(), 1, 8, 1, 4, ragged=True)
    with pytest.raises(NotImplementedError, match="tokens that do not exist"):
        sa.prefill(recurrent, *[x[:, :2]] * 3, lengths=jnp.array([1]))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["tpu", "triton"])
@pytest.mark.parametrize("name", ["ring", "latent", "indexer"])
def test_on_kernels_of_chips(name, impl):
    inputs, given = made(name)
    cache = new_cache(name, inputs, given)
    found, at = [], 0
    for size in (9, 1, 3):
        ids, rest = split({n: part_of(n, x, at, at + size) for n, x in given.items()})
        new = (x[:, at : at + size] for x in inputs)
        cache, out = sa.prefill(
            cache, *new, operands=rest, impl=impl, interpret=True, **ids
        )
        found.append(out)
        at += size
    expected = whole(SPECS[name], inputs, given)[:, :at]
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
