"""Estimated and hierarchical selections equal their definitions in plain NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from estimates import (
    SCALE,
    boundaries_by_definition,
    budget_by_definition,
    by_head,
    descent_by_definition,
    given_by,
    order_of,
    pairs_of,
    parts_of,
    replay,
    sample,
    union,
)

import sadsl as sa
from sadsl import catalog
from sadsl.run.call import select
from sadsl.selections import (
    chunk_budget,
    descent,
    kept_keys,
    modalities,
    stripes,
    teacher_boundaries,
    vertical_slash,
    vertical_slash_mass,
)
from sadsl.selections.base import Content
from sadsl.selections.vertical_slash import best, covering


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Selections at these sizes take far longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.sample(2)
@pytest.mark.parametrize("n", [1, 13, 130])
def test_vertical_slash_takes_the_mass_of_the_last_queries(n):
    q, k, _ = sample(n)
    spec = vertical_slash(9, 7, last=5, forced_columns=2, forced_slashes=3)
    found = pairs_of(spec, q, k)
    for h, (qh, kh) in enumerate(by_head(q, k)):
        rows = range(max(0, n - 5), n)
        columns, slashes = given_by(qh, kh, rows, np.ones(n, bool))
        expected = union(
            n, order_of(columns, range(2))[:9], order_of(slashes, range(3))[:7]
        )
        np.testing.assert_array_equal(found[h], expected)


def test_a_flex_prefill_head_takes_budgets_of_its_own():
    n = 70
    q, k, _ = sample(n, heads=3, seed=1)
    q[:, :, 1] /= 4  # flatter: it needs more
    spec = vertical_slash_mass(0.6, last=9, least=4, forced_columns=2, forced_slashes=3)
    found, sizes = pairs_of(spec, q, k), []
    for h, (qh, kh) in enumerate(by_head(q, k)):
        mass = given_by(qh, kh, range(n - 9, n), np.ones(n, bool))
        chosen = []
        for x, forced in zip(mass, (2, 3), strict=True):
            total, count = 0.0, 1
            for value in sorted(np.nan_to_num(x), reverse=True):
                total += value
                count += total <= 0.6
            chosen.append(order_of(x, range(forced))[: max(4, count)])
        sizes.append(len(chosen[0]))
        np.testing.assert_array_equal(found[h], union(n, *chosen))
    assert sizes[1] > sizes[0] > 4


def test_sizes_by_mass_as_worked_out():
    mass = jnp.asarray([0.1, 0.5, 0.1, 0.3])
    assert [int(covering(mass, a, 0)) for a in (0.65, 0.8, 1.0)] == [2, 3, 4]
    assert int(covering(mass, 0.0, 3)) == 3
    assert int(covering(mass, 0.5, 9)) == 4


def test_the_best_of_ties_and_of_what_is_not_finite():
    chosen = jax.jit(best)
    scores = jnp.asarray([1.0, np.nan, 2.0, 2.0, np.inf, 2.0, -np.inf])
    for count, first in ((0, []), (2, [2, 3]), (3, [2, 3, 5]), (9, [0, 2, 3, 5])):
        assert np.flatnonzero(chosen(scores, jnp.asarray(count))).tolist() == first
    forced = jnp.asarray([0, 1, 0, 0, 0, 0, 0]) == 1
    for count, first in ((0, []), (1, [1]), (2, [1, 2]), (9, [0, 1, 2, 3, 5])):
        assert (
            np.flatnonzero(chosen(scores, jnp.asarray(count), forced)).tolist() == first
        )
    level = best(jnp.zeros((2, 5)), jnp.asarray([1, 3]))
    np.testing.assert_array_equal(level.sum(axis=1), [1, 3])


def test_kept_keys_are_those_that_the_end_of_the_prompt_attends_to():
    n, prompt = 40, 31
    q, k, _ = sample(n, heads=4, kv_heads=2)
    spec = kept_keys(prompt, 12, last=6, pool=5, first=2, recent=3)
    found = pairs_of(spec, q, k)
    forced = [0, 1, 28, 29, 30]
    heads, chosen = by_head(q, k), []
    for g in range(2):
        total = np.zeros(prompt)
        for qh, kh in heads[2 * g : 2 * g + 2]:
            mass, _ = given_by(qh, kh[:prompt], range(25, 31), np.ones(prompt, bool))
            for j in range(prompt):
                total[j] += sum(mass[max(j - 2, 0) : j + 3]) / 5
        chosen += 2 * [order_of(total, forced)[:12]]
    i, j = np.indices((n, n))
    for h in range(4):
        sees = (i < prompt) | (j >= prompt) | np.isin(j, chosen[h])
        np.testing.assert_array_equal(found[h], (j <= i) & sees)


LABEL = np.array([0] * 5 + [1] * 9 + [0] * 3 + [1] * 2 + [0] * 11 + [2] * 4)


@pytest.mark.sample(1)
@pytest.mark.parametrize("other", [None, 0, 1])
def test_vertical_slash_of_a_modality_looks_at_its_last_span(other):
    """The last span of modality 1 has two rows, so its estimate has two."""
    n = len(LABEL)
    q, k, _ = sample(n)
    parts = {"last": 4, "forced_columns": 2, "forced_slashes": 1}
    spec = vertical_slash(6, 4, queries=1, keys=other, **parts)
    found = pairs_of(spec, q, k, {"modality": LABEL})
    competes = np.ones(n, bool) if other is None else other == LABEL
    forced = np.flatnonzero(competes)[:2]
    for h, (qh, kh) in enumerate(by_head(q, k)):
        columns, slashes = given_by(qh, kh, [17, 18], competes)
        expected = union(n, order_of(columns, forced)[:6], order_of(slashes, [0])[:4])
        np.testing.assert_array_equal(found[h], expected)


def test_every_pair_of_modalities_has_its_pattern():
    n = len(LABEL)
    q, k, _ = sample(n)
    label = {"modality": LABEL}
    i, j = np.indices((n, n))
    same = pairs_of(modalities(1, 0), q, k, label)[0]
    np.testing.assert_array_equal(same, (LABEL[i] == 1) & (LABEL[j] == 0))
    patterns = {(1, 0): sa.window(3), (0, 1): sa.strided(2)}
    patterns |= {(a, a): sa.sinks(1) for a in (0, 1)}
    both = catalog.mminference_2d_boundary(2, patterns=patterns)
    found = pairs_of(both, q, k, label)
    here = (j <= i) & (same & (i - j <= 3))
    np.testing.assert_array_equal(found[:, same], here[same][None].repeat(2, 0))
    other = (LABEL[i] == 0) & (LABEL[j] == 1)
    here = (j <= i) & ((i - j) % 2 == 0)
    np.testing.assert_array_equal(found[:, other], here[other][None].repeat(2, 0))


def test_stripes_come_near_to_the_anchor_of_their_group():
    n, init, block, step, theta = 130, 5, 8, 4, 1.5
    q, k, _ = sample(n)
    found = pairs_of(stripes(theta, init=init, block=block, step=step), q, k)
    i, j = np.indices((n, n))
    group = i // 32
    for h, (qh, kh) in enumerate(by_head(q, k)):
        logits = qh @ kh.T * SCALE
        near = (j <= i) & ((j < init) | (j // 32 == group))
        anchor = np.where(near, logits, -np.inf).max(axis=1)
        expected = near.copy()
        for start in range(0, n, block):
            rows = slice(start, min(start + block, n))
            pooled = qh[rows].mean(axis=0) @ kh.T * SCALE
            first = start // 32 * 32
            for key in range(init, first):
                if pooled[key] + theta > anchor[rows].mean():
                    expected[first : first + 32, key] = True
        assert near.sum() < expected.sum() < n * (n + 1) // 2
        np.testing.assert_array_equal(found[h], expected)


SMALL_DHSA = {"block": 8, "first": 3, "local": 4, "last": 2}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("n", "options"),
    [(1, {}), (70, {}), (70, {"by_block": True}), (13, {"max_chunks": 2})],
)
def test_a_budget_goes_to_the_chunks_that_rank_highest(n, options):
    q, k, _ = sample(n, seed=2)
    flags = np.random.default_rng(4).random(n) < 0.2
    spec = chunk_budget(15, **SMALL_DHSA, **options)
    found = pairs_of(spec, q, k, {"boundaries": flags})
    expected = budget_by_definition(q, k, flags, spec)
    np.testing.assert_array_equal(found, np.stack([expected, expected]))


def test_chunks_of_one_score_are_taken_in_order():
    n = 24
    q, k, _ = sample(n)
    k[:] = k[:, :1]  # chunks of one length tie
    flags = np.arange(n) % 4 == 0
    spec = chunk_budget(6, block=24, first=0, local=0, last=0)
    found = pairs_of(spec, q, k, {"boundaries": flags})
    np.testing.assert_array_equal(np.flatnonzero(found[0, -1]), np.arange(6))


def test_boundaries_of_the_teacher():
    q, k, _ = sample(60, seed=3)
    names = "window", "suppress", "max_boundaries"
    boundaries = jax.jit(teacher_boundaries, static_argnames=names)
    expected = boundaries_by_definition(q, k, window=2, suppress=3)
    assert len(expected) > 4
    for most in (None, 3):
        found = boundaries(q, k, window=2, suppress=3, max_boundaries=most)
        assert np.flatnonzero(found[0]).tolist() == sorted([0, *expected[:most]])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("n", "spec"),
    [
        (1, descent(4, block_q=2, sliding_window=0)),
        (13, descent(4, block_q=4, block_kv=1, sliding_window=3)),
        (97, descent(7, block_q=8, block_kv=2, sliding_window=9, sinks=2)),
        (97, descent(12, block_q=5, block_kv=3, sliding_window=6, by_row=True)),
    ],
    ids=str,
)
def test_the_descent_replayed(n, spec):
    q, k, _ = sample(n, seed=5)
    found = pairs_of(spec, q, k)
    for h, (qh, kh) in enumerate(by_head(q, k)):
        np.testing.assert_array_equal(found[h], descent_by_definition(qh, kh, spec))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 0, 9, 2, 8, 1, 0, 5, 4, 0, 7, 1, 0, 6, 2], [5, 8, 9, 14]),
        (list(range(13, 0, -1)), [0, 1, 2, 3]),
        (list(range(13)), [9, 10, 11, 12]),
    ],
)
def test_the_descent_as_worked_out(scores, expected):
    n = len(scores)
    q = jnp.ones((1, 1, 1, 1))
    k = jnp.asarray(scores, jnp.float32)[None, None, :, None]
    spec = descent(4, block_q=1, block_kv=1, sliding_window=0)
    content = Content(q, k, {}, sm_scale=1.0, q_offset=n - 1)
    found = jax.jit(spec.choose)(content)
    assert np.flatnonzero(found["chosen"][0, 0, 0]).tolist() == expected
    assert replay(scores.__getitem__, n, 4) == expected


# One head each: one-sided vectors, differences, bits, and bits by a run-time index.
FAMILY_NAMES = "vertical_slash", "stripes", "chunk_budget", "descent"
FAMILIES = sa.per_head(
    vertical_slash(9, 7, last=5, forced_columns=2, forced_slashes=3),
    stripes(0.5, init=5, block=8, step=2),
    chunk_budget(15, **SMALL_DHSA),
    descent(8, block_q=8, sliding_window=9),
)


@pytest.mark.slow
def test_attention_over_what_was_selected():
    """Values and gradients on the implementation's own choice, two heads a key head."""
    n = 70
    q, k, v = sample(n, heads=4, kv_heads=2, batch=2)
    do = sample(n, heads=4, batch=2, seed=8)[0]
    given = {"boundaries": np.random.default_rng(4).random((2, n)) < 0.2}

    @jax.jit
    def run(q, k, v, do, parts):
        call = partial(sa.attention, spec=FAMILIES, operands=parts, impl="xla")
        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(do)

    out, *gradients = run(q, k, v, do, parts_of(FAMILIES, q, k, given))
    pairs = np.stack([pairs_of(FAMILIES, q, k, given, entry=b) for b in range(2)])
    each = pairs.sum(axis=(2, 3))
    assert (each > 0).all()
    assert (each < n * (n + 1) // 2).all()
    swap = lambda x: np.swapaxes(np.asarray(x), 1, 2)
    expected = oracle.with_gradients(
        swap(q), swap(k), swap(v), pairs, SCALE, do=swap(do)
    )
    oracle.assert_close(swap(out), expected.o, "float32", "o")
    for what, x, y in zip("qkv", gradients, expected[2:], strict=True):
        oracle.assert_close(swap(x), y, "float32", f"d{what}")


EVERYTHING = {
    "columns": vertical_slash(50, 0, last=1, forced_columns=0, forced_slashes=0),
    "slashes": vertical_slash(0, 50, last=1, forced_columns=0, forced_slashes=0),
    "mass": vertical_slash_mass(1.0, last=3, least=50),
    "stripes": stripes(1e6, init=0, block=4, step=2),
    "chunks": chunk_budget(50, **SMALL_DHSA),
    "descent": descent(50, block_q=8, sliding_window=0),
    "kept": kept_keys(20, 20, last=3, pool=3, first=0, recent=0),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_budget_for_everything_is_dense(name):
    n, spec = 50, EVERYTHING[name]
    q, k, _ = sample(n)
    given = {"boundaries": np.arange(n) % 7 == 0} if name == "chunks" else {}
    found = pairs_of(spec, q, k, given)
    np.testing.assert_array_equal(found, np.tril(np.ones((2, n, n), bool)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_that_is_not_finite_is_not_chosen(bad):
    n, key = 50, 11
    q, k, _ = sample(n)
    k[:, key] = bad
    columns = pairs_of(EVERYTHING["columns"], q, k)
    seen = np.tril(np.ones((n, n), bool))
    seen[:, key] = False
    np.testing.assert_array_equal(columns[0], seen)
    forced = vertical_slash(12, 0, last=1, forced_columns=12, forced_slashes=0)
    assert pairs_of(forced, q, k)[:, key:, key].all()
    assert not pairs_of(stripes(1e6, init=0, block=4, step=2), q, k)[:, 16:, key].any()
    # The window of its own block still has it, and so do the last rows.
    found = pairs_of(descent(6, block_q=8, sliding_window=4), q, k)
    assert not found[:, 40:, key - 1 : key + 1].any()
    flags = {"boundaries": np.arange(n) % 10 == 0}
    found = pairs_of(chunk_budget(40, **SMALL_DHSA), q, k, flags)
    assert not found[:, 30:48, 10:20].any()
    q[:] = bad
    empty = pairs_of(EVERYTHING["columns"], q, k)
    assert not empty.any()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["vertical_slash", "chunk_budget", "descent"])
def test_queries_from_an_offset_choose_as_among_all(name):
    spec = dict(zip(FAMILY_NAMES, FAMILIES.maps, strict=True))[name]
    q, k, _ = sample(70)
    given = {"boundaries": np.arange(70) % 7 == 0} if spec.operands else {}
    whole = parts_of(spec, q, k, given)
    tail = parts_of(spec, q[:, 40:], k, given, 40)
    for part, x in whole.items():
        y = tail[part]
        axis = [a for a in range(x.ndim) if x.shape[a] != y.shape[a]]
        rows = x.shape[axis[0]] - y.shape[axis[0]] if axis else 0
        np.testing.assert_array_equal(y, np.delete(x, range(rows), *axis or [0]))


BAD = {
    "mass=1.5 is a share": lambda q, k: vertical_slash_mass(1.5),
    "last=0 must be at least 1": lambda q, k: vertical_slash(1, 1, last=0),
    "theta=inf must be finite": lambda q, k: stripes(np.inf),
    "pool=4 must be odd": lambda q, k: kept_keys(4, 4, pool=4),
    "block_kv=0 must be at least 1": lambda q, k: descent(block_kv=0),
    "budget=-1 must be at least 0": lambda q, k: chunk_budget(-1),
    "max_chunks=0 must be": lambda q, k: chunk_budget(9, max_chunks=0),
    "queries=-1 must be": lambda q, k: modalities(-1),
    "must be a multiple of .*= 8": lambda q, k: select(
        stripes(1.0, block=4, step=2), q, k, q_offset=3
    ),
    "with the prompt, and pass its result": lambda q, k: select(kept_keys(14, 4), q, k),
    "'boundaries' has 12 entries for 13": lambda q, k: select(
        chunk_budget(9), q, k, operands={"boundaries": np.ones(12, bool)}
    ),
    "reads 'modality', the integers": lambda q, k: select(modalities(0), q, k),
    "has dtype float32: pass the integers": lambda q, k: select(
        modalities(0), q, k, operands={"modality": np.ones(13, np.float32)}
    ),
    "has 12 entries, but": lambda q, k: select(
        modalities(0), q, k, operands={"modality": np.ones(12, np.int32)}
    ),
    "window=0 must be at least 1": lambda q, k: teacher_boundaries(q, k, window=0),
    "and head_dim must be equal": lambda q, k: teacher_boundaries(q, k[:, 1:]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    q, k, _ = sample(13)
    with pytest.raises(ValueError, match=message):
        BAD[message](q, k)
