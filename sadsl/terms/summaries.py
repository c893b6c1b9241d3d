"""``summaries``: attention to regions, each with one key and one value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, get_args

from typing_extensions import override

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.named import where
from sadsl.maps.operand_names import check_operand_name
from sadsl.maps.symbols import operand
from sadsl.terms.base import Spec, Term, is_dropout
from sadsl.terms.cluster_regions import Clusters
from sadsl.terms.grid_regions import Rowmajor
from sadsl.terms.regions import Partition, Pool

# The feature maps that are not operands.
PLAIN = ("identity", "relu")
Phi: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True, repr=False)
class Summaries(Term):
    """Attention to regions with one key and one value each; see ``summaries``."""

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
            check_operand_name("summaries: phi", name, "'identity'", "'relu'")
        if self.valid:
            check_operand_name("summaries: valid", self.valid, "None")
        plain = self.pool, self.phi
        if isinstance(self.partition, Rowmajor) and plain != ("max", "identity"):
            raise ValueError(
                f"summaries: pool={self.pool!r}, phi={self.phi!r}, but the regions of "
                f"{self.partition!r} ask with the query of a token and are not pooled: "
                "leave both at their defaults"
            )

    @property
    def features(self) -> tuple[str, str]:
        """The feature maps of queries and of keys, applied before pooling."""
        if isinstance(self.phi, str):
            return self.phi, self.phi
        if not isinstance(self.phi, tuple) or len(self.phi) != 2:
            raise TypeError(
                f"summaries: phi={self.phi!r} must be a name, or a tuple of one name "
                "for the queries and one for the keys"
            )
        return self.phi

    @property
    def callables(self) -> tuple[str, ...]:
        """The names of the operands that are functions."""
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
        """The kmeans of the partition, if content decides the regions."""
        return (self.partition.kmeans,) if isinstance(self.partition, Clusters) else ()

    @override
    def reads(self, name: str) -> bool:
        return is_dropout(name) or super().reads(name)

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
    """Attention to regions of tokens, each with one key and one value.

    Let ``m(j)`` be the members of region ``j``. Its key is ``pool(phi(k[m(j)]))``, its
    query is ``pool(phi(q[m(j)]))``, and its value is the attention of that query over
    its members, which is the same for all readers. A query attends to the regions that
    the partition lets it read. In ``joint(direct, summaries(...))`` keys and regions
    share one normaliser: full attention that is of rank one within a region (Ren et
    al., Combiner: full attention transformer with sparse computation cost, 2021,
    section 3, which calls the regions abstractions).

    For self-attention only, since regions pool the queries of their tokens.
    ``sm_scale`` applies to both products, once each. Both run as ordinary maps.

    Args:
      partition: ``spans(size)``, ``tower()``, ``columns(width)``, ``rows(width)``,
        ``rowmajor(width)``, ``clusters(kmeans(...))`` or ``regions(...)``.
      pool: "max", "mean" or "sum" over the members, for each feature.
      phi: "identity", "relu", or the name of an operand that is a function from arrays
        ``[batch, seq, heads, head_dim]`` to the same shape, such as a dense layer with
        a ReLU. A tuple of two names is for queries and for keys.
      valid: the name of an operand ``[seq]`` or ``[batch, seq]`` that is 0 at keys that
        do not exist. They are in no region, and a region without members is not read.
        None: all keys exist.

    Raises:
      TypeError: ``partition`` is not a partition.
      ValueError: an option is unknown, or a name is not an identifier.

    Example:
      Keys in the query's own span of 2 tokens directly, spans before it by a summary:

      >>> import sadsl as sa
      >>> spec = sa.joint(sa.causal() & sa.blocks(2), sa.summaries(sa.spans(2)))
      >>> print(spec.terms[1].support.dense(6)[0].astype(int))
      [[0 0 0 0 0 0]
       [0 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 1 0 0]
       [1 1 1 1 0 0]]
      >>> sa.properties(spec, 6).coverage
      1.0
    """
    return Summaries(partition, pool, phi, valid)
