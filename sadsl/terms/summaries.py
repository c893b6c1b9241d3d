"""The term of summaries: a query reads one key and one value a region."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, get_args

from typing_extensions import override

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.named import where
from sadsl.maps.symbols import operand
from sadsl.terms.base import DROPOUT_KEY, Spec, Term, check_name
from sadsl.terms.cluster_regions import Clusters
from sadsl.terms.regions import Partition, Pool, Rowmajor

# Feature maps that need no callable.
PLAIN = ("identity", "relu")
Phi: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True, repr=False)
class Summaries(Term):
    """Regions summarised by a key and a value each: reducer R3. See ``summaries``."""

    partition: Partition
    pool: Pool = "max"
    phi: Phi = "identity"
    valid: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.partition, Partition):
            raise TypeError(
                f"summaries takes a partition such as spans(64), not {self.partition!r}"
            )
        if self.pool not in get_args(Pool):
            raise ValueError(
                f"summaries: pool={self.pool!r} must be one of "
                f"{', '.join(get_args(Pool))}"
            )
        for name in self.features:
            check_name("summaries", "phi", name, "'identity', 'relu' or ")
        if self.valid:
            check_name("summaries", "valid", self.valid, "None or ")
        plain = self.pool, self.phi
        if isinstance(self.partition, Rowmajor) and plain != ("max", "identity"):
            raise ValueError(
                f"summaries: pool={self.pool!r}, phi={self.phi!r}, but the regions of "
                f"{self.partition!r} ask with the query of a token and are not pooled: "
                "leave both at their defaults"
            )

    @property
    def features(self) -> tuple[str, str]:
        """The feature maps of queries and of keys before they are pooled."""
        if isinstance(self.phi, str):
            return self.phi, self.phi
        if not isinstance(self.phi, tuple) or len(self.phi) != 2:
            raise TypeError(
                f"summaries: phi={self.phi!r} must be a name, or one for the queries "
                "and one for the keys"
            )
        return self.phi

    @property
    def callables(self) -> tuple[str, ...]:
        """The operands that are functions."""
        names = [name for name in self.features if name not in PLAIN]
        if isinstance(self.partition, Rowmajor) and "proj" in self.partition.key:
            names.append(self.partition.proj)
        return tuple(dict.fromkeys(names))

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        arrays = {} if self.valid is None else {self.valid: 1}
        return {**arrays, **dict.fromkeys(self.callables, 0)}

    @property
    @override
    def parts(self) -> tuple[Spec, ...]:
        """The clusters, where content decides who is in a region."""
        return (self.partition.kmeans,) if isinstance(self.partition, Clusters) else ()

    @override
    def reads(self, name: str) -> bool:
        return name == DROPOUT_KEY or super().reads(name)

    @property
    @override
    def support(self) -> IndexMap:
        """The pairs of a query and a key in a region that the query reads."""
        if self.valid is None:
            return self.partition.support
        valid = self.valid
        return self.partition.support & where(lambda q, k: operand(valid)[k] != 0)

    def __repr__(self) -> str:
        return call_text(self)


def summaries(
    partition: Partition,
    pool: Pool = "max",
    phi: Phi = "identity",
    valid: str | None = None,
) -> Summaries:
    """Attention to regions, each with one key and one value: Combiner's abstractions.

    With ``m(j)`` the members of region ``j``, its key and its query are
    ``pool(phi(k[m(j)]))`` and ``pool(phi(q[m(j)]))``, and its value is the attention of
    that query over its members, which does not depend on who reads it. A query attends
    to the regions that the partition lets it read. In ``joint(direct, summaries(...))``
    all share one normaliser: full attention, locally of rank one (Ren et al., Combiner:
    full attention transformer with sparse computation cost, 2021, section 3).

    Self-attention only: regions pool the queries of their tokens. ``sm_scale`` is
    applied once to either product. Members and regions run as ordinary maps.

    Args:
      partition: ``spans(size)``, ``tower()``, ``columns(width)``, ``rows(width)``,
        ``rowmajor(width)`` or ``clusters(kmeans(...))``.
      pool: "max", "mean" or "sum" over the members, feature by feature.
      phi: "identity", "relu", or the name of an operand that is a function of arrays
        ``[batch, seq, heads, head_dim]`` to the same shape, such as a dense layer with
        a ReLU; two names are for queries and keys apart.
      valid: the name of an operand ``[seq]``, perhaps with a batch axis, that is 0 at
        keys which do not exist: no region has them, and no region is made of them
        alone. None: all keys exist.
    """
    return Summaries(partition, pool, phi, valid)
