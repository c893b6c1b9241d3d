"""Biases made of arrays of each token: distances weighed by queries, running gates."""

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

from lowering import ir
from lowering.bias import nodes
from sadsl.maps.base import at_least
from sadsl.maps.numbers import Real, weights
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.symbols import POSITIONS, maximum, minimum, table
from sadsl.terms.biases import Bias

Q, K, H = (POSITIONS[name] for name in "qkh")


@dataclass(frozen=True, repr=False)
class QueryDistanceBias(Bias):
    """A number for each query, head and distance; see ``query_distance_bias``."""

    name: str
    distances: str
    channels: int
    extent: int
    factor: Bias | None = None

    def __post_init__(self) -> None:
        for each in (self.name, self.distances):
            check_operand_name("query_distance_bias: name", each)
        at_least("query_distance_bias", "channels", self.channels, 1)
        at_least("query_distance_bias", "extent", self.extent, 1)
        if not isinstance(self.factor, Bias | None):
            raise TypeError(
                f"query_distance_bias: factor={self.factor!r} must be made by "
                "bias(lambda q, k, h: ...), or None"
            )
        if self.factor is not None and nodes.reads_key(self.factor.score(1)):
            raise ValueError(
                f"query_distance_bias: factor={self.factor!r} reads the key: it is a "
                "factor of the query, of q and h alone"
            )

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        rows, columns = weights(self.name), weights(self.distances)
        # NumPy's integers would make an array of the tuple below.
        channels, extent = int(self.channels), int(self.extent)
        near = minimum(maximum(Q - K, 0), extent - 1)
        products = [rows[Q, H, c] * columns[c, near] for c in range(channels)]
        found = reduce(add, products)
        if self.factor is not None:
            found = self.factor.of_heads(num_heads) * found
        # 1 at the distances 0 .. extent - 1, and 0 on both sides.
        inside = table((0.0, *(1.0,) * extent, 0.0))
        return found * inside[minimum(maximum(Q - K, -1), extent) + 1]


@dataclass(frozen=True, repr=False)
class GateBias(Bias):
    """The sum of the log-gates after the key; see ``gate_bias``."""

    name: str

    def __post_init__(self) -> None:
        check_operand_name("gate_bias: name", self.name)

    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        del num_heads

        def difference(part: Literal["whole", "rest"]) -> Real:
            at_q, at_k = (
                Real(nodes.Weights(self.name, (position, ir.H), part))
                for position in (ir.Q, ir.K)
            )
            return at_q - at_k

        return difference("whole") + difference("rest")


def query_distance_bias(
    name: str,
    distances: str,
    channels: int,
    extent: int,
    factor: Bias | None = None,
) -> QueryDistanceBias:
    """A bias by distance that each query weighs itself.

    The bias of query ``q`` and key ``k`` is ``sum_c x[q, h, c] * table[c, q - k]`` for
    ``0 <= q - k < extent``, and 0 elsewhere (Inkling, 2026; with ``x = q`` these are
    the relative positions of Shaw et al., 2018). No array of all pairs is made: kernels
    multiply ``channels`` vectors of queries by as many diagonals. Gradients reach both
    arrays. With ``q_offset``, ``x`` has the queries that are passed.

    A kernel holds a tile for each channel. On TPUs, 16 of them at the default blocks do
    not fit its memory, and the compiler refuses: pass smaller ones, as in
    ``config=KernelConfig(block_q=128, block_kv=128)``. The gradient of ``table`` costs
    a pass over the tiles for each channel.

    Args:
      name: the operand ``x``, ``[batch or 1, q_seq, num_q_heads or 1, channels]``, of
        floats.
      distances: the operand ``table``, ``[channels, extent]``, of floats.
      channels: how many products are added up; each takes one multiplication a pair.
      extent: the number of distances, the query's own position among them.
      factor: a factor of each query, ``bias(lambda q, k, h: ...)`` of q and h alone.

    Raises:
      TypeError: the factor is no bias.
      ValueError: a number is below 1, a name is no identifier, or the factor reads the
        key.

    Example:
      >>> import sadsl as sa
      >>> x = sa.query_distance_bias("rel_q", "rel_table", channels=2, extent=8)
      >>> sa.softmax(sa.causal(), bias=x)
      softmax(causal(), bias=query_distance_bias('rel_q', 'rel_table', 2, 8))
      >>> x.operands
      {'rel_q': 3, 'rel_table': 2}
    """
    return QueryDistanceBias(name, distances, channels, extent, factor)


def gate_bias(name: str) -> GateBias:
    """The sum of the log-gates of the tokens after the key, up to the query.

    With ``G`` the running sum of the gates, the bias is ``G[q] - G[k]`` (Lin et al.,
    Forgetting transformer: softmax attention with a forget gate, 2025, section 3).
    Gradients reach the gates.

    float32 suffices at any length: the sum is kept as a whole number and a rest of at
    most a half. Whole numbers below 2^24 are exact in float32, so their differences
    are, and the rests stay small. ``key_bias(-G)`` gives the same softmax, but it
    loses the digits that ``G`` needs before its point, and it is another one with a
    sink.

    Args:
      name: the operand ``[batch or 1, kv_seq, num_q_heads or 1]`` of natural logarithms
        of the gates, finite. The gate of a query is that of the key at its position, so
        positions of queries must lie among the keys.

    Raises:
      ValueError: the name is no identifier.

    Example:
      >>> import sadsl as sa
      >>> term = sa.softmax(sa.causal(), bias=sa.gate_bias("g"))
      >>> term.operands
      {'g': 2}
    """
    return GateBias(name)
