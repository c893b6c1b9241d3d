"""Elementwise evaluation in JAX equals that in NumPy, also at the limits of int32."""

import jax.numpy as jnp
import numpy as np

from lowering import ir
from lowering.expr.evaluate import Jax, NumPy, evaluate

POWERS = 2 ** np.arange(31, dtype=np.int64)
EDGES = np.concatenate([np.arange(-70, 300), POWERS - 1, POWERS, POWERS[:-1] + 1])


def test_logarithms_and_powers_of_two():
    logs = [max(int(x), 1).bit_length() - 1 for x in EDGES]
    powers = [int(x) in POWERS for x in EDGES]
    for at in (NumPy(EDGES, 0), Jax(jnp.asarray(EDGES, jnp.int32), 0)):
        np.testing.assert_array_equal(evaluate(ir.Log2(ir.Q), at), logs)
        np.testing.assert_array_equal(evaluate(ir.PowerOfTwo(ir.Q), at), powers)
