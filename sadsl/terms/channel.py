"""Channel attention: softmax attention on the transposed tensor."""

from dataclasses import dataclass
from typing import Literal, get_args

from sadsl.maps.call_text import call_text
from sadsl.terms.base import DROPOUT_KEY, Term

Scale = Literal["head_dim", "tokens"]


@dataclass(frozen=True, repr=False)
class Channel(Term):
    """The channels of a head attend to each other over all tokens; see ``channel``."""

    scale: Scale = "head_dim"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(
                f"channel: scale={self.scale!r} must be 'head_dim' or 'tokens'"
            )

    def reads(self, name: str) -> bool:
        """No array; dropout gets as far as the error that it cannot be."""
        return name == DROPOUT_KEY

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def channel(scale: Scale = "head_dim") -> Channel:
    """Each channel of a head is a mean of channels, weighted over the whole sequence.

    With the queries ``Q``, keys ``K`` and values ``V`` of a head, ``[n, d]`` each, the
    output is ``(softmax(s * Q^T K) V^T)^T``: the softmax runs over the ``d`` channels
    of the keys, and the cost is linear in ``n``. Heads are the channel groups (Ding et
    al., DaViT: dual attention vision transformers, 2022, section 3.2; its code swaps
    the names of the three projections, which is the same class of functions).

    It has no index map: every token of the output depends on all tokens, so it is
    bidirectional only; one length for queries and keys; one width for keys and values.
    There is no log-sum-exp of a query, so it cannot be part of ``joint``.

    Args:
      scale: ``s`` is the ``sm_scale`` of the call, whose default is the paper's
        ``head_dim ** -0.5``; "tokens" takes ``n ** -0.5``, whatever the call says, as
        the authors' later vision encoder does (Xiao et al., Florence-2, 2024).
    """
    return Channel(scale)
