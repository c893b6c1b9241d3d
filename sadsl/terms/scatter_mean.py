"""``scatter_mean``: one softmax in each cluster, and the mean of the outputs."""

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
    """One softmax in every cluster of ``map``, averaged; see ``scatter_mean``.

    ``map`` is ``kmeans(...)`` with ``members="topw"``, optionally ``&`` maps that
    content does not decide.
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
                "needs one size: use members='topw', or the map alone, which is one "
                "softmax"
            )
        if selections_of(rest):
            raise NotImplementedError(
                f"scatter_mean: beside its kmeans, the map has {rest!r}, which content "
                "decides too: give maps of positions and operands"
            )
        if self.own_key == "alone" and not clusters.share_qk:
            raise ValueError(
                "scatter_mean: own_key='alone' needs share_qk=True in kmeans: else the "
                "key of a query may be in another cluster"
            )

    @property
    def operands(self) -> Mapping[str, int]:
        """The operands of the clusters, and their members."""
        names = (self.clusters.key(name) for name in ("q", "k"))
        return {**self.clusters.operands, **dict.fromkeys(names, 3)}

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The rest of the map, without its clusters."""
        return (self.rest,)

    def reads(self, name: str) -> bool:
        """Whether the clusters or the rest of the map read the operand ``name``."""
        return name in self.operands or name in operands_of(self.rest)

    @property
    def clusters(self) -> Kmeans:
        """The one kmeans in the map.

        Raises:
          ValueError: the map has none, or several.
        """
        found = [part for part in _conjuncts(self.map) if isinstance(part, Kmeans)]
        if len(found) != 1:
            raise ValueError(
                f"scatter_mean: {self.map!r} must be one kmeans(...), optionally `&` "
                f"other maps; it has {len(found)} at the top"
            )
        return found[0]

    @property
    def rest(self) -> IndexMap:
        """The map without its kmeans."""
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
    """One softmax in each cluster of the ``kmeans`` in ``map``, and their mean.

    Let ``out_c[i]`` be the attention of query ``i`` over the keys of cluster ``c`` that
    the rest of the map allows, and ``cnt_i`` the number of clusters that hold query
    ``i``. The output is ``sum_c out_c[i] / (cnt_i + eps_count)``, which is 0 for a
    query in no cluster (Roy et al., Efficient content-based sparse attention with
    Routing Transformers, 2021, section 4.1, and its published code). The rest of the
    map sees true positions, so ``causal()`` hides later keys. Which tokens are in a
    cluster may still depend on later tokens.

    Args:
      map: ``kmeans(...)`` with ``members="topw"``, optionally ``&`` maps of positions.
      eps_count: the number added to ``cnt_i``.
      sm_scale: factor before the softmax; that of the call if None.
      own_key: "seen": a query sees its own key like any other; "alone": it sees its own
        key only if it sees no other key of the cluster.
      skip_zeros: True hides keys whose value is 0 in all features: padding.

    Raises:
      TypeError: ``map`` is not an index map.
      ValueError: the map does not have exactly one kmeans, or an option is unknown.
      NotImplementedError: the map has another part that content decides.

    Example:
      >>> import sadsl as sa
      >>> term = sa.scatter_mean(sa.causal() & sa.kmeans(8))
      >>> term.clusters, term.rest
      (kmeans(8), causal())
    """
    scale = None if sm_scale is None else float(sm_scale)
    return ScatterMean(map, float(eps_count), scale, own_key, bool(skip_zeros))


def _conjuncts(map: IndexMap) -> tuple[IndexMap, ...]:
    """The parts of ``a & b - c`` as ``(a, b, ~c)``."""
    match map:
        case Both(a, b):
            return *_conjuncts(a), *_conjuncts(b)
        case Minus(a, b):
            return *_conjuncts(a), ~b
    return (map,)
