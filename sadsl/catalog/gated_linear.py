"""Linear attention with gates from the input: GLA, HGRN2, RWKV-6, Mamba-2."""

from sadsl.maps.base import IndexMap
from sadsl.terms.linear import Linear, linear


def gla(map: IndexMap | None = None) -> Linear:
    """Gated linear attention: a decay for each key channel and token.

    Yang et al., Gated linear attention transformers with hardware-efficient training,
    2024, section 4. The operand "g" ``[batch, seq, heads, head_dim]`` holds
    ``log_sigmoid(x W1 W2 + b) / 16``; ``sadsl.layers.parts.slow_decay`` computes it.

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.gla()
      linear('identity', decay='g', by='channel', normalise=False, scaled=True)
    """
    return linear("identity", "g", by="channel", map=map, normalise=False, scaled=True)


def hgrn2(map: IndexMap | None = None) -> Linear:
    """HGRN2: a key channel writes as much as it forgets.

    Qin et al., HGRN2: gated linear RNNs with state expansion, 2024, section 3. The
    recurrence is that of ``gla``; keys and the operand "g" come from one projection, by
    ``sadsl.layers.parts.hgrn2_gates``: ``k = 1 - exp(g)``. (The factor ``head_dim **
    -0.5`` is that of flash-linear-attention.)

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.hgrn2() == catalog.gla()
      True
    """
    return gla(map)


def rwkv6() -> Linear:
    """RWKV-6: a query reads the state before its own key, and its own key by a bonus.

    Peng et al., Eagle and Finch: RWKV with matrix-valued states and dynamic recurrence,
    2024, section 4. ``o = (S + diag(u) k v^T)^T r``, then ``S <- diag(exp(w)) S + k
    v^T``. Operands: "w" ``[batch, seq, heads, head_dim]``, log-decays ``-exp(...)``;
    "u" ``[heads, head_dim]``, the bonus. Queries are not scaled.

    Example:
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> sa.parse(repr(catalog.rwkv6())).bonus
      'u'
    """
    return linear(
        "identity", "w", by="channel", read="before", bonus="u", normalise=False
    )


def mamba2(map: IndexMap | None = None) -> Linear:
    """Mamba-2, the state space model of Nemotron-H, as linear attention.

    Dao, Gu, Transformers are SSMs: generalized models and efficient algorithms through
    structured state space duality, 2024, section 7. Per head, with ``dt = softplus(x W
    + dt_bias)``: pass ``q = C``, ``k = B``, ``v = dt * x``, and the operand "g"
    ``[batch, seq, heads]`` of log-decays ``A dt``, which
    ``sadsl.layers.parts.decay_gate`` computes from ``x W``. B and C may have fewer
    heads. What follows is outside: ``+ D x``, the gate, then the norm by groups
    (``gated_rms_norm(..., gate_first=True)``).

    Args:
      map: a causal map; ``causal()`` if None.

    Example:
      >>> from sadsl import catalog
      >>> catalog.mamba2()
      linear('identity', decay='g', normalise=False)
    """
    return linear("identity", "g", map=map, normalise=False)
