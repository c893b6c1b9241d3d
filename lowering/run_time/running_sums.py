"""Running sums that float32 holds exactly enough: a whole number and a small rest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def running_sums(
    x: Float[Array, "batch seq ..."],
) -> tuple[Float[Array, "batch seq ..."], Float[Array, "batch seq ..."]]:
    """The sums ``x[:, : t + 1]`` as ``whole + rest``, with ``|rest| <= 1/2``.

    Whole numbers below 2^24 are exact in float32. What is rounded are sums of two
    rests, about ``2 log2(seq)`` of them for each result, so the error of a sum does not
    grow with the sum. The gradient of the whole numbers is 0; the rest has that of the
    sum.
    """
    whole = jnp.round(x)
    return jax.lax.associative_scan(_added, (whole, x - whole), axis=1)


def _added(a: Pair, b: Pair) -> Pair:
    rest = a[1] + b[1]
    # |rest| <= 1, so this difference is exact.
    more = jnp.round(rest)
    return a[0] + b[0] + more, rest - more


@running_sums.defjvp
def _running_sums_jvp(primals: tuple, tangents: tuple) -> tuple[Pair, Pair]:
    whole, rest = running_sums(*primals)
    change = jnp.cumsum(tangents[0], axis=1)
    return (whole, rest), (jnp.zeros_like(whole), change)
