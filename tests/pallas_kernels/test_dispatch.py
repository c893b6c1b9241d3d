"""``BlockMask``, ``KernelConfig`` and ``dispatch``, for every backend."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.block_mask import blank, check, expand, from_blocks
from pallas_kernels.config import KernelConfig, Tile, Tiles


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)
)
def test_runs_hold_the_blocks_that_they_were_made_of(seed, rows, columns, maps):
    kinds = np.random.default_rng(seed).integers(0, 3, (maps, rows, columns))
    like = blank(rows * 4, columns * 8 - 3, 4, 8)
    mask = from_blocks(kinds, map_of_head=np.arange(maps), like=like)
    check(mask)
    np.testing.assert_array_equal(expand(mask), kinds)
    turned = mask.transpose()
    check(turned)
    np.testing.assert_array_equal(expand(turned), np.swapaxes(kinds, 1, 2))
    np.testing.assert_array_equal(expand(turned.transpose()), kinds)
    assert mask.max_blocks == (kinds > 0).sum(axis=2).max()


def test_check_finds_broken_lists():
    like = blank(8, 8, 4, 4)
    mask = from_blocks(np.ones((1, 2, 2), int), map_of_head=np.zeros(1, int), like=like)
    mask.run_start[0] = 2
    with pytest.raises(AssertionError):
        check(mask)


def test_a_config_fills_what_is_left_open():
    tile = Tile(block_q=128, block_kv=64, num_warps=8, num_stages=3)
    defaults = Tiles(forward=tile, dq=tile, dkv=tile)
    own = Tile(block_q=16, block_kv=32)
    found = KernelConfig(block_q=32, dkv=own).resolve(defaults)
    assert found.forward == Tile(block_q=32, block_kv=64, num_warps=8, num_stages=3)
    assert found.dq == found.forward
    assert found.dkv == own


@pytest.mark.parametrize("name", ["block_q", "block_kv", "num_warps", "num_stages"])
@pytest.mark.parametrize("value", [0, -1])
def test_bad_tiles(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be an integer"):
        Tile(**{"block_q": 16, "block_kv": 16, name: value})
