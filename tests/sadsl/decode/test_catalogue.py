"""Decoding equals the rows of the whole call, for every entry that has a cache."""

import cab_cases
import numpy as np
import pytest
from sadsl_decode import decoded

import sadsl as sa

ENTRIES = {name: e for name, e in cab_cases.every().items() if e.spec is not None}

# Causal entries without a cache, and the words of their refusal.
REFUSED = {
    "moa": "depends on the length",
    "tri_shape": "depends on the length",
    "key_topw smooth": "depends on the length",
    "kept_keys (snapkv)": "sadsl.select",
    "native_sparse_attention by importance": "several queries",
    "routing_combiner": "positions alone",
    "routing_transformer": "several queries",
    "scatter_mean": "several queries",
    "channel": "channel",
    "davit_channel": "channel",
    "light_net both ways": "not causal",
    "delta full": "not causal",
}


def refused_because(entry):
    """Why an entry is not decoded by what is known of its spec; None if it is."""
    try:
        found = sa.properties(entry.spec, entry.n, num_heads=entry.num_heads)
    except (ValueError, NotImplementedError):
        return None
    if not found.causal:
        return "causal"
    return None if found.selection_leak in (None, "none") else "later"


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", ENTRIES)
def test_decoding_equals_the_rows_of_the_whole(name):
    entry = ENTRIES[name]
    rng = np.random.default_rng(1)
    shape = 2, entry.n, entry.num_heads, entry.head_dim
    q, k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    given = dict(entry.operands(q, k))
    why = REFUSED.get(name) or refused_because(entry)
    if why is not None:
        with pytest.raises((ValueError, NotImplementedError), match=why):
            sa.init_cache(entry.spec, 2, entry.n, *shape[2:], operands=given)
        return
    expected = sa.attention(q, k, v, entry.spec, operands=given, impl="reference")
    found, _ = decoded(entry.spec, (q, k, v), given)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
