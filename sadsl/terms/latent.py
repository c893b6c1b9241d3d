"""``latent``: attention whose keys and values are made from a latent of each token."""

from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import Spec, Term
from sadsl.terms.softmax import Softmax

FORMS = (None, "expanded", "absorbed")


@dataclass(frozen=True, repr=False)
class Latent(Term):
    """Multi-head latent attention; see ``latent``."""

    term: Spec
    up: str = "kv_b"
    form: str | None = None

    # q has the channels of expanded keys, k those of the latent.
    own_head_dim = True

    def __post_init__(self) -> None:
        if not isinstance(self.term, IndexMap | Softmax):
            raise TypeError(f"latent takes a map or softmax(...), not {self.term!r}")
        check_operand_name("latent: up", self.up)
        if self.form not in FORMS:
            raise ValueError(f"latent: form={self.form!r} must be one of {FORMS}")

    @property
    def softmax(self) -> Softmax:
        """The term over keys and values."""
        if isinstance(self.term, Softmax):
            return self.term
        assert isinstance(self.term, IndexMap)
        return Softmax(self.term)

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The map or softmax."""
        return (self.term,)

    @property
    def operands(self) -> Mapping[str, int]:
        """The weights that expand a latent."""
        return {self.up: 3}

    @property
    def support(self) -> IndexMap:
        """The pairs of the map."""
        return self.softmax.map

    def __repr__(self) -> str:
        return call_text(self)


def latent(term: Spec, up: str = "kv_b", form: str | None = None) -> Latent:
    """Multi-head latent attention over the pairs of a map or ``softmax(...)``.

    A call has ``q [batch, q_seq, heads, d_n + d_r]`` and, as both ``k`` and ``v``, the
    rows that a decoder caches: ``[batch, kv_seq, 1, r + d_r]``, a latent of ``r``
    channels and a rotated key of ``d_r`` channels that all heads share. Head ``h`` has
    the key ``[up[h, :d_n] @ latent, rotated]`` and the value ``up[h, d_n:] @ latent``;
    ``d_r`` may be 0 (DeepSeek-AI, DeepSeek-V2, 2024, section 2.1).

    Two forms give the same outputs and gradients:

    - "expanded" makes the keys and the values of all heads;
    - "absorbed" multiplies q and the output by ``up`` instead. All heads read the one
      cached row, and values are a part of keys.

    The compiler takes the one with fewer operations: expanded for long dense calls,
    absorbed for few queries, for sparse maps and for choices by lists.

    Args:
      term: the pairs.
      up: the operand ``[heads, d_n + d_v, r]``.
      form: one of both, or None to choose by counts.

    Raises:
      TypeError: ``term`` is neither a map nor a softmax.
      ValueError: a name or the form is none of these.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> q, kv = jnp.ones((1, 4, 2, 3 + 1)), jnp.ones((1, 4, 1, 5 + 1))
      >>> up = jnp.ones((2, 3 + 2, 5))  # two heads, keys of 3, values of 2 channels
      >>> spec = latent(sa.causal())
      >>> sa.attention(q, kv, kv, spec, operands={"kv_b": up}).shape
      (1, 4, 2, 2)
    """
    return Latent(term, up, form)
