"""Channel attention: softmax attention on the transposed tensor."""

from dataclasses import dataclass
from typing import Literal, get_args

from sadsl.maps.call_text import call_text
from sadsl.terms.base import Term, is_dropout

Scale = Literal["head_dim", "tokens"]


@dataclass(frozen=True, repr=False)
class Channel(Term):
    """Channels of a head attend to channels of the same head; see ``channel``."""

    scale: Scale = "head_dim"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(
                f"channel: scale={self.scale!r} must be 'head_dim' or 'tokens'"
            )

    def reads(self, name: str) -> bool:
        """Accepts the dropout key only, so that ``attend`` can raise a clear error."""
        return is_dropout(name)

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def channel(scale: Scale = "head_dim") -> Channel:
    """Attention between the channels of each head instead of between tokens.

    With the queries ``Q``, keys ``K`` and values ``V`` of a head, ``[n, d]`` each, the
    output is ``(softmax(s * Q^T K) V^T)^T``: the softmax runs over the ``d`` channels
    of the keys, and the cost is linear in ``n``. Heads are the channel groups (Ding et
    al., DaViT: dual attention vision transformers, 2022, section 3.2; its code swaps
    the names of the three projections, which is the same class of functions).

    It has no index map: each output token depends on all tokens, so it cannot be
    causal. Queries and keys have one length, keys and values one width. A query has no
    log-sum-exp, so the term cannot be part of ``joint``.

    Args:
      scale: the factor ``s``: "head_dim" takes the ``sm_scale`` of the call, by default
        ``head_dim ** -0.5`` as in the paper; "tokens" takes ``n ** -0.5``, whatever the
        call says, as the authors' later vision encoder does (Xiao et al., Florence-2,
        2024).

    Raises:
      ValueError: ``scale`` is neither of the two.

    Example:
      >>> import sadsl as sa
      >>> sa.average(sa.blocks(49), sa.channel())
      average(blocks(49), channel())
    """
    return Channel(scale)
