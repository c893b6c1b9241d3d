"""Transposed lists against loops, and the tile sizes of the Triton kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.call import Inputs
from pallas_kernels.lists.call import ListCall
from pallas_kernels.lists.triton.launch import sizes_of
from pallas_kernels.lists.triton.tiles import Dims, tiles
from pallas_kernels.lists.triton.transposed import spans_of, transposed


def every_pair(test, q, k, q_vectors, kv_vectors, bits):
    return (q >= 0) & (k >= 0)


def popular(rows=60, listed=5, keys=100):
    """Lists in which every row has keys 3 and 4, and some rows others."""
    rng = np.random.default_rng(3)
    index = np.full((1, 2, rows, listed), keys, np.int32)
    index[..., :2] = 3, 4
    index[:, :, ::4, 2] = rng.integers(5, keys, (1, 2, len(range(0, rows, 4))))
    return index


@pytest.mark.parametrize("units", [1, 2])
def test_transposed_lists(units):
    """Two groups have one key head (two units of it), or a key head each."""
    index, heads = jnp.asarray(popular()), 2 // units
    inputs = Inputs(*(jax.ShapeDtypeStruct((1, n, s, 8), "float32") for n, s in (
        (256, 60), (heads, 100), (heads, 100)
    )))  # fmt: skip
    sizes = sizes_of(inputs, index, ListCall(every_pair, 1.0))
    spans = spans_of(sizes)
    found = jax.jit(transposed, static_argnums=(1, 2))(index, sizes, spans)
    found = jax.tree.map(np.asarray, found)
    assert found.row.shape == (1, heads, units * 60 * 5)
    for head in range(heads):
        lists, stretch = popular()[0, head * units : (head + 1) * units], found.stretch
        wanted = [
            (block, unit * 60 + row)
            for unit, row in np.ndindex(units, 60)
            for block in lists[unit, row]
            if block < 100
        ]
        walked, at = [], lambda x, head=head: x[0, head]
        assert at(stretch)[0] == 0
        assert at(stretch)[-1] <= spans.stretches
        for span in range(spans.count):
            parts = range(at(stretch)[span], at(stretch)[span + 1])
            assert len(parts) > 1 if span == 0 else len(parts) <= 1
            for part in parts:
                assert at(found.span)[part] == span
                first, last = at(found.first)[part], at(found.last)[part]
                assert 0 < last - first <= spans.pairs
                walked += zip(
                    at(found.block)[first:last], at(found.row)[first:last], strict=True
                )
        assert walked == sorted(wanted)
        beyond = slice(at(stretch)[-1], None)
        assert (at(found.first)[beyond] >= at(found.last)[beyond]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 128, 192, 256, 576])
@pytest.mark.parametrize("members", [1, 12, 64, 128, 500])
def test_tiles_fit_registers_and_shared_memory(members, dim, dtype):
    size = jnp.dtype(dtype).itemsize
    padded = 1 << (dim - 1).bit_length()
    forward, dq, dkv = tiles(members, 16, Dims(padded, padded, 2 * padded), dtype)
    for tile, sums in ((forward, padded), (dq, padded), (dkv, 2 * padded)):
        assert tile.fixed & (tile.fixed - 1) == tile.gathered & (tile.gathered - 1) == 0
        assert tile.fixed >= 16
        assert 16 <= tile.gathered <= 128
        # At most 128 of the 255 registers of a thread hold sums.
        assert tile.fixed * sums <= 128 * 32 * tile.num_warps
        assert tile.gathered == 16 or 2 * tile.gathered * padded * size <= 1 << 15
    assert forward.parts(members) * forward.fixed >= members
