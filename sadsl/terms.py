"""Terms: how the pairs of a map are scored and normalised, and by which heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd
from operator import and_
from typing import Literal, get_args

from lowering import ir
from sadsl.bias import Bias
from sadsl.call_text import call_text
from sadsl.maps import Both, IndexMap, Minus, at_least, per_head
from sadsl.named import full
from sadsl.selections.content import operands_of, selections_of
from sadsl.selections.kmeans import Kmeans
from sadsl.term import Learned, Sizes, Spec, Term, seen, together

OwnKey = Literal["seen", "alone"]


@dataclass(frozen=True, repr=False)
class Softmax(Term):
    """Softmax over the keys that ``map`` selects: reducer R1, one softmax over the set.

    See ``softmax``, which makes it.
    """

    map: IndexMap
    logits_soft_cap: float | None = None
    bias: Bias | None = None
    sink: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"softmax takes an index map, not {self.map!r}")
        if self.sink is not None and not (
            isinstance(self.sink, str) and self.sink.isidentifier()
        ):
            raise ValueError(
                f"softmax: sink={self.sink!r} must be True, False or the name of an "
                "operand, a Python identifier; the array is passed as operands="
                "{name: array}"
            )
        if not isinstance(self.bias, Bias | None):
            raise TypeError(
                f"softmax: bias={self.bias!r} must be one such as alibi(), or None; an "
                "array is the operand of pair_bias(name)"
            )
        cap = self.logits_soft_cap
        if cap is not None and not cap > 0:
            raise ValueError(
                f"softmax: logits_soft_cap={cap} must be positive, or None"
            )

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The map."""
        return (self.map,)

    @property
    def operands(self) -> Mapping[str, int]:
        """The arrays of the bias, and the sinks."""
        bias = self.bias
        of_bias = {} if bias is None else {**bias.operands, **bias.integer_operands}
        return {**of_bias, **({} if self.sink is None else {self.sink: 1})}

    @property
    def support(self) -> IndexMap:
        """The map."""
        return self.map

    def learned(self, sizes: Sizes) -> dict[str, Learned]:
        """The arrays of the bias, and a sink a head, which starts at 0."""
        found = {} if self.bias is None else self.bias.learned(sizes)
        if self.sink is None:
            return found
        return together(self, found, {self.sink: Learned((sizes.num_q_heads,))})

    def __repr__(self) -> str:
        return call_text(self)


@dataclass(frozen=True, repr=False)
class ScatterMean(Term):
    """A softmax in every cluster of ``map``, and the mean of what they yield: R2.

    ``map`` is ``kmeans(...)`` with ``members="topw"``, perhaps ``&`` maps that are not
    decided by content. See ``scatter_mean``, which makes it.
    """

    map: IndexMap
    eps_count: float = 0.01
    sm_scale: float | None = None
    own_key: OwnKey = "seen"
    skip_zeros: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"scatter_mean takes an index map, not {self.map!r}")
        if not self.eps_count >= 0:
            raise ValueError(
                f"scatter_mean: eps_count={self.eps_count} must be at least 0"
            )
        if self.own_key not in get_args(OwnKey):
            raise ValueError(
                f"scatter_mean: own_key={self.own_key!r} must be one of "
                f"{', '.join(get_args(OwnKey))}"
            )
        clusters, rest = self.clusters, self.rest
        if clusters.members != "topw":
            raise ValueError(
                f"scatter_mean: {clusters!r} has clusters of any size, and a kernel "
                "needs one: use members='topw', or the map alone, which is one softmax"
            )
        if selections_of(rest):
            raise NotImplementedError(
                f"scatter_mean: beside its kmeans, the map has {rest!r}, which is "
                "decided by content too: give maps of positions and operands"
            )
        if self.own_key == "alone" and not clusters.share_qk:
            raise ValueError(
                "scatter_mean: own_key='alone' needs share_qk=True in kmeans: else the "
                "key of a query may be in another cluster"
            )

    @property
    def operands(self) -> Mapping[str, int]:
        """What the clusters read, and their members."""
        names = (self.clusters.key(name) for name in ("q", "k"))
        return {**self.clusters.operands, **dict.fromkeys(names, 3)}

    @property
    def parts(self) -> tuple[Spec, ...]:
        """What the map demands beside a cluster in common."""
        return (self.rest,)

    def reads(self, name: str) -> bool:
        """Whether the clusters or the rest of the map take the array."""
        return name in self.operands or name in operands_of(self.rest)

    @property
    def clusters(self) -> Kmeans:
        """The clusters that the map has.

        Raises:
          ValueError: it has none, or several.
        """
        found = [part for part in _conjuncts(self.map) if isinstance(part, Kmeans)]
        if len(found) != 1:
            raise ValueError(
                f"scatter_mean: {self.map!r} must be one kmeans(...), perhaps `&` "
                f"other maps; it has {len(found)} at the top"
            )
        return found[0]

    @property
    def rest(self) -> IndexMap:
        """What the map demands of a pair beside a cluster in common."""
        rest = [part for part in _conjuncts(self.map) if not isinstance(part, Kmeans)]
        return reduce(and_, rest) if rest else full()

    def __repr__(self) -> str:
        return call_text(self)


