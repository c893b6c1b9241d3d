"""The published linear layers, as values of ``LinearLayer``.

Each function takes the features of the input and the number of heads. Options that all
have: ``head_dim`` and ``head_dim_v`` (channels of a key and of a value), ``map`` (as in
``sadsl.linear``), ``conv`` (width of the short convolution, None for none), and
``out_features`` (as many as ``features`` if None). No linear map has a bias.
"""

from sadsl import catalog
from sadsl.layers.linear import LinearLayer, OutputNorm
from sadsl.layers.linear_gates import DecayGate, SlowDecay, WriteStrength
from sadsl.layers.parts import Activation
from sadsl.maps.base import IndexMap
from sadsl.terms.features import FEATURES
from sadsl.terms.features import FeatureMap as Function
from sadsl.terms.linear import linear


def _width(features: int, num_heads: int, given: int | None) -> int:
    """Channels of a head; an equal share of the features if None is given.

    Raises:
      ValueError: the features cannot be shared.
    """
    if given is not None:
        return given
    if num_heads < 1 or features % num_heads:
        raise ValueError(
            f"features={features} must be a multiple of num_heads={num_heads}, or "
            "head_dim must be given"
        )
    return features // num_heads


def linear_attention(
    features: int,
    num_heads: int,
    *,
    feature_map: str | Function = "elu1",
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    map: IndexMap | None = None,
    conv: int | None = None,
    out_features: int | None = None,
) -> LinearLayer:
    """Linear attention with a normaliser, as Katharopoulos et al. have it.

    Transformers are RNNs, 2020, section 3: no convolution, no gate, no norm.

    Args:
      features, num_heads: of the input, and of queries, keys and values.
      feature_map: a name or function of ``sadsl.linear``.
      head_dim, head_dim_v: ``features // num_heads`` if None.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit, or the feature map would be an operand.

    Example:
      >>> from sadsl.layers.linear_models import linear_attention
      >>> linear_attention(8, 2).spec
      linear()
    """
    if isinstance(feature_map, str) and feature_map not in FEATURES:
        raise ValueError(
            f"feature_map={feature_map!r} must be a function or one of "
            f"{', '.join(FEATURES)}; SparseAttention(modules=...) learns one"
        )
    width = _width(features, num_heads, head_dim)
    return LinearLayer(
        linear(feature_map, map=map), features, out_features or features,
        num_heads, num_heads, width, head_dim_v or width, conv,
        "" if conv is None else "qkv",
    )  # fmt: skip


