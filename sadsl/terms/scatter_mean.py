"""``scatter_mean``: a softmax in each cluster, and the mean of its outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Literal, get_args

from sadsl.maps.base import Both, IndexMap, Minus
from sadsl.maps.call_text import call_text
from sadsl.maps.named import full
from sadsl.selections.base import operands_of, selections_of
from sadsl.selections.kmeans import Kmeans
from sadsl.terms.base import Spec, Term

OwnKey = Literal["seen", "alone"]


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


def _conjuncts(map: IndexMap) -> tuple[IndexMap, ...]:
    match map:
        case Both(a, b):
            return *_conjuncts(a), *_conjuncts(b)
        case Minus(a, b):
            return *_conjuncts(a), ~b
    return (map,)
