"""Every entry of the catalogue, on eight shards and on one device."""

import cab_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded_calls import with_gradients

import sadsl as sa

ENTRIES = {name: e for name, e in cab_cases.every().items() if e.spec is not None}
MESH = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.usefixtures("quick")
def test_eight_shards_equal_one_device(name):
    entry = ENTRIES[name]
    rng = np.random.default_rng(1)
    shape = 2, entry.n, entry.num_heads, entry.head_dim
    inputs = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    given = dict(entry.operands(*map(np.asarray, inputs[:2])))
    options = {"operands": given, "impl": "reference"}

    def sharded(q, k, v):
        where = {"mesh": MESH, "sequence": "seq"}
        return sa.sharded_attention(q, k, v, entry.spec, **where, **options)

    def whole(q, k, v):
        return sa.attention(q, k, v, entry.spec, **options)

    found, wanted = (
        jax.jit(lambda *x, call=call: with_gradients(call, x))(*inputs)
        for call in (sharded, whole)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