def gated_linear_attention(
    features: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    decay_rank: int | None = 16,
    temperature: float = 16.0,
    gate: Activation | None = "silu",
    norm_eps: float = 1e-5,
    map: IndexMap | None = None,
    conv: int | None = None,
    out_features: int | None = None,
) -> LinearLayer:
    """Gated linear attention (GLA): a decay for each key channel and token.

    Yang et al., Gated linear attention transformers with hardware-efficient training,
    2024, sections 4.1 and 4.4.

    Args:
      features, num_heads: of the input, and of queries, keys and values.
      head_dim: half of ``head_dim_v`` if None.
      head_dim_v: ``features // num_heads`` if None.
      decay_rank: width of the two maps that project log-decays; one map if None.
      temperature: divides log-decays.
      gate: activation of the output gate; None for no gate.
      norm_eps: added to the mean square of the output norm.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit.

    Example:
      >>> from sadsl.layers.linear_models import gated_linear_attention
      >>> layer = gated_linear_attention(16, 2)
      >>> layer.head_dim, layer.head_dim_v, layer.parameters()["decay_in"].shape
      (4, 8, (16, 16))
    """
    values = _width(features, num_heads, head_dim_v)
    return LinearLayer(
        catalog.gla(map), features, out_features or features,
        num_heads, num_heads, head_dim or max(values // 2, 1), values,
        conv, "" if conv is None else "qkv",
        (SlowDecay(decay_rank, temperature),), OutputNorm(gate, None, norm_eps),
    )  # fmt: skip


def delta_net(
    features: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    negative: bool = False,
    gate: Activation | None = None,
    norm_eps: float = 1e-5,
    map: IndexMap | None = None,
    conv: int | None = 4,
    out_features: int | None = None,
) -> LinearLayer:
    """DeltaNet: the delta rule without decay.

    Yang et al., Parallelizing linear transformers with the delta rule over sequence
    length, 2024, section 3. Queries, keys and values pass through a convolution and
    SiLU; queries and keys are divided by their norm.

    Args:
      features, num_heads: of the input, and of queries, keys and values.
      head_dim, head_dim_v: ``features // num_heads`` if None.
      negative: whether betas reach 2 instead of 1.
      gate: activation of the output gate; None for no gate.
      norm_eps: added to the mean square of the output norm.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit.

    Example:
      >>> from sadsl.layers.linear_models import delta_net
      >>> sorted(delta_net(8, 2).parameters())
      ['beta', 'conv', 'key', 'norm', 'out', 'query', 'value']
    """
    width = _width(features, num_heads, head_dim)
    return LinearLayer(
        catalog.delta_net(map), features, out_features or features,
        num_heads, num_heads, width, head_dim_v or width, conv, "qkv",
        (WriteStrength(negative),), OutputNorm(gate, None, norm_eps),
    )  # fmt: skip


def gated_delta_net(
    features: int,
    num_heads: int,
    *,
    num_v_heads: int | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    negative: bool = False,
    gate: Activation | None = "silu",
    norm_eps: float = 1e-6,
    map: IndexMap | None = None,
    conv: int | None = 4,
    out_features: int | None = None,
) -> LinearLayer:
    """Gated DeltaNet: the delta rule with a decay for each head and token.

    Yang, Kautz, Hatamizadeh, Gated delta networks: improving Mamba2 with delta rule,
    2024, section 3. With ``features=2048, num_heads=16, num_v_heads=32, head_dim=128``
    it is the linear layer of Qwen3-Next.

    Args:
      features: of the input.
      num_heads, num_v_heads: heads of queries and keys, and of values: a multiple; as
        many if None.
      head_dim, head_dim_v: ``features // num_heads`` if None; values as keys.
      negative: whether betas reach 2 instead of 1, as in OLMo-Hybrid.
      gate: activation of the output gate; None for no gate.
      norm_eps: added to the mean square of the output norm.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit.

    Example:
      >>> from sadsl.layers.linear_models import gated_delta_net
      >>> layer = gated_delta_net(8, 2, num_v_heads=4)
      >>> layer.spec, layer.parameters()["value"].shape
      (delta(decay='g'), (8, 4, 4))
    """
    width = _width(features, num_heads, head_dim)
    return LinearLayer(
        catalog.gated_delta_net(map), features, out_features or features,
        num_heads, num_v_heads or num_heads, width, head_dim_v or width, conv, "qkv",
        (DecayGate(), WriteStrength(negative)), OutputNorm(gate, None, norm_eps),
    )  # fmt: skip


def kimi_delta(
    features: int,
    num_heads: int,
    *,
    num_v_heads: int | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    low_rank: bool = True,
    lower: float | None = None,
    gate: Activation | None = "sigmoid",
    norm_eps: float = 1e-5,
    map: IndexMap | None = None,
    conv: int | None = 4,
    out_features: int | None = None,
) -> LinearLayer:
    """Kimi delta attention (KDA): the delta rule with a decay for each key channel.

    Kimi Team, Kimi Linear: an expressive, efficient attention architecture, 2025,
    sections 3 and 4. With ``low_rank=False, lower=-5.0, norm_eps=1e-6`` it is the
    linear layer of Ling-3.

    Args:
      features: of the input.
      num_heads, num_v_heads: heads of queries and keys, and of values: a multiple; as
        many if None.
      head_dim, head_dim_v: ``features // num_heads`` if None; values as keys.
      low_rank: whether log-decays and the output gate are projected by two maps of
        width ``head_dim``, instead of one.
      lower: the least log-decay of a step; None for no bound.
      gate: activation of the output gate; None for no gate.
      norm_eps: added to the mean square of the output norm.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit.

    Example:
      >>> from sadsl.layers.linear_models import kimi_delta
      >>> layer = kimi_delta(8, 2)
      >>> layer.spec, layer.parameters()["decay"].shape
      (delta(decay='g', by='channel'), (4, 2, 4))
    """
    width = _width(features, num_heads, head_dim)
    rank = width if low_rank else None
    return LinearLayer(
        catalog.kimi_delta(map), features, out_features or features,
        num_heads, num_v_heads or num_heads, width, head_dim_v or width, conv, "qkv",
        (DecayGate(True, rank, lower), WriteStrength()),
        OutputNorm(gate, rank, norm_eps),
    )  # fmt: skip


def light_net(
    features: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    gate_rank: int | None = 128,
    norm_eps: float = 1e-5,
    map: IndexMap | None = None,
    conv: int | None = None,
    out_features: int | None = None,
) -> LinearLayer:
    """LightNet: each key channel takes a softmax over the tokens.

    Qin et al., You only scan once: efficient multi-dimension sequential modeling with
    LightNet, 2024. Only queries pass through SiLU; the norm is over all heads together.
    With ``map=full()`` it reads tokens of any order, such as those of an image.

    Args:
      features, num_heads: of the input, and of queries, keys and values.
      head_dim: ``features // num_heads`` if None; published: 128.
      head_dim_v: ``features // num_heads`` if None.
      gate_rank: width of the two maps of the output gate; one map if None.
      norm_eps: added to the mean square of the output norm.
      map, conv, out_features: as the file says.

    Raises:
      ValueError: sizes do not fit.

    Example:
      >>> from sadsl.layers.linear_models import light_net
      >>> light_net(8, 2).spec
      linear('identity', normalise='channel', scaled=True)
    """
    width = _width(features, num_heads, head_dim_v)
    return LinearLayer(
        catalog.light_net(map), features, out_features or features,
        num_heads, num_heads, head_dim or width, width, conv, "q",
        norm=OutputNorm("silu", gate_rank, norm_eps, "all"),
    )  # fmt: skip
