"""Masks of ``sadsl.splash`` against those of jax, pair by pair."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as of_jax,
)

import sadsl as sa
from sadsl.splash import masks as ours

SIZES = [(13, 37), (1, 1), (130, 37)]


def random(shape):
    return np.random.default_rng(0).random(shape) < 0.4


# What builds a mask of either module.
MASKS = {
    "full": lambda m, n: m.FullMask(n),
    "causal": lambda m, n: m.CausalMask(n),
    "causal by offset": lambda m, n: m.CausalMask(n, -3, shard_count=1),
    "left": lambda m, n: m.LocalMask(n, (3, None), 2),
    "right": lambda m, n: m.LocalMask(n, (None, 4), offset=-1),
    "both sides": lambda m, n: m.LocalMask(n, (5, 1), 0),
    "no side": lambda m, n: m.LocalMask(n, (None, None), 1),
    "chunks": lambda m, n: m.ChunkedCausalMask(n, 5),
    "array": lambda m, n: m.NumpyMask(random(n)),
    "and": lambda m, n: m.CausalMask(n) & m.LocalMask(n, (4, 2), 0),
    "or": lambda m, n: m.ChunkedCausalMask(n, 3) | m.NumpyMask(random(n)),
    "nested": lambda m, n: (
        (m.CausalMask(n, 2) | m.NumpyMask(random(n))) & m.LocalMask(n, (4, 9), 0)
    ),
    "function": lambda m, n: m._ComputableMask(n, lambda q, k: (q + k) % 3 == 0),
    "permuted": lambda m, n: permuted(m, n),
}


def permuted(module, shape):
    """A causal mask of queries in another order, as for a balanced context."""
    mask = module.CausalMask(shape)
    mask.q_sequence = np.arange(shape[0], dtype=np.int32)[::-1]
    return mask


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_jax(name, shape):
    mask, theirs = (MASKS[name](module, shape) for module in (ours, of_jax))
    wanted = theirs[:, :]
    assert mask.shape == shape
    np.testing.assert_array_equal(mask[:, :], wanted)
    np.testing.assert_array_equal(mask.map.dense(*shape)[0], wanted)
    rows, columns = slice(0, 9), slice(min(2, shape[1] - 1), None)
    np.testing.assert_array_equal(mask[rows, columns], wanted[rows, columns])
    accepted = ours.as_mask(theirs)
    np.testing.assert_array_equal(accepted.map.dense(*shape)[0], wanted)


def test_a_mask_of_heads():
    shape, names = (13, 37), ("causal", "array", "causal")
    mask, theirs = (
        m.MultiHeadMask([MASKS[name](m, shape) for name in names])
        for m in (ours, of_jax)
    )
    assert mask.shape == theirs.shape
    np.testing.assert_array_equal(mask[:, :, 2:9], theirs[:, :, 2:9])
    np.testing.assert_array_equal(mask[1, :, :], theirs[1, :, :])
    np.testing.assert_array_equal(ours.as_mask(theirs)[:, :, :], mask[:, :, :])


def test_a_subclass_of_jax_and_one_of_ours_need_two_methods():
    for base in (ours.Mask, of_jax.Mask):

        class Stripes(base):
            shape = (6, 6)

            def __getitem__(self, index):
                return (np.arange(36).reshape(6, 6) % 5 < 2)[index]

        mask = ours.as_mask(Stripes())
        np.testing.assert_array_equal(mask.map.dense(6)[0], Stripes()[:, :])


def test_any_map_is_a_mask():
    spec = sa.causal() & (sa.window(3) | sa.sinks(2))
    mask = ours.MapMask((13, 13), spec)
    assert mask.map == spec
    np.testing.assert_array_equal(mask[:, :], spec.dense(13)[0])
    both = mask & of_jax.ChunkedCausalMask((13, 13), 4)
    wanted = (spec & sa.blocks(4)).dense(13)[0]
    np.testing.assert_array_equal(both[:, :], wanted)


def test_masks_are_values():
    shape = 13, 37
    for name, make in MASKS.items():
        if name != "function":
            one, other = make(ours, shape), make(ours, shape)
            assert one == other
            assert hash(one) == hash(other)
    assert ours.CausalMask(shape) != ours.CausalMask(shape, 1)
    assert ours.CausalMask(shape) != ours.CausalMask((13, 13))
    a, b = ours.CausalMask(shape), ours.FullMask(shape)
    assert a & b != a | b


def test_a_long_mask_does_not_visit_its_pairs():
    length = 1 << 20
    mask = ours.CausalMask((length, length)) & ours.LocalMask(
        (length, length), (4096, None), 0
    )
    assert (
        sa.plan(mask.map, length).num_pairs
        == 4096 * (4097) // 2 + (length - 4096) * 4097
    )
    np.testing.assert_array_equal(mask[:2, :3], [[1, 0, 0], [1, 1, 0]])


def test_arrays_are_those_of_jax():
    shape = 13, 37
    for name, args in {
        "make_causal_mask": (shape, 2),
        "make_local_attention_mask": (shape, (3, None)),
        "make_chunk_attention_mask": (shape, 4),
        "make_random_mask": (shape, 0.7, 3),
    }.items():
        np.testing.assert_array_equal(
            getattr(ours, name)(*args), getattr(of_jax, name)(*args)
        )


def test_errors():
    shape = 8, 8
    causal = ours.CausalMask(shape)
    with pytest.raises(ValueError, match=r"\(8, 8\) and \(8, 9\) are combined"):
        causal & ours.FullMask((8, 9))
    with pytest.raises(TypeError, match="no truth value"):
        bool(causal)
    with pytest.raises(ValueError, match="shard_count=3, squared, must divide"):
        ours.CausalMask(shape, shard_count=3)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        ours.ChunkedCausalMask(shape, 0)
    with pytest.raises(ValueError, match="bools, not int64"):
        ours.NumpyMask(np.ones(shape, int))
    with pytest.raises(ValueError, match="not none"):
        ours.MultiHeadMask([])
    with pytest.raises(ValueError, match="all must have the same"):
        ours.MultiHeadMask([causal, ours.FullMask((8, 9))])
    with pytest.raises(ValueError, match="a mask of one head"):
        ours.MultiHeadMask([ours.MultiHeadMask([causal])])
    with pytest.raises(TypeError, match="is no mask"):
        ours.MultiHeadMask([sa.causal()])
    with pytest.raises(ValueError, match="reads arrays of a call"):
        ours.MapMask(shape, sa.segments())
    with pytest.raises(ValueError, match="varies by head"):
        ours.MapMask(shape, sa.per_head(sa.causal(), sa.full()))
    with pytest.raises(ValueError, match="must be a tuple"):
        ours.FullMask(8)
    for index in ((slice(0, 2),), (0, slice(0, 2)), (slice(0, 4, 2), slice(0, 2))):
        with pytest.raises(NotImplementedError, match="two slices without a step"):
            causal[index]
    with pytest.raises(NotImplementedError, match="must define shape"):
        ours.Mask().shape  # noqa: B018
