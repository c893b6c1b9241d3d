"""``delta``: linear attention that erases what its state holds for a key.

A token decays the state ``S [head_dim, head_dim_v]``, corrects it, and reads it::

    S <- exp(g) S
    S <- S + beta k (v - S^T e)^T       e: the key k, or the operand ``erase``
    o = sm_scale S^T q

With ``write`` it is the general step, a diagonal plus a matrix of rank one::

    S <- (diag(exp(g)) + b a^T) S + k v^T         a: ``erase``, b: ``write``

where ``a`` reads the old state without its decay. There may be more heads of v than of
k, or more of k than of v: each of the larger number of heads has a state. Nothing is
normalised, so there is no lse, and the term cannot be part of ``joint``. If the keys
are not normalised, the state may grow without bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import LayerSizes, Learned
from sadsl.terms.recurrent import CAUSAL, Decay, Recurrent, factors

# The default of ``erase``: the key itself.
KEY = "k"


@dataclass(frozen=True, repr=False)
class Delta(Recurrent):
    """Linear attention by the delta rule; see ``delta``."""

    beta: str | float | None = "beta"
    decay: Decay = None
    by: str = "head"
    erase: str = KEY
    write: str | None = None
    steps: int = 1
    normalise_keys: bool = True
    map: IndexMap = CAUSAL

    def __post_init__(self) -> None:
        self.check("delta")
        at_least("delta", "steps", self.steps, 1)
        check_operand_name("delta: erase", self.erase)
        if isinstance(self.beta, str):
            check_operand_name("delta: beta", self.beta, "None", "a number")
        elif self.beta is not None and not 0 <= self.beta <= 2:
            raise ValueError(
                f"delta: beta={self.beta} must be in [0, 2]: 1 replaces the value of "
                "a key, 2 reflects the state, and beyond that it grows"
            )
        if self.write is not None:
            self._check_write()
        names = [*super().operands, *self._own]
        for name in sorted(set(names)):
            if names.count(name) > 1:
                raise ValueError(
                    f"delta: {name!r} names two operands: give each its own name"
                )

    def _check_write(self) -> None:
        check_operand_name("delta: write", self.write, "None")
        if self.erase == KEY or self.beta is not None or self.steps > 1:
            raise ValueError(
                f"delta: write={self.write!r} is the vector that writes what the "
                f"vector erase={self.erase!r} reads of the old state: name both, with "
                "beta=None and steps=1"
            )

    @property
    def _own(self) -> dict[str, int]:
        """The operands that ``linear`` does not have, with their axes."""
        named = [(self.beta, 2), (self.erase, 3), (self.write, 3)]
        return {
            name: axes for name, axes in named if isinstance(name, str) and name != KEY
        }

    @property
    def of_keys(self) -> frozenset[str]:
        """The ids of keys, betas, and vectors that erase and write."""
        return super().of_keys | self._own.keys()

    @property
    def operands(self) -> Mapping[str, int]:
        """The segment ids, log-decays, betas, and vectors that erase and write."""
        return {**super().operands, **self._own}

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The log-decays, betas and vectors of every token, by key head."""
        found, heads = super().learned(sizes), sizes.num_kv_heads
        if isinstance(self.beta, str):
            found[self.beta] = Learned((heads,), per_query=True, squash="sigmoid")
        for name in (self.erase, self.write):
            if name not in (None, KEY):
                found[name] = Learned((heads, sizes.head_dim), per_query=True)
        return found

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def delta(
    beta: str | float | None = "beta",
    decay: Any = None,
    *,
    by: str = "head",
    erase: str = KEY,
    write: str | None = None,
    steps: int = 1,
    normalise_keys: bool = True,
    map: IndexMap | None = None,
) -> Delta:
    """Linear attention whose keys replace what the state holds for them.

    The docstring of ``sadsl.terms.delta`` has the formulas (Yang et al., Parallelizing
    linear transformers with the delta rule over sequence length, 2024, section 2; with
    a decay by head: Yang et al., Gated delta networks, 2024, section 3; by channel:
    Kimi Team, Kimi Linear, 2025, section 3).

    Args:
      beta: how much of the old value a key replaces, in [0, 2]: the name of an operand
        ``[batch, kv_seq, heads]``, a number for all tokens, or None for 1. Known betas
        outside are refused.
      decay, by: as in ``linear``; a token decays the state once. With ``by="channel"``
        the operand is ``[batch, q_seq, heads, head_dim]``.
      erase: "k", or the name of an operand ``[batch, kv_seq, heads, head_dim]``: the
        vector that reads what is taken away (Hu et al., Comba, 2025). It is not
        normalised.
      write: the name of an operand like ``erase``, which reads the old state; needs
        ``beta=None`` (Peng et al., RWKV-7 "Goose", 2025, section 3).
      steps: how many keys a token writes in turn: k, v and what belongs to keys have
        ``steps`` times the length of q (Siems et al., DeltaProduct, 2025).
      normalise_keys: divides q and k by their Euclidean norm over ``head_dim``, as
        ``x / sqrt(sum(x ** 2) + 1e-6)``.
      map: ``causal()`` (if None), ``full()``, ``segments()``, or ``causal() &
        segments()``. With ``full()`` every query reads the state after all keys.

    Raises:
      ValueError: a number is out of its range, or options do not fit together.
      NotImplementedError: the map is not one of the four.

    Example:
      The second token overwrites the value of the first, which has the same key:

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x, v = jnp.ones((1, 2, 1, 1)), jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
      >>> out = sa.attention(x, x, v, sa.delta(1.0))
      >>> [round(float(y), 3) for y in out[0, :, 0, 0]]
      [3.0, 5.0]
    """
    return Delta(
        beta if beta is None or isinstance(beta, str) else float(beta),
        factors("delta", decay),
        by,
        erase,
        write,
        steps,
        bool(normalise_keys),
        CAUSAL if map is None else map,
    )
