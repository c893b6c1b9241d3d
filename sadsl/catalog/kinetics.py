"""Kinetics: block top-k for decoding, and a cost model of test-time scaling."""

from dataclasses import dataclass
from typing import NamedTuple

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window
from sadsl.selections import topk


def kinetics(k: int, local: int, *, block: int = 16, sink: int = 4) -> IndexMap:
    """A query sees the first keys, the last keys, and the ``k`` best blocks.

    Sadhukhan et al., Kinetics: rethinking test-time scaling laws, 2025, section 4, for
    decoding. Blocks rank by their mean logit, averaged over the heads of a group, which
    share one choice. All blocks compete. A cache that is no longer than the budget
    ``local + k * block`` is seen whole. The code leaves the first layer dense.

    Args:
      k: blocks that are chosen.
      local: nearest keys; the query's own position counts.
      block: keys in a block.
      sink: first keys that are always seen.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.kinetics(2, 4, block=4))
      causal() & (sinks(4) | window(3) | topk(2, block=4, block_q=1, scope='group',
      eligible=causal()) | where(lambda q, k, h, n: n <= 12))
    """
    best = topk(k, block=block, block_q=1, scope="group", eligible=causal())
    budget = local + k * block
    short = where(lambda q, k, h, n: n <= budget)
    return causal() & (sinks(sink) | window(local - 1) | best | short)


@dataclass(frozen=True)
class Decoding:
    """The workload of a cost model: ``trials`` decodings of one context on one chip.

    Attributes:
      num_params: parameters of the model.
      num_heads, num_kv_heads, head_dim: of its attention.
      context: tokens of the shared context.
      generated: tokens that each trial generates.
      trials: decodings that share the context.
      intensity: operations per byte at which the chip is balanced.
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

    Trials share the cache of the context. The traffic of the parameters is left out.
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
    """The cost of decoding with ``kinetics(k, local, block=block)`` (section 4).

    While the cache is shorter than the budget, it reads fewer keys: half the square of
    what is missing at first is subtracted. (One variant of the code adds that instead.)
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
