"""Values added to the scores in the kernels: strips, padding, vmap."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from kernel_cases import Case, Pattern

from pallas_kernels import dispatch, pair_values
from pallas_kernels.call import PairValues, ScoreValues
from pallas_kernels.config import Tile

# Compiled without optimisations: no test here measures speed.
pytestmark = pytest.mark.usefixtures("quick")

IMPLS = {"xla": {}, "tpu": {"interpret": True}, "triton": {"interpret": True}}
SMALL = Case(
    pattern=Pattern("full"),
    batch=1,
    q_len=13,
    kv_len=21,
    dim=8,
    dim_v=8,
    forward=Tile(block_q=16, block_kv=16),
    dkv=Tile(block_q=16, block_kv=16),
)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 2)])
def test_tiles_of_diagonals(rows, columns):
    """An entry depends on the difference of its row and column alone."""
    window = jnp.asarray(np.random.default_rng(0).normal(size=rows + columns))
    found = pair_values.toeplitz(window, rows, columns)
    for i in range(rows):
        for j in range(columns):
            assert found[i, j] == window[rows - 1 - i + j]


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (13, 7), (6, 20)])
def test_values_of_all_pairs(q_len, kv_len):
    """A diagonal array has a value for each ``q - k``."""
    values = np.random.default_rng(0).normal(size=(1, 2, q_len + kv_len - 1))
    x = PairValues(jnp.asarray(values, jnp.float32), diagonal=True)
    found = pair_values.of_all(x, q_len, kv_len)
    at = np.arange(q_len)[:, None] - np.arange(kv_len) + kv_len - 1
    np.testing.assert_array_equal(found, np.asarray(x.values)[..., at])


@dataclass(frozen=True)
class Beyond:
    """Adds 0 to real queries and 1e6 to padded ones."""

    length: int

    def __call__(self, q, k, q_values, kv_values, pairs):
        del q_values, kv_values, pairs
        return jnp.where(q + 0 * k < self.length, 0.0, 1e6).astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_queries_change_nothing(impl):
    """Even if a large number is added to their scores."""
    inputs, do, dlse = SMALL.arrays()
    masks = SMALL.masks()
    call = replace(SMALL.call(**IMPLS[impl]), scores=Beyond(SMALL.q_len))

    @jax.jit
    def run(inputs):
        attend = lambda x: dispatch.attend(x, SMALL.vectors(), masks, call, impl=impl)
        out, pull = jax.vjp(attend, inputs)
        return *out, *pull(type(out)(do, dlse))[0]

    for a, b in zip(run(inputs), SMALL.expected(), strict=True):
        oracle.assert_close(a, b, "float32", impl)


@dataclass(frozen=True)
class Every:
    """Adds the sum of all values."""

    def __call__(self, q, k, q_values, kv_values, pairs):
        del q, k
        return q_values[0] + kv_values[0] + pairs[0] + pairs[1]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["tpu", "triton"])
def test_vmap(impl):
    """``vmap`` over the added values alone."""
    inputs, _, _ = SMALL.arrays()
    masks = SMALL.masks()
    call = replace(SMALL.call(**IMPLS[impl]), scores=Every(), learned_scores=True)
    n, m, heads = SMALL.q_len, SMALL.kv_len, SMALL.q_heads
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    values = ScoreValues(
        (normal(1, heads, n),),
        (normal(1, 1, m),),
        (PairValues(normal(1, 1, n + m - 1), True), PairValues(normal(1, heads, n, m))),
    )

    def run(values):
        vectors = SMALL.vectors()._replace(scores=values)
        return dispatch.attend(inputs, vectors, masks, call, impl=impl)

    found, single = jax.jit(jax.vmap(run))(values), jax.jit(run)
    for i in range(2):
        wanted = single(jax.tree.map(lambda x, i=i: x[i], values))
        for a, b in zip(found, wanted, strict=True):
            oracle.assert_close(a[i], np.asarray(b), "float32", impl)
