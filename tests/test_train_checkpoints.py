"""Checkpoints of the training example: whole, checked, and read as models."""

import jax
import numpy as np
import pytest
from lm.checkpoints import Checkpoints, History

STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(3)}


def saved(folder, steps=2, identity=None):
    with Checkpoints(folder, identity or {"spec": "causal()", "d_model": 8}) as kept:
        for step in range(1, steps + 1):
            kept.save(STATE, History([8.0] * step, [0.1] * step, [[step, 7.5]]))
    return folder


def restored(folder, identity=None):
    with Checkpoints(folder, identity or {"spec": "causal()", "d_model": 8}) as kept:
        kept.check()
        return kept.restore(STATE)


def test_a_checkpoint_comes_back_whole(tmp_path):
    assert restored(tmp_path) is None
    state, history = restored(saved(tmp_path))
    assert history == History([8.0] * 2, [0.1] * 2, [[2, 7.5]])
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


def test_half_a_checkpoint_is_not_seen(tmp_path):
    saved(tmp_path, steps=1)
    part = tmp_path / "2.orbax-checkpoint-tmp"
    (part / "state").mkdir(parents=True)
    assert restored(tmp_path)[1].step == 1


@pytest.mark.parametrize("part", ["state", "run"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_named(tmp_path, part, damage):
    saved(tmp_path)
    for file in (tmp_path / "2" / part).rglob("*"):
        if file.is_file() and (content := file.read_bytes()):
            half = len(content) // 2
            cut, flipped = content[:half], bytes(b ^ 0x55 for b in content)
            file.write_bytes(cut if damage == "cut" else flipped)
    with pytest.raises(ValueError, match=r"2 is damaged .*--fresh") as error:
        restored(tmp_path)
    assert str(tmp_path / "2") in str(error.value)


def test_a_foreign_checkpoint_says_what_differs(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"another run:\n  d_model: 8 there, 9 here\n"):
        restored(tmp_path, {"spec": "causal()", "d_model": 9})
