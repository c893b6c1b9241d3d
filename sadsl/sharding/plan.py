"""``shard_plan``: what travels between the devices of a sharded call."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from math import ceil, log2
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from lowering.partition.balance import imbalance
from lowering.partition.exchange import Exchange
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.run import checks
from sadsl.selections.base import selections_of
from sadsl.sharding.operand_axes import operand_axes
from sadsl.sharding.routes import Route, ShardSizes, maps_of, route
from sadsl.sharding.summaries import makes_own_regions
from sadsl.terms.base import Spec
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.mixtures import Joint, Mixture, Weighted, members_of
from sadsl.terms.over import Over
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.softmax import Softmax
from sadsl.terms.summaries import Summaries
from sadsl.text.specs import any_term

# Devices have the same work if the busiest has at most so much more than the mean.
EVEN = 1.05


@dataclass(frozen=True)
class ShardPart:
    """What travels for one part of a spec.

    Attributes:
      spec: the part.
      route: how its keys travel; None if something else does.
      received: the bytes of queries, keys and values, or of what travels instead, that
        each device receives in a forward pass.
      instead: what travels if no keys do.
      imbalance: the work of the busiest device over the mean; None if not counted.
    """

    spec: Spec
    route: Route | None
    received: int
    instead: str = "the state, in a scan"
    imbalance: float | None = None

    @property
    def how(self) -> str:
        """How its keys travel, or what travels instead, in words."""
        return self.instead if self.route is None else str(self.route)


@dataclass(frozen=True)
class ShardPlan:
    """What travels between devices; ``print`` shows it.

    Attributes:
      shards: how the positions are dealt.
      parts: the parts of the spec.
      all_keys: the bytes that a device receives where it gets all keys, by a gather or
        in a ring.
      by_heads: the same where heads are dealt in place of tokens, by all-to-alls; None
        if the numbers of heads are no multiples of the devices.
    """

    shards: Shards
    parts: tuple[ShardPart, ...]
    all_keys: int
    by_heads: int | None

    @property
    def received(self) -> int:
        """The bytes that each device receives in a forward pass."""
        return sum(part.received for part in self.parts)

    @property
    def imbalance(self) -> float:
        """The work of the busiest device over the mean, for the worst counted part."""
        found = [part.imbalance for part in self.parts if part.imbalance is not None]
        return max(found, default=1.0)

    def __str__(self) -> str:
        shards = self.shards
        lines = [
            f"{shards.count} shards of {shards.q_size:,} queries and "
            f"{shards.kv_size:,} keys"
        ]
        for part in self.parts:
            lines.append(f"  {part.spec!r}: {part.how}")
            even = None if part.route is None else part.route.balance
            if even is not None:
                lines.append(
                    f"    busiest device over the mean: {even.before:.2f} in order, "
                    f"{even.after:.2f} with moved queries"
                )
            elif (part.imbalance or 1) > EVEN:
                lines.append(f"    busiest device over the mean: {part.imbalance:.2f}")
        rows = [
            ("this plan", self.received),
            ("all keys, as a ring or a gather", self.all_keys),
        ]
        if self.by_heads is not None:
            rows.append(("heads for tokens", self.by_heads))
        lines.append("received by each device in a forward pass:")
        lines += [f"  {name:32} {_bytes(count):>10}" for name, count in rows]
        return "\n".join(lines)


def shard_plan(
    spec: Spec | str,
    seq_len: int,
    num_shards: int,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: DTypeLike = "bfloat16",
) -> ShardPlan:
    """Plans what travels in a call of ``sharded_attention``; needs no devices.

    Args:
      spec: an index map, a term, or text.
      seq_len: the number of queries, and of keys.
      num_shards: the devices along the axis of the sequence.
      num_heads, num_kv_heads: the heads of one device; of keys as many if None.
      head_dim: the channels of keys and of values.
      dtype: of q, k and v.

    Raises:
      ValueError: a size is no positive integer, or the map is made for another one.
      NotImplementedError: a part of the spec has no plan.

    Example:
      >>> import sadsl as sa
      >>> near = sa.causal() & (sa.window(1024) | sa.sinks(4))
      >>> print(sa.shard_plan(near, 1 << 20, 256, num_heads=4, head_dim=128))
      256 shards of 4,096 queries and 4,096 keys
        causal() & (window(1024) | sinks(4)): halo of 1,024 keys before and 0 after,
        128 shared keys
      received by each device in a forward pass:
        this plan                           2.5 MiB
        all keys, as a ring or a gather     2.0 GiB
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"seq_len": seq_len, "num_shards": num_shards, "num_heads": num_heads}
    sizes |= {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
    checks.positive(sizes)
    shards = Shards(num_shards, seq_len, seq_len)
    heads, dims = (num_heads, num_kv_heads), (head_dim, head_dim)
    call = ShardSizes(shards, *heads, *dims, np.dtype(dtype).itemsize)
    parts = tuple(_parts(any_term(spec), call))
    deals = not (num_heads % num_shards or num_kv_heads % num_shards)
    return ShardPlan(shards, parts, call.all_keys, call.by_heads if deals else None)


@singledispatch
def _parts(spec: Any, call: ShardSizes) -> Iterator[ShardPart]:
    """The parts of a spec that travel alone; a term without a rule runs whole."""
    shards = call.shards
    own = shards.q_size * call.query_bytes // 2 * (shards.count - 1)
    found = Route("whole", Exchange(shards), received=call.all_keys + own)
    yield ShardPart(spec, found, found.received)


@_parts.register(IndexMap)
@_parts.register(Softmax)
@_parts.register(Latent)
@_parts.register(LocalLinear)
def _(spec: Any, call: ShardSizes) -> Iterator[ShardPart]:
    term = Softmax(spec) if isinstance(spec, IndexMap) else spec
    axes = operand_axes(term, {}).values()
    found = route(term, call, reads_heads=any(x.head_axis is not None for x in axes))
    plain = isinstance(term, Softmax) and term == Softmax(term.map)
    own = _imbalance(term, found, call)
    yield ShardPart(term.map if plain else term, found, found.received, imbalance=own)


def _imbalance(term: Any, found: Route, call: ShardSizes) -> float:
    """The work of the busiest device over the mean."""
    if found.way in ("heads", "whole"):
        return 1.0
    if found.balance is not None:
        return found.balance.after
    return imbalance(maps_of(term, call.shards, call.q_heads), call.shards)


@_parts.register
def _(spec: Over, call: ShardSizes) -> Iterator[ShardPart]:
    """All devices have the entries; choices among them need all queries."""
    if selections_of(spec.map):
        yield from _parts.dispatch(object)(spec, call)
        return
    yield ShardPart(spec, Route("parts", Exchange(call.shards)), 0)


@_parts.register
def _(spec: Summaries, call: ShardSizes) -> Iterator[ShardPart]:
    """Regions that shards make alone, else the whole call."""
    shards = call.shards
    if not makes_own_regions(spec, shards):
        yield from _parts.dispatch(object)(spec, call)
        return
    count = spec.partition.num_regions(shards.kv_seq_len)
    # A value for each head of q: its query chooses among the members.
    each = call.kv_heads * call.head_dim + call.q_heads * call.head_dim_v
    of_others = count * (shards.count - 1) // shards.count
    text = f"{count:,} regions, gathered"
    yield ShardPart(spec, None, of_others * each * call.itemsize, text)


@_parts.register
def _(spec: Joint, call: ShardSizes) -> Iterator[ShardPart]:
    shards = call.shards
    problem = Problem(shards.q_seq_len, shards.kv_seq_len, call.q_heads)
    for member in members_of(spec, problem):
        yield from _parts(member.term, call)


@_parts.register
def _(spec: Mixture, call: ShardSizes) -> Iterator[ShardPart]:
    for part in spec.terms:
        yield from _parts(part, call)


@_parts.register
def _(spec: Weighted, call: ShardSizes) -> Iterator[ShardPart]:
    yield from _parts(spec.term, call)


@_parts.register
def _(spec: Heads, call: ShardSizes) -> Iterator[ShardPart]:
    group = call.q_heads // call.kv_heads
    for part, count in spec.shares:
        own = replace(call, q_heads=count, kv_heads=max(1, count // group))
        yield from _parts(part, own)


@_parts.register
def _(spec: Recurrent, call: ShardSizes) -> Iterator[ShardPart]:
    """States in float32, twice where a term erases: see ``sharding.recurrent``."""
    if not spec.kind.causal or spec.by_channel_sums:
        yield from _parts.dispatch(object)(spec, call)
        return
    numbers = call.q_heads * call.head_dim * call.head_dim_v
    matrix = call.q_heads * call.head_dim * call.head_dim
    keep = matrix if hasattr(spec, "erase") else call.q_heads * call.head_dim
    rounds = ceil(log2(call.shards.count)) if call.shards.count > 1 else 0
    yield ShardPart(spec, None, 4 * (numbers + keep) * (rounds + (rounds > 0)))


def _bytes(count: int) -> str:
    """A number of bytes in three digits."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
