"""A key of NaN or infinity changes the choice of its own cell only."""

from functools import partial

import calls
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import ir, pipeline
from lowering.problem import Problem
from sadsl.run import reference
from sadsl.selections import (
    chunk_budget,
    descent,
    factorised_topk,
    kept_keys,
    scored,
    stripes,
    vertical_slash,
    vertical_slash_mass,
)
from sadsl.selections.base import Content, choose, selections_of
from sadsl.selections.factorised_topk import FactorisedTopk
from sadsl.selections.teacher_boundaries import teacher_boundaries

# The first key of a cell: who sees a part of the cell sees it.
CELL, BAD = 8, 8
KINDS = {
    "topk": lambda **x: sa.topk(2, **x),
    "threshold": lambda **x: sa.threshold(0.2, **x),
    "mass": lambda **x: sa.mass(0.6, **x),
}


def chosen(map, q, k, operands=None):
    """The pairs of a choice, bool ``[heads, q, kv]``."""
    content = Content(
        q=jnp.swapaxes(q, 1, 2), k=jnp.swapaxes(k, 1, 2), given=operands or {},
        sm_scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    n, heads = q.shape[1:3]
    program = pipeline.run(map.node, Problem(n, n, heads, 0))["resolve_heads"]
    nodes = tuple(
        ir.substitute(program.maps[m], {"h": ir.Const(head)})
        for head, m in enumerate(program.map_of_head)
    )
    parts = choose(selections_of(map), content)
    return np.asarray(reference.pairs(nodes, n, n, parts))[0]


def assert_spoils_its_cell_alone(kind, score, normalise, scope, bad=np.nan):
    """As if the cell of the bad key were not eligible."""
    q, k, *_ = calls.arrays(batch=1, q_len=48, kv_len=48)
    of = score if normalise == "none" else scored(score, normalise=normalise)
    eligible, cell = sa.causal(), sa.keys(CELL, 2 * CELL)
    options = {"block": CELL, "block_q": 1, "score": of, "scope": scope}
    kind = KINDS[kind]
    if (kind, normalise, scope) == (KINDS["threshold"], "softmax", "overall"):
        # The scores of all rows and heads add up to 1: each is about 1 / 600.
        kind = partial(sa.threshold, 0.002)
    found = chosen(kind(eligible=eligible, **options), q, k.at[:, BAD].set(bad))
    wanted = chosen(kind(eligible=eligible - cell, **options), q, k)
    np.testing.assert_array_equal(found, wanted)
    assert wanted.any(axis=(1, 2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mean", "min_max", "max", "attention"])
def test_a_bad_key_spoils_its_own_cell_in_a_choice(score):
    assert_spoils_its_cell_alone("topk", score, "none", "query")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["mean", "min_max", "max"])
@pytest.mark.parametrize("normalise", ["none", "softmax", "minmax"])
@pytest.mark.parametrize("scope", ["query", "group", "shared", "overall"])
def test_a_bad_key_spoils_its_own_cell_in_every_choice(kind, score, normalise, scope):
    for bad in (np.nan, np.inf, -np.inf):
        assert_spoils_its_cell_alone(kind, score, normalise, scope, bad)


def predictor(n, dim, heads):
    rng = np.random.default_rng(5)
    shapes = {"q": (heads, dim + 1, 4), "k": (heads, dim + 1, 4)}
    shapes |= {"down": (n, 6), "basis": (n, 6)}
    return {
        f"predictor_{name}": jnp.asarray(rng.normal(size=(1, *s)), jnp.float32)
        for name, s in shapes.items()
    }


OTHERS = [
    vertical_slash(6, 6, last=8, forced_columns=1, forced_slashes=2),
    vertical_slash_mass(0.5, last=8, least=3, forced_columns=1, forced_slashes=2),
    stripes(1.0, init=4, block=8, step=2),
    kept_keys(40, 12, last=8, pool=3, first=1, recent=4),
    chunk_budget(24, block=8, first=2, local=4, last=2),
    descent(16, block_q=8, block_kv=2, sliding_window=8),
    sa.kmeans(4, window=24),
    factorised_topk(0.3, 3, 0.02),
]


@pytest.mark.slow
@pytest.mark.parametrize("map", OTHERS, ids=lambda x: type(x).__name__)
def test_a_bad_key_takes_no_other_from_a_choice(map):
    q, k, *_ = calls.arrays(batch=1, q_len=48, kv_len=48)
    given = predictor(48, 16, 4) if isinstance(map, FactorisedTopk) else {}
    centroids = np.random.default_rng(3).normal(size=(1, 4, 4, 16))
    given |= {"centroids": jnp.asarray(centroids, jnp.float32)}
    given |= {"boundaries": jnp.asarray(np.arange(48) % 8 == 0)[None]}
    # What a key of zeros leaves is left by a bad one; and the key itself goes.
    clean = chosen(map, q, k.at[:, BAD].set(0.0), given)
    found = chosen(map, q, k.at[:, BAD].set(jnp.nan), given)
    others = np.arange(48) // CELL != BAD // CELL
    share = (clean & found)[:, :, others].sum() / clean[:, :, others].sum()
    assert share > 0.9, share
    assert found[:, :, others].any(axis=(1, 2)).all()


@pytest.mark.slow
def test_a_bad_key_does_not_hide_the_boundaries_of_chunks():
    q, k, *_ = calls.arrays(batch=1, q_len=64, kv_len=64)
    found = teacher_boundaries(q, k.at[:, 2].set(jnp.nan), window=2, suppress=2)
    wanted = teacher_boundaries(q, k, window=2, suppress=2)
    assert (found == wanted)[0, 10:].mean() > 0.8
    assert found.sum() > 1
