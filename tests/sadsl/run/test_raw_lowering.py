"""``jax.jit(f).lower`` for TPUs works on a machine without one, for every choice."""

import jax
import numpy as np
import pytest
from content_cases import CASES

import sadsl as sa


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CASES)
def test_a_choice_is_lowered_without_a_target(name):
    case = CASES[name]
    rng = np.random.default_rng(0)
    shape = (1, case.n, case.num_heads, case.head_dim)
    q, k = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    given = case.operands(q, k)

    def run(q, k):
        return sa.attention(q, k, k, case.spec, impl="tpu", operands=given)

    lowered = jax.jit(run).trace(q, k).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
