"""The layers of published models that choose keys by an indexer.

Each function gives an ``IndexedLayer``. It takes the features of the input, the number
of query heads, and ``spec``: that of one layer of ``sadsl.catalog.models``, by which
layers of one model differ; a layer with a full map or a reused choice has no indexer.
Sizes that were published are the defaults. Options that all have: ``spec`` (a layer of
the model that chooses if None), ``index_heads`` and ``index_dim`` (heads and channels
of index queries), and ``out_features`` (as many as ``features`` if None).

What is not here: YaRN, quantisation, and packed documents: eligible pairs are static.
"""

from dataclasses import dataclass

from sadsl.catalog import models
from sadsl.layers.entry_core import EntryCore
from sadsl.layers.indexed import IndexedLayer
from sadsl.layers.indexed_cores import GroupedCore, LatentCore
from sadsl.layers.indexers import Indexer, PooledKeys
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec

LAYER_NORM = RowNorm("layer")
GEMMA_NORM = RowNorm(plus_one=True)


@dataclass(frozen=True)
class LatentDims:
    """Channels of multi-head latent attention.

    Attributes:
      rank, q_rank: of the latents; queries are projected at full rank if None.
      head_dim: channels of a key that are made of the latent.
      turned: channels of the rotated part of a key; 0 for none.
      head_dim_v: channels of a value.
    """

    rank: int
    q_rank: int | None
    head_dim: int
    turned: int
    head_dim_v: int

    def core(self, num_heads: int, rotary: Rotary | None) -> LatentCore:
        """The core; ``rotary`` is of the rotated part."""
        return LatentCore(
            num_heads, self.rank, self.head_dim, self.head_dim_v, self.q_rank, rotary
        )


