"""Pages are taken and given back at random; each is free or has one owner."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

from sadsl.decode.pages import Paging, gathered, put, returned, taken
from sadsl.decode.slots import CacheSlots

BATCH, PAGE, COLUMNS, POOL = 3, 2, 4, 7
TAKEN = jax.jit(taken, static_argnums=3)
PUT, RETURNED, GATHERED = jax.jit(put), jax.jit(returned), jax.jit(gathered)
REQUESTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), min_size=BATCH, max_size=BATCH),
        st.integers(0, BATCH - 1),
    ),
    max_size=12,
)


@settings(max_examples=few(100))
@given(REQUESTS)
def test_each_page_is_free_or_belongs_to_one_sequence(requests):
    """Lists are new tokens of each sequence, integers sequences that end."""
    pages = Paging(PAGE, POOL).table(BATCH, CacheSlots(0, COLUMNS * PAGE, 8))
    pool = jnp.zeros((POOL, 1, PAGE, 1))
    held, number = [[] for _ in range(BATCH)], 0
    lost = np.zeros(BATCH, bool)
    for request in requests:
        count = np.array([len(x) for x in held], np.int32)
        if isinstance(request, int):
            ended = np.arange(BATCH) == request
            pages = RETURNED(pages, ended)
            held[request], lost[request] = [], False
        else:
            valid = np.minimum(np.array(request, np.int32), COLUMNS * PAGE - count)
            x = number + np.arange(BATCH * 5.0, dtype=np.float32).reshape(
                BATCH, 1, 5, 1
            )
            number += BATCH * 5
            pages = TAKEN(pages, count, valid, 5)
            pool = PUT(pool, x, pages, count, valid)
            for b in range(BATCH):
                held[b] += x[b, 0, : valid[b], 0].tolist()
        length = np.array([len(x) for x in held], np.int32)
        complete = np.asarray(pages.complete(length))
        assert not (complete & lost).any()
        lost = ~complete
        left, table = int(pages.left), np.asarray(pages.table)
        live = table[table >= 0].tolist()
        assert sorted(live + pages.free[:left].tolist()) == list(range(POOL))
        found = np.asarray(GATHERED(pool, pages))[:, 0, :, 0]
        for b in np.flatnonzero(complete):
            assert (table[b] >= 0).sum() == -(-length[b] // PAGE)
            assert found[b, : length[b]].tolist() == held[b]
