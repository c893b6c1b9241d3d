"""Models that choose keys by an indexer: DeepSeek, GLM, HY, Mistral, MiniMax, Qwen.

Each function gives one spec a layer. Index arrays are operands that a layer makes:
"iq" and "iw" of the queries, "ik" of the keys, normed and rotated as published. A
layer that shares the choice of an earlier one has ``reused(...)`` in its spec. All
schedules and sizes are those of transformers 5.24, unless a docstring says otherwise.
"""

from sadsl.catalog.delta_rules import gated_delta_net, kimi_delta
from sadsl.catalog.models.delta_hybrids import in_turn
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.named import blocks, causal, where, window
from sadsl.maps.numbers import log, weights
from sadsl.selections import dot, reused, topk
from sadsl.selections.base import Selection
from sadsl.selections.budgets import TopK
from sadsl.selections.dot_scores import Dot
from sadsl.terms.base import Spec, Term
from sadsl.terms.biases import bias
from sadsl.terms.latent import latent
from sadsl.terms.mixtures import joint
from sadsl.terms.over import over
from sadsl.terms.softmax import softmax

LIGHTNING = dot("iq", "ik", "iw", "relu")


def _chosen(k: int, eligible: IndexMap, block: int = 1) -> TopK:
    """The best cells of each query by the lightning indexer, shared by all heads."""
    return topk(
        k, block=block, block_q=1, score=LIGHTNING, scope="shared", eligible=eligible
    )


def _is_full(layer: int, every: int, offset: int) -> bool:
    return max(layer - offset + 1, 0) % every == 0


def _or_reused(choice: Selection, is_full: bool) -> Selection:
    return choice if is_full else reused(choice)


def deepseek_v32(num_layers: int = 61, k: int = 2048) -> tuple[Term, ...]:
    """DeepSeek-V3.2: each layer attends to the ``k`` keys that its indexer scores best.

    DeepSeek-AI, DeepSeek-V3.2, 2025, section 2.1: multi-head latent attention with 128
    heads, 64 index heads of 128 channels and one index key.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.

    Example:
      >>> from sadsl.catalog import models
      >>> models.deepseek_v32(1)[0]
      latent(causal() & topk(2048, block=1, block_q=1, score=dot(weights='iw',
      act='relu'), scope='shared', eligible=causal()))
    """
    at_least("deepseek_v32", "num_layers", num_layers, 1)
    return (latent(causal() & _chosen(k, causal())),) * num_layers


def glm_5(
    num_layers: int = 78, k: int = 2048, every: int = 1, offset: int = 2
) -> tuple[Term, ...]:
    """GLM-5: as DeepSeek-V3.2, with layers that share a choice.

    GLM-5.2 has ``every=4, offset=3``: three of four layers reuse the choice of the
    layer before.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.
      every: one of so many layers chooses.
      offset: layers before this number, less one, all choose.

    Example:
      >>> from sadsl.catalog import models
      >>> ["reused" in repr(x) for x in models.glm_5(7, every=4, offset=3)]
      [False, False, False, True, True, True, False]
    """
    at_least("glm_5", "num_layers", num_layers, 1)
    choice = _chosen(k, causal())
    return tuple(
        latent(causal() & _or_reused(choice, _is_full(i, every, offset)))
        for i in range(num_layers)
    )


def glm_5_next(num_layers: int = 45, k: int = 2048, pool: int = 16) -> tuple[Term, ...]:
    """GLM-5.3-Flash: three layers of Kimi delta attention, one that chooses pools.

    A query sees the best ``k // pool`` whole pools of keys and the tokens of the pool
    that is not finished. ``entries`` makes the index keys of pools, padded to all
    pools. The latents have no rotated key.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.
      pool: tokens in a pool.

    Example:
      >>> from sadsl.catalog import models
      >>> [type(x).__name__ for x in models.glm_5_next(4)]
      ['Delta', 'Delta', 'Delta', 'Latent']
    """
    indexed = latent(_pools(k, pool))
    return in_turn("glm_5_next", kimi_delta(), num_layers, 4, indexed)


