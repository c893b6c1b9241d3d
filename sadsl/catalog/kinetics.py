"""Kinetics: blocks of a cache for decoding, and what test-time scaling costs."""

from dataclasses import dataclass
from typing import NamedTuple

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.selections import topk


def kinetics(k: int, local: int, *, block: int = 16, sink: int = 4) -> IndexMap:
    """The first keys, the last ``local``, and the ``k`` blocks of the best mean logit.

    Sadhukhan et al., Kinetics: rethinking test-time scaling laws, 2025, section 4, for
    decoding. The heads of a group choose as one, by their mean logit; all blocks
    compete. A cache that is no longer than the budget is seen as a whole. The code
    leaves the first layer dense.
    """
    best = topk(k, block=block, block_q=1, scope="group", eligible=causal())
    budget = local + k * block
    short = where(lambda q, k, h, n: n <= budget)
    return causal() & (sinks(sink) | window(local - 1) | best | short)


@dataclass(frozen=True)
class Decoding:
    """What is decoded, ``trials`` times from one context, and on which chip.

    ``intensity`` is operations per byte that the chip balances; lengths are in tokens.
    """

    num_params: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    generated: int
    trials: int = 1
    intensity: float = 1.0


class KineticsCost(NamedTuple):
    """Operations, and the equivalent of memory traffic, both in units of 1e12."""

    compute: float
    memory: float


def dense_cost(of: Decoding) -> KineticsCost:
    """The cost of dense decoding (Kinetics, section 3).

    Trials share the cache of the context; the traffic of the parameters is left out.
    """
    read = 2 * of.context + of.generated
    linear = 2 * of.num_params * of.generated
    scores = 2 * read * of.generated * of.num_heads * of.head_dim
    cached = 2 * (2 * of.context + of.generated * of.trials) * of.generated
    memory = cached * of.num_kv_heads * of.head_dim * of.intensity
    return KineticsCost((linear + scores) * of.trials / 1e12, memory / 1e12)


def block_topk_cost(
    of: Decoding, k: int, local: int, *, block: int = 16
) -> KineticsCost:
    """The cost with ``kinetics(k, local, block=block)`` (Kinetics, section 4).

    The budget is smaller while the cache is shorter than it: by the square of what is
    missing at first, halved. (One variant of the code adds that instead.)
    """
    budget = local + k * block
    keys = budget * of.generated - max(0, budget - of.context) ** 2 / 2
    searched = (2 * of.context + of.generated) // block * of.generated
    search = searched * of.num_heads * of.head_dim
    attended = 4 * keys * of.num_heads * of.head_dim
    compute = (2 * of.num_params * of.generated + attended + search) * of.trials
    blocks = (2 * of.context + of.generated * of.trials) // block * of.generated
    read = 4 * keys * of.num_kv_heads * of.head_dim * of.trials
    memory = read + blocks * of.num_kv_heads * of.head_dim
    return KineticsCost(compute / 1e12, memory * of.intensity / 1e12)