def deepseek_v32(
    features: int,
    num_heads: int = 128,
    *,
    spec: Spec | None = None,
    dims: LatentDims = LatentDims(512, 1536, 128, 64, 128),
    index_heads: int = 64,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """DeepSeek-V3.2: latents, and an indexer over single keys.

    DeepSeek-AI, DeepSeek-V3.2, 2025, section 2.1, as in transformers 5.24. Queries and
    keys rotate neighbouring channels, index arrays halves of their first channels.

    Args:
      features, num_heads: of the input, and of queries.
      spec, index_heads, index_dim, out_features: as the file says.
      dims: channels.

    Example:
      >>> from sadsl.layers.indexed_models import deepseek_v32
      >>> layer = deepseek_v32(7168)
      >>> layer.parameters()["index_query"].shape
      (1536, 64, 128)
    """
    spec = models.deepseek_v32(1)[0] if spec is None else spec
    turn = Rotary(dims.turned, "half")
    indexer = Indexer(
        index_heads, index_dim, rotary=turn,
        keys=PooledKeys(norm=LAYER_NORM, rotary=turn),
    )  # fmt: skip
    core = dims.core(num_heads, Rotary(dims.turned, "interleaved", "last"))
    return IndexedLayer(spec, features, out_features or features, core, indexer)


def glm_5(
    features: int,
    num_heads: int = 64,
    *,
    spec: Spec | None = None,
    dims: LatentDims = LatentDims(512, 2048, 192, 64, 256),
    index_heads: int = 32,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """GLM-5: as DeepSeek-V3.2, with one layout of rotation for all arrays.

    GLM-5.2 shares choices: ``models.glm_5(every=4, offset=3)``.

    Args:
      features, num_heads: of the input, and of queries.
      spec, index_heads, index_dim, out_features: as the file says.
      dims: channels.

    Example:
      >>> from sadsl.catalog import models
      >>> from sadsl.layers.indexed_models import glm_5
      >>> specs = models.glm_5(4, every=4)
      >>> ["index_query" in glm_5(6144, spec=s).parameters() for s in specs]
      [True, True, False, False]
    """
    spec = models.glm_5(1)[0] if spec is None else spec
    turn = Rotary(dims.turned, "interleaved")
    indexer = Indexer(
        index_heads, index_dim, rotary=turn,
        keys=PooledKeys(norm=LAYER_NORM, rotary=turn),
    )  # fmt: skip
    core = dims.core(num_heads, Rotary(dims.turned, "interleaved", "last"))
    return IndexedLayer(spec, features, out_features or features, core, indexer)


def glm_5_next(
    features: int,
    num_heads: int = 64,
    *,
    spec: Spec | None = None,
    dims: LatentDims = LatentDims(512, 1536, 256, 0, 256),
    index_heads: int = 32,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """GLM-5.3-Flash: the layer that chooses pools of keys; nothing is rotated.

    The index key of a pool is a mean of normed index keys, weighted by channel. The
    other layers are ``linear_models.kimi_delta``.

    Args:
      features, num_heads: of the input, and of queries.
      spec, index_heads, index_dim, out_features: as the file says.
      dims: channels; ``turned`` is 0.

    Example:
      >>> from sadsl.layers.indexed_models import glm_5_next
      >>> glm_5_next(4096).parameters()["index_key_place"].shape
      (16, 128)
    """
    spec = models.glm_5_next(4)[3] if spec is None else spec
    keys = PooledKeys(_cell(spec), gate=True, norm=LAYER_NORM, norm_first=True)
    indexer = Indexer(index_heads, index_dim, keys=keys)
    core = dims.core(num_heads, None)
    return IndexedLayer(spec, features, out_features or features, core, indexer)


def hy_v4(
    features: int,
    num_heads: int = 32,
    *,
    spec: Spec | None = None,
    dims: LatentDims = LatentDims(512, 1536, 192, 64, 256),
    index_heads: int = 16,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """HY-V4: latents with sinks and a gate; index arrays rotate their last channels.

    As in transformers 5.24. Three of four layers share a choice: ``models.hy_v4()``.

    Args:
      features, num_heads: of the input, and of queries.
      spec, index_heads, index_dim, out_features: as the file says.
      dims: channels.

    Example:
      >>> from sadsl.layers.indexed_models import hy_v4
      >>> hy_v4(4096).parameters()["sink"].shape
      (32,)
    """
    spec = models.hy_v4(1)[0] if spec is None else spec
    turn = Rotary(dims.turned, "half", "last")
    keys = PooledKeys(norm=RowNorm("layer", 1e-5), rotary=turn)
    indexer = Indexer(index_heads, index_dim, rotary=turn, keys=keys)
    core = dims.core(num_heads, turn)
    return IndexedLayer(spec, features, out_features or features, core, indexer, True)


def mistral_large_4(
    features: int,
    num_heads: int = 64,
    *,
    spec: Spec | None = None,
    dims: LatentDims = LatentDims(512, None, 64, 64, 128),
    index_heads: int = 32,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """Mistral-Large-4: temperatures by position, and a rotation of learned rates.

    As in transformers 5.24. Queries have full rank, index queries come from a layer
    norm of the input. A learned factor of each rate starts at 1, and so does the
    temperature of each head, whatever the position. Every fourth layer rotates nothing:
    ``dims=LatentDims(512, None, 128, 0, 128)``.

    Args:
      features, num_heads: of the input, and of queries.
      spec, index_heads, index_dim, out_features: as the file says.
      dims: channels.

    Example:
      >>> from sadsl.layers.indexed_models import mistral_large_4
      >>> layer = mistral_large_4(8192)
      >>> [n for n in layer.parameters() if "log" in n]
      ['log_scale', 'log_bias', 'index_log_scale', 'index_log_bias']
    """
    spec = models.mistral_large_4(1)[0] if spec is None else spec
    of_core = of_index = None
    if dims.turned:
        of_core = Rotary(dims.turned, "interleaved", "last", learned=True)
        of_index = Rotary(dims.turned, "interleaved", learned=True)
    indexer = Indexer(
        index_heads, index_dim, "norm", rotary=of_index, log_scale=True,
        keys=PooledKeys(norm=LAYER_NORM, rotary=of_index),
    )  # fmt: skip
    core = dims.core(num_heads, of_core)
    return IndexedLayer(
        spec, features, out_features or features, core, indexer,
        starts=(("log_bias", 1.0),),
    )  # fmt: skip


def minimax_m3(
    features: int,
    num_heads: int = 64,
    num_kv_heads: int = 4,
    *,
    head_dim: int = 128,
    turned: int = 64,
    spec: Spec | None = None,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """MiniMax-M3: each key head chooses blocks, by an index head of its own.

    As in transformers 5.24, whose index has no loss: that of this layer is the loss of
    blocks in ``indexed_loss``. A score is the bare product of an index query and the
    one index key, both normed and rotated.

    Args:
      features, num_heads, num_kv_heads: of the input, of queries, and of keys.
      head_dim, turned: channels of a head, and how many of them rotate.
      spec, index_dim, out_features: as the file says.

    Example:
      >>> from sadsl.layers.indexed_models import minimax_m3
      >>> minimax_m3(6144).parameters()["index_query"].shape
      (6144, 4, 128)
    """
    spec = models.minimax_m3(4)[3] if spec is None else spec
    turn = Rotary(turned, "half")
    indexer = Indexer(
        num_kv_heads, index_dim, "input", GEMMA_NORM, turn,
        PooledKeys(norm=GEMMA_NORM, rotary=turn), scale=1.0,
    )  # fmt: skip
    core = GroupedCore(num_heads, num_kv_heads, head_dim, GEMMA_NORM, turn)
    return IndexedLayer(spec, features, out_features or features, core, indexer)


def qwen4_exp(
    features: int,
    num_heads: int = 16,
    num_kv_heads: int = 2,
    *,
    head_dim: int = 256,
    turned: int = 64,
    spec: Spec | None = None,
    index_heads: int = 4,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """Qwen4-Exp: the layer that chooses blocks of four tokens by their mean index key.

    As in transformers 5.24. The mean is normed and then rotated at the first token of
    the block. The other layers are ``linear_models.gated_delta_net``.

    Args:
      features, num_heads, num_kv_heads: of the input, of queries, and of keys.
      head_dim, turned: channels of a head, and how many of them rotate.
      spec, index_heads, index_dim, out_features: as the file says.

    Example:
      >>> from sadsl.layers.indexed_models import qwen4_exp
      >>> layer = qwen4_exp(2048)
      >>> layer.indexer.keys.length, layer.gate, "index_weight" in layer.parameters()
      (4, True, False)
    """
    spec = models.qwen4_exp(4)[3] if spec is None else spec
    turn = Rotary(turned, "half")
    keys = PooledKeys(_cell(spec), norm=GEMMA_NORM, rotary=turn)
    indexer = Indexer(index_heads, index_dim, "input", GEMMA_NORM, turn, keys)
    core = GroupedCore(num_heads, num_kv_heads, head_dim, GEMMA_NORM, turn)
    return IndexedLayer(spec, features, out_features or features, core, indexer, True)


@dataclass(frozen=True)
class EntryDims:
    """Channels of a layer of DeepSeek-V4.

    Attributes:
      head_dim, turned: of a head, and how many of them rotate.
      q_rank: of the latent of queries.
      groups, out_rank: groups of heads, and what each is projected to.
    """

    head_dim: int = 512
    turned: int = 64
    q_rank: int = 1024
    groups: int = 8
    out_rank: int = 1024


def deepseek_v4(
    features: int,
    num_heads: int = 64,
    *,
    ratio: int = 4,
    k: int = 512,
    near: int = 128,
    dims: EntryDims = EntryDims(),
    index_heads: int = 64,
    index_dim: int = 128,
    out_features: int | None = None,
) -> IndexedLayer:
    """DeepSeek-V4: a window of tokens and compressed entries in one softmax.

    DeepSeek-AI, DeepSeek-V4, 2026, as in transformers 5.24 without YaRN. Entries of
    four tokens overlap, and an indexer with entries of its own chooses among them.

    Args:
      features, num_heads: of the input, and of queries.
      ratio, k, near: tokens in an entry (4, 128, or 0 for none), chosen entries, and
        keys of the window, as in ``sadsl.catalog.models.deepseek_v4``.
      dims: channels.
      index_heads, index_dim, out_features: as the file says.

    Example:
      >>> from sadsl.layers.indexed_models import deepseek_v4
      >>> layers = [deepseek_v4(4096, ratio=ratio) for ratio in (0, 4, 128)]
      >>> ["index_key" in layer.parameters() for layer in layers]
      [False, True, False]
    """
    (spec,) = models.deepseek_v4((ratio,), k, near)
    theta = 160000.0 if ratio else 10000.0
    turn = Rotary(dims.turned, "interleaved", "last", theta)
    pooled = PooledKeys(
        ratio, gate=True, overlap=ratio == 4, norm=RowNorm(), rotary=turn
    )
    core = EntryCore(
        num_heads, dims.head_dim, dims.q_rank, turn, pooled if ratio else None,
        dims.groups, dims.out_rank,
    )  # fmt: skip
    indexer = Indexer(index_heads, index_dim, rotary=turn, keys=pooled)
    return IndexedLayer(spec, features, out_features or features, core, indexer)


def _cell(spec: Spec) -> int:
    """The tokens in a cell of the choice of a spec; 1 if it makes none."""
    return next((x.block for x in selections_of(spec) if hasattr(x, "block")), 1)