def _pools(k: int, pool: int, score: Dot = LIGHTNING) -> IndexMap:
    """The best whole pools before a query, and the tokens of its unfinished pool."""
    whole = where(lambda q, k: k // pool * pool + pool <= q + 1)
    rest = where(lambda q, k: k >= (q + 1) // pool * pool)
    choice = topk(
        max(1, k // pool), block=pool, block_q=1, score=score, scope="shared",
        eligible=whole,
    )  # fmt: skip
    return causal() & (rest | choice)


def hy_v4(num_layers: int = 34, k: int = 2048) -> tuple[Term, ...]:
    """HY-V4: latents with a sink for each head; three of four layers share a choice.

    Layers 0, 1, 5, 9, ... choose.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.

    Example:
      >>> from sadsl.catalog import models
      >>> [i for i, x in enumerate(models.hy_v4()) if "reused" not in repr(x)]
      [0, 1, 5, 9, 13, 17, 21, 25, 29, 33]
    """
    at_least("hy_v4", "num_layers", num_layers, 1)
    choice = _chosen(k, causal())
    return tuple(
        latent(softmax(causal() & _or_reused(choice, i % 4 == 1 or not i), sink=True))
        for i in range(num_layers)
    )


def mistral_large_4(num_layers: int = 72, k: int = 2048) -> tuple[Term, ...]:
    """Mistral-Large-4: as DeepSeek-V3.2, with a learned temperature by position.

    The queries of head ``h`` at position ``t`` are multiplied by ``log_scale[h] * ln(t
    + 1) + log_bias[h]``. Its default shares neither choices nor latents.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.

    Example:
      >>> from sadsl.catalog import models
      >>> sorted(models.mistral_large_4(1)[0].term.operands)
      ['log_bias', 'log_scale']
    """
    at_least("mistral_large_4", "num_layers", num_layers, 1)
    factor = bias(
        lambda q, k, h: weights("log_scale")[h] * log(q + 1) + weights("log_bias")[h]
    )
    term = softmax(causal() & _chosen(k, causal()), scale=factor)
    return (latent(term),) * num_layers


def deepseek_v4(
    ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4), k: int = 512, near: int = 128
) -> tuple[Spec, ...]:
    """DeepSeek-V4-Flash: a window of tokens, and compressed entries in one softmax.

    DeepSeek-AI, DeepSeek-V4, 2026. Keys are values, with one key head and a sink for
    each head. A layer of ratio 4 sees its ``k`` best entries of four tokens (CSA),
    which an indexer over entries chooses; one of ratio 128 sees all entries (HCA);
    ratio 0 is the window alone. ``entries`` makes the entries; the layer turns the
    output back by the rotation of the query.

    Args:
      ratios: tokens in an entry, for each layer; 43 layers of V4-Flash.
      k: chosen entries of a query, 1,024 in V4-Pro.
      near: keys of the window, the query's own among them.

    Example:
      >>> from sadsl.catalog import models
      >>> print(models.deepseek_v4((128,))[0])
      joint(softmax(causal() & window(127), sink='sink'), over('entries', where(lambda
      q, k: k < (q + 1) // 128)))
    """
    tokens = softmax(causal() & window(near - 1), sink=True)

    def of(ratio: int) -> Spec:
        if not ratio:
            return tokens
        whole = where(lambda q, k: k < (q + 1) // ratio)
        # Only entries of four tokens are many enough to choose from.
        seen = whole & _chosen(k, whole) if ratio == 4 else whole
        return joint(tokens, over("entries", seen))

    return tuple(map(of, ratios))


def minimax_m3(num_layers: int = 60, k: int = 16, block: int = 128) -> tuple[Term, ...]:
    """MiniMax-M3: three full layers, then each key head chooses ``k`` blocks.

    A block counts by its greatest pair of the index head of the key head; the query's
    own block is always one of the ``k``.

    Args:
      num_layers: layers of the stack.
      k: chosen blocks of a query, its own among them.
      block: keys in a block.

    Example:
      >>> from sadsl.catalog import models
      >>> [x.map == models.minimax_m3(1)[0].map for x in models.minimax_m3(5)]
      [True, True, True, False, False]
    """
    at_least("minimax_m3", "num_layers", num_layers, 1)
    choice = topk(
        k, block=block, block_q=1, score=dot("iq", "ik"), scope="group",
        eligible=causal(), forced=blocks(block),
    )  # fmt: skip
    sparse = softmax(causal() & choice)
    return tuple(softmax(causal()) if i < 3 else sparse for i in range(num_layers))


def qwen4_exp(num_layers: int = 40, k: int = 2048, block: int = 4) -> tuple[Term, ...]:
    """Qwen4-Exp: three layers of Gated DeltaNet, one that chooses blocks of tokens.

    The index key of a block is the mean of its raw keys, normed, then rotated at its
    first position; index heads have no weights.

    Args:
      num_layers: layers of the stack.
      k: chosen keys of a query.
      block: keys in a block.

    Example:
      >>> from sadsl.catalog import models
      >>> [type(x).__name__ for x in models.qwen4_exp(4)]
      ['Delta', 'Delta', 'Delta', 'Softmax']
    """
    indexed = softmax(_pools(k, block, dot("iq", "ik", act="relu")))
    return in_turn("qwen4_exp", gated_delta_net(), num_layers, 4, indexed)
