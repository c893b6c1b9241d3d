"""Decides how the keys of a term travel, from its map and the sizes of a call."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from lowering import ir, pipeline
from lowering.partition.balance import Balance, balance
from lowering.partition.exchange import Exchange, exchange
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.selections.base import selections_of
from sadsl.sharding.head_parts import depends_on_heads, may_deal_heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.softmax import Softmax

# How keys travel. "parts": those of an ``Exchange``. "gather": all keys to all devices.
# "ring": all keys, from neighbour to neighbour, in as many steps as devices. "heads":
# all tokens of some heads to each device. "whole": all queries too, so that each device
# does all work.
Way = Literal["parts", "gather", "ring", "heads", "whole"]
# All keys of a call are gathered if they fill at most so many bytes of a device.
MOST_GATHERED = 1 << 30


@dataclass(frozen=True)
class ShardSizes:
    """The sizes of a sharded call, of the heads of one device.

    Attributes:
      shards: how positions are dealt.
      q_heads, kv_heads: heads of queries and of keys.
      head_dim, head_dim_v: channels of keys and of values.
      itemsize: bytes of a number.
    """

    shards: Shards
    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    itemsize: int

    @property
    def key_bytes(self) -> int:
        """The bytes of a key and its value, in all heads."""
        return self.kv_heads * (self.head_dim + self.head_dim_v) * self.itemsize

    @property
    def query_bytes(self) -> int:
        """The bytes of a query and its output, in all heads."""
        return self.q_heads * (self.head_dim + self.head_dim_v) * self.itemsize

    @property
    def all_keys(self) -> int:
        """The bytes that a device receives where it gets all keys."""
        return (self.shards.count - 1) * self.shards.kv_size * self.key_bytes

    @property
    def by_heads(self) -> int:
        """The bytes that a device receives where heads are dealt in place of tokens."""
        shards = self.shards
        own = shards.q_size * self.query_bytes + shards.kv_size * self.key_bytes
        return own * (shards.count - 1) // shards.count


@dataclass(frozen=True)
class Route:
    """How the keys of a term travel.

    Attributes:
      way: see ``Way``.
      parts: the keys that travel, where the way is "parts".
      balance: the queries that move so that devices have equal work, or None.
      received: the bytes that a device receives in a forward pass.
    """

    way: Way
    parts: Exchange
    balance: Balance | None = None
    received: int = 0

    def __str__(self) -> str:
        if self.way == "parts":
            return str(self.parts)
        words = {
            "gather": "all keys, gathered",
            "ring": "all keys, in a ring",
            "heads": "heads for tokens, an all-to-all",
            "whole": "all tokens; each device does all work",
        }[self.way]
        return words if self.balance is None else f"{words}; queries moved"


def route(term: Any, sizes: ShardSizes, reads_heads: bool = False) -> Route:
    """The route of a term with one map; the one of the fewest bytes.

    ``reads_heads``: some array of the call has an axis of heads, or one of tokens whose
    place is not known; then heads are not dealt.
    """
    pairs, shards = map_of(term), sizes.shards
    sizes = _of_term(term, sizes)
    nothing = Exchange(shards)
    if shards.count == 1:
        return Route("parts", nothing)
    chosen = selections_of(pairs)
    deals = not reads_heads and _deals_heads(term, sizes)
    if not all(choice.by_position for choice in chosen):
        if deals:
            return Route("heads", nothing, received=sizes.by_heads)
        own = shards.q_size * sizes.query_bytes // 2 * (shards.count - 1)
        return Route("whole", nothing, received=sizes.all_keys + own)
    maps = maps_of(term, shards, sizes.q_heads)
    found = Exchange(shards, everything=True) if chosen else exchange(maps, shards)
    if not found.everything:
        return Route("parts", found, received=found.received * sizes.key_bytes)
    if deals and sizes.by_heads < sizes.all_keys:
        return Route("heads", nothing, received=sizes.by_heads)
    gathered = shards.count * shards.kv_size * sizes.key_bytes <= MOST_GATHERED
    if gathered or chosen or isinstance(term, LocalLinear):
        way: Way = "gather"
    else:
        way = "ring"
    even = None if chosen else balance(maps, shards)
    moved = 0 if even is None else shards.q_size * sizes.query_bytes
    return Route(way, nothing, even, sizes.all_keys + moved)


def map_of(term: Any) -> IndexMap:
    """The one map of a term."""
    return term.softmax.map if isinstance(term, Latent) else term.map


def maps_of(term: Any, shards: Shards, num_heads: int) -> tuple[ir.Pred, ...]:
    """The simplified maps of the heads of a term."""
    problem = Problem(shards.q_seq_len, shards.kv_seq_len, num_heads)
    return pipeline.run(map_of(term).node, problem)["simplify"].maps


def values_are_keys(term: Any) -> bool:
    """Whether the values are made of the keys, so that keys alone travel."""
    return isinstance(term, Latent) or (
        isinstance(term, Softmax) and term.values is not None
    )


def _of_term(term: Any, sizes: ShardSizes) -> ShardSizes:
    return replace(sizes, head_dim_v=0) if values_are_keys(term) else sizes


def _deals_heads(term: Any, sizes: ShardSizes) -> bool:
    """Whether each device can take some heads of all tokens."""
    count = sizes.shards.count
    fits = sizes.q_heads % count == 0 and sizes.kv_heads % count == 0
    plain = isinstance(term, Softmax | LocalLinear) and not depends_on_heads(term)
    return fits and plain and may_deal_heads(term)
