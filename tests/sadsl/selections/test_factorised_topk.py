"""The low-rank predictor of Sparsifiner: its choice, its loss, its attention."""

import math
from functools import partial

import jax
import numpy as np
import oracle
import pytest
from content_cases import drawn

import sadsl as sa
from sadsl import catalog
from sadsl.run.call import select
from sadsl.selections import factorised_topk


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    """Compiled as for the interpreter: here compilation takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)


def weights(n, head_dim, heads, rank=4):
    narrow, tall = (heads, head_dim + 1, 3), (n, rank)
    shapes = {"q": narrow, "k": narrow, "down": tall, "basis": tall}
    return {
        f"predictor_{name}": 0.5 * drawn(*shape, seed=10 + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def coefs_of(q, k, w, h, scale):
    """A softmax over the basis for every query of one head, float64."""
    of_q, of_k = (w[f"predictor_{x}"][h % len(w["predictor_q"])] for x in "qk")
    narrow_q = q @ of_q[:-1] + of_q[-1]
    narrow_k = k @ of_k[:-1] + of_k[-1]
    e = np.exp(narrow_q @ (w["predictor_down"].T @ narrow_k).T * scale)
    return e / e.sum(axis=1, keepdims=True)


def highest(row, count):
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]


def expected(q, k, w, spec, scale):
    """Bool ``[heads, n, n]`` by loops for q and k of ``[n, heads, head_dim]``."""
    n, heads, _ = q.shape
    found = np.zeros((heads, n, n), bool)
    basis = np.abs(w["predictor_basis"])
    for h in range(heads):
        coefs = coefs_of(q[:, h], k[:, h], w, h, scale)
        for i in range(n):
            row = np.zeros(n)
            for c in highest(coefs[i], spec.coefs):
                for j in range(n):
                    row[j] += coefs[i, c] * basis[j, c] * (basis[j, c] > spec.threshold)
            if np.isfinite(row).all():
                found[h, i, highest(row, math.ceil(spec.keep * n - 1e-9))] = True
        found[h, : spec.full_rows] = True
    return found


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        (factorised_topk(coefs=2), 2),
        (factorised_topk(0.3, 3, 0.4, full_rows=2, scale=2.0), 1),
        (factorised_topk(0.5, 1, 0.9, full_rows=0), 1),
        (factorised_topk(1.0), 1),
    ],
)
def test_is_what_loops_find(spec, heads):
    n = 30
    q, k = drawn(1, n, 2, 4), drawn(1, n, 2, 4, seed=1)
    q[0, 7, 1] = np.nan
    w = weights(n, 4, heads)
    parts = jax.jit(partial(select, spec))(q, k, operands=w)
    given = {name: np.asarray(x)[0] for name, x in parts.items()}
    found = spec.dense(n, num_heads=2, operands=given)
    wide = {name: x.astype(np.float64) for name, x in w.items()}
    scale = 0.5 if spec.scale is None else spec.scale
    with np.errstate(invalid="ignore"):
        wanted = expected(*(x[0].astype(np.float64) for x in (q, k)), wide, spec, scale)
    np.testing.assert_array_equal(found, wanted)
    assert not found[1, 7].any()
    assert sa.parse(repr(spec)) == spec


def test_a_sparse_basis_fills_the_budget_with_the_first_keys():
    n, q = 12, drawn(1, 12, 1, 4)
    w = weights(n, 4, 1) | {"predictor_basis": np.zeros((n, 4), np.float32)}
    w["predictor_basis"][7] = -1.0
    (chosen,) = select(catalog.sparsifiner(), q, q, operands=w).values()
    wanted = np.zeros((n, n), bool)
    wanted[:, [0, 1, 7]] = True
    np.testing.assert_array_equal(chosen[0, 0], wanted)


def by_head(x):
    return np.swapaxes(np.asarray(x), 1, 2)


@pytest.mark.slow
def test_attention_and_gradients():
    n, spec = 21, catalog.sparsifiner(0.25, 2)
    q, k, v, do = (drawn(2, n, 2, 4, seed=s) for s in range(4))
    w = weights(n, 4, 2)
    ((name, chosen),) = select(spec, q, k, operands=w).items()
    rows = [{name: x} for x in np.asarray(chosen)]
    pairs = np.stack([spec.dense(n, num_heads=2, operands=x) for x in rows])

    @jax.jit
    def call(q, k, v, w):
        attend = lambda q, k, v, w: sa.attention(q, k, v, spec, operands=w, impl="xla")
        o, pull = jax.vjp(attend, q, k, v, w)
        return o, *pull(do)

    *found, of_weights = call(q, k, v, w)
    assert not any(np.any(x) for x in of_weights.values())
    wanted = oracle.with_gradients(*map(by_head, (q, k, v)), pairs, 0.5, do=by_head(do))
    for a, b in zip(found, (wanted.o, *wanted[2:]), strict=True):
        oracle.assert_close(by_head(a), b, "float32")


def test_loss():
    """The guess is not cut, its weights are trained, and the attention is not."""
    n = 13
    q, k = drawn(1, n, 2, 4), drawn(1, n, 2, 4, seed=1)
    w = weights(n, 4, 1)
    wide = {name: x.astype(np.float64) for name, x in w.items()}
    total, other = 0.0, 0.0
    target = drawn(1, 2, n, n, seed=3)
    for h in range(2):
        guess = (
            coefs_of(q[0, :, h], k[0, :, h], wide, h, 0.5) @ wide["predictor_basis"].T
        )
        e = np.exp(q[0, :, h].astype(np.float64) @ k[0, :, h].T * 0.5)
        e /= e.sum(axis=1, keepdims=True)
        total += np.square(guess - e)[1:].sum() / (2 * n * (n - 1))
        other += np.square(guess - target[0, h])[1:].sum() / (2 * n * (n - 1))

    @jax.jit
    def both(w, target):
        loss = lambda w, target: catalog.sparsifiner_loss(q, k, w, target=target)
        return jax.value_and_grad(loss)(w, None)[0], *jax.value_and_grad(
            loss, argnums=(0, 1)
        )(w, target)

    first, second, (of_weights, of_target) = both(w, target)
    np.testing.assert_allclose([first, second], [total, other], rtol=1e-5)
    assert all(np.any(x) for x in of_weights.values())
    assert not np.any(of_target)


Q = drawn(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factorised_topk(0.0), r"keep=0\.0 must be a share"),
        (lambda: factorised_topk(1.5), r"keep=1\.5 must be a share"),
        (lambda: factorised_topk(coefs=0), "coefs=0 must be at least 1"),
        (lambda: factorised_topk(full_rows=-1), "full_rows=-1 must be at least 0"),
        (lambda: factorised_topk(threshold=-1.0), r"threshold=-1\.0 must be at least"),
        (lambda: select(factorised_topk(), Q, Q), "reads 'predictor_q', a weight of"),
        (lambda: select(factorised_topk(), Q, Q, operands=weights(9, 4, 1)),
         r"'predictor_down' has shape \(9, 4\) .* 8 tokens, .* it must be \(8, 4\)"),
        (lambda: select(factorised_topk(), Q, Q, operands=weights(8, 4, 3)),
         r"'predictor_q' has shape \(3, 5, 3\) .* \(2, 5, 3\)"),
        (lambda: select(factorised_topk(), Q[:, :5], Q, operands=weights(8, 4, 1)),
         "not 5 queries from position 0 on and 8 keys"),
        (lambda: select(factorised_topk(), Q, Q, operands=weights(8, 4, 1), q_offset=3),
         "8 queries from position 3 on"),
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