@dataclass(frozen=True, repr=False)
class Heads(Term):
    """The first heads have the first spec, the next ones the second, and so on."""

    shares: tuple[tuple[Spec, int], ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise ValueError("heads(): give at least one (spec, number of heads)")
        for part in self.shares:
            if not isinstance(part, tuple) or len(part) != 2:
                raise TypeError(f"heads takes (spec, number of heads), not {part!r}")
            spec, count = part
            if not isinstance(spec, IndexMap | Term):
                raise TypeError(f"heads takes maps and terms, not {spec!r}")
            at_least("heads", "n", count, 1)

    @property
    def num_heads(self) -> int:
        """Of all parts together."""
        return sum(count for _, count in self.shares)

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The specs, without their numbers of heads."""
        return tuple(spec for spec, _ in self.shares)

    @property
    def seen(self) -> IndexMap | None:
        """The pairs of every head, unless those of a part depend on the head."""
        maps = [seen(spec) for spec in self.parts]
        known = [m for m in maps if m is not None and "h" not in ir.axes(m.node)]
        if len(known) < len(maps):
            return None
        unit = gcd(*(count for _, count in self.shares))
        each = zip(known, self.shares, strict=True)
        return per_head(*(m for m, (_, n) in each for _ in range(n // unit)))

    def learned(self, sizes: Sizes) -> dict[str, Learned]:
        """What each part learns for its own heads.

        Raises:
          ValueError: two parts read one learned array, which has the heads of one.
        """
        found: dict[str, Learned] = {}
        for spec, count in self.shares:
            if not isinstance(spec, Term):
                continue
            group = sizes.num_q_heads // sizes.num_kv_heads
            mine = sizes._replace(num_q_heads=count, num_kv_heads=count // group)
            new = spec.learned(mine)
            twice = sorted(set(found) & set(new))
            if twice:
                raise ValueError(
                    f"{self!r} learns {twice[0]!r} in two parts, whose heads differ: "
                    "give the arrays of one part another name"
                )
            found |= new
        return found

    def __repr__(self) -> str:
        return call_text(self, spread=True)


def softmax(
    map: IndexMap,
    logits_soft_cap: float | None = None,
    bias: Bias | None = None,
    sink: bool | str = False,
) -> Softmax:
    """The term of a map with options; a bare map means ``softmax(map)``.

    Args:
      map: the pairs that attend.
      logits_soft_cap: replaces each scaled score ``s`` by ``cap * tanh(s / cap)``
        (Gemma Team, Gemma 2, 2024, section 2).
      bias: what is added to the capped scores: ``alibi()``, ``t5_bias()``, ...
      sink: a learned logit a head, to which no value belongs, joins each softmax: the
        floats ``[num_q_heads]`` of the operand "sink", or of the name given here
        (OpenAI, gpt-oss, 2025). The lse includes it, so that no query is empty.
    """
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    name = ("sink" if sink else None) if isinstance(sink, bool) else sink
    return Softmax(map, cap, bias, name)


def scatter_mean(
    map: IndexMap,
    eps_count: float = 0.01,
    sm_scale: float | None = None,
    own_key: OwnKey = "seen",
    skip_zeros: bool = False,
) -> ScatterMean:
    """One softmax a cluster of the ``kmeans`` in ``map``; outputs are averaged.

    With ``out_c[i]`` the softmax of query ``i`` over the keys of cluster ``c`` that the
    rest of the map allows, and ``cnt_i`` the clusters that hold the query, the output
    is ``sum_c out_c[i] / (cnt_i + eps_count)``: 0 for a query in no cluster (Roy et
    al., Efficient content-based sparse attention with Routing Transformers, 2021,
    section 4.1, and its published code). Positions are the true ones, so ``causal()``
    is causal whichever positions a cluster holds; who is in a cluster may still depend
    on later tokens.

    Args:
      map: ``kmeans(...)``, perhaps ``&`` maps of positions: ``causal() & kmeans(8)``.
      eps_count: added to the number of clusters of a query.
      sm_scale: factor before the softmax; that of the call if None.
      own_key: "seen": the pair of a query and its own key is like any other; "alone":
        it counts only where the query sees no other key of the cluster.
      skip_zeros: keys whose value is 0 throughout are padding, which no one sees.
    """
    scale = None if sm_scale is None else float(sm_scale)
    return ScatterMean(map, float(eps_count), scale, own_key, bool(skip_zeros))


def heads(*parts: tuple[Spec, int]) -> Heads:
    """``heads((a, 4), (b, 2))``: heads 0 to 3 have spec ``a``, heads 4 and 5 ``b``.

    Each part is a call of its own on its heads: a head in a map, or on an axis of an
    operand, counts from the first of the part. Every part takes the operands that it
    reads. With grouped queries each number is a multiple of the group.
    """
    return Heads(parts)


def _conjuncts(map: IndexMap) -> tuple[IndexMap, ...]:
    match map:
        case Both(a, b):
            return *_conjuncts(a), *_conjuncts(b)
        case Minus(a, b):
            return *_conjuncts(a), ~b
    return (map,)
