"""Finds the heads that copy from far back, by where they look while a model copies.

Wu et al., Retrieval head mechanistically explains long-context factuality, 2024. Their
code takes whole attention matrices. Here only the greatest score of the rows in
question is looked for, in strips of keys, so no array of all pairs is made.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int64

from lowering import ir
from lowering.expr import evaluate, fits, heads
from lowering.ranges import verify
from sadsl.maps.base import IndexMap, per_head
from sadsl.maps.named import causal
from sadsl.run import checks
from sadsl.run.call import select
from sadsl.run.operands import operand_arrays, with_batch_axis
from sadsl.selections.base import operands_of
from sadsl.terms.base import Spec
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

# Keys of a strip: the scores of a head are [rows, STRIP].
STRIP = 4096
CAUSAL = causal()


class LayerInputs(NamedTuple):
    """What the attention of a layer is called with.

    Attributes:
      q, k: ``[batch, seq, heads, head_dim]``, with positions already in them.
      spec: a map, or softmax of a map without a bias.
      operands: the run-time arrays that the spec reads, as for ``sadsl.attention``.
    """

    q: Float[Array, "batch seq num_q_heads head_dim"]
    k: Float[Array, "batch seq num_kv_heads head_dim"]
    spec: Spec | str = CAUSAL
    operands: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class NeedleRun:
    """A text with a needle in it, and the answer that a model generated after it.

    Attributes:
      tokens: the prompt and then the answer, integers ``[seq]``.
      needle: start and stop of the needle's positions.
      answer: the position of the first generated token; the others follow to the end.
      layers: the inputs of each layer on these tokens, of batch 1.
    """

    tokens: np.ndarray
    needle: tuple[int, int]
    answer: int
    layers: Sequence[LayerInputs]

    def __post_init__(self) -> None:
        n, (start, stop) = len(self.tokens), self.needle
        if not 0 <= start < stop <= self.answer < n:
            raise ValueError(
                f"needle={self.needle} and answer={self.answer} with {n} tokens: the "
                "needle must be a span before the answer, which must be a position "
                "of the tokens"
            )

    @property
    def recall(self) -> float:
        """The share of the needle's tokens that the answer has, as ROUGE-1 counts."""
        needle = Counter(self.tokens[slice(*self.needle)].tolist())
        common = needle & Counter(self.tokens[self.answer :].tolist())
        return common.total() / needle.total()


def top_keys(
    inputs: LayerInputs, rows: Sequence[int], *, strip: int = STRIP
) -> Int64[np.ndarray, "batch num_q_heads rows"]:
    """The key with the greatest weight, for some queries of each head.

    Only keys that the map shows to a query count; ties go to the lower key. A query
    that sees no key has -1. Memory is that of ``rows * strip`` scores.

    Args:
      inputs: queries, keys and the spec of a layer.
      rows: positions of queries.
      strip: keys whose scores are computed at once.

    Raises:
      ValueError: a row is no position of a query, ``strip`` is less than 1, or the
        arrays and the spec do not fit.
      NotImplementedError: the spec is no softmax over one map, or adds a bias.

    Example:
      >>> import jax.numpy as jnp, sadsl as sa
      >>> from sadsl.analysis.retrieval_heads import LayerInputs, top_keys
      >>> k = jnp.array([1.0, 3.0, 2.0, 9.0]).reshape(1, 4, 1, 1)
      >>> inputs = LayerInputs(jnp.ones((1, 4, 1, 1)), k, sa.causal() & sa.window(1))
      >>> top_keys(inputs, [0, 2, 3]).tolist()
      [[[0, 1, 3]]]
    """
    of_map, q, k = _map_of(inputs.spec), np.asarray(inputs.q), np.asarray(inputs.k)
    checks.problem(inputs.q, inputs.k, inputs.k, 0)
    at = np.asarray(rows, np.int64)
    if at.size and not 0 <= at.min() <= at.max() < q.shape[1]:
        raise ValueError(f"rows={rows} must be positions of {q.shape[1]} queries")
    if strip < 1:
        raise ValueError(f"strip={strip} must be at least 1")
    operands = _operands(of_map, inputs)
    tests = _tests(of_map, q.shape[1], k.shape[1], q.shape[2])
    queries = np.swapaxes(q[:, at], 1, 2).astype(np.float64)
    keys = np.repeat(np.swapaxes(k, 1, 2), q.shape[2] // k.shape[2], axis=1)
    best = np.full(queries.shape[:3], -1)
    top = np.full(best.shape, -np.inf)
    for start in range(0, k.shape[1], strip):
        part = keys[:, :, start : start + strip].astype(np.float64)
        pairs = at[:, None], start + np.arange(part.shape[2])[None, :]
        seen = _seen(tests, pairs, operands, len(q))
        scores = np.where(seen, queries @ np.swapaxes(part, 2, 3), -np.inf)
        found = scores.max(axis=-1)
        best = np.where(found > top, start + scores.argmax(axis=-1), best)
        top = np.maximum(top, found)
    return best


def _seen(
    tests: tuple[ir.Pred, ...],
    pairs: tuple[np.ndarray, np.ndarray],
    operands: Mapping[str, np.ndarray],
    batch: int,
) -> np.ndarray:
    """Which pairs are seen: bool ``[batch, heads, rows, strip]``."""
    shape = len(pairs[0]), pairs[1].shape[1]
    found = np.empty((batch, len(tests), *shape), bool)
    for b in range(batch):
        mine = {name: x[b if len(x) > 1 else 0] for name, x in operands.items()}
        for head, test in enumerate(tests):
            found[b, head] = evaluate.evaluate(test, evaluate.NumPy(*pairs, head, mine))
    return found


def needle_scores(run: NeedleRun) -> Float[np.ndarray, "layers heads"]:
    """How much of the needle each head copied, in one run.

    A head has a hit where its top key is a position of the needle and the token there
    is the one that is generated. Its score is the number of hits, counted for each
    generated token, over the length of the needle (Wu et al., 2024, section 2).

    Args:
      run: the tokens, where needle and answer are, and the inputs of all layers.
    """
    generated = run.tokens[run.answer :]
    # A token is generated by the query at the position before it.
    rows = range(run.answer - 1, len(run.tokens) - 1)
    start, stop = run.needle
    scores = []
    for layer in run.layers:
        top = top_keys(layer, rows)[0]
        inside = (start <= top) & (top < stop)
        hits = inside & (run.tokens[top] == generated[None, :])
        scores.append(hits.sum(axis=1) / (stop - start))
    return np.array(scores)


def retrieval_scores(
    runs: Sequence[NeedleRun] | Iterator[NeedleRun], *, least_recall: float = 0.5
) -> Float[np.ndarray, "layers heads"]:
    """The mean of ``needle_scores`` over runs, at several lengths and depths.

    Wu et al., Retrieval head mechanistically explains long-context factuality, 2024.

    Args:
      runs: needle runs, all of one model.
      least_recall: runs whose answer has a smaller share of the needle do not count.

    Raises:
      ValueError: in no run does the model answer well enough.
    """
    found = [needle_scores(run) for run in runs if run.recall >= least_recall]
    if not found:
        raise ValueError(
            f"least_recall={least_recall}: no answer has that share of its needle, so "
            "nothing shows which heads copy: train the model further, or lower it"
        )
    return np.mean(found, axis=0)


def retrieval_plan(
    scores: Float[np.ndarray, "layers heads"],
    local: IndexMap,
    *,
    dense: IndexMap = CAUSAL,
    threshold: float = 0.1,
) -> tuple[IndexMap, ...]:
    """A head plan: retrieval heads see ``dense``, all others ``local``.

    Use it as ``SparseAttention(spec=plan, layer=i)``; ``sadsl.write_head_plan`` makes
    text of it.

    Args:
      scores: those of ``retrieval_scores``.
      local: the map of all other heads, such as ``catalog.streaming()``.
      dense: the map of retrieval heads.
      threshold: the least score of a retrieval head. 0.1 is said to be the paper's; it
        was not verified.

    Example:
      >>> import numpy as np, sadsl as sa
      >>> from sadsl.analysis.retrieval_heads import retrieval_plan
      >>> scores = np.array([[0.0, 0.6], [0.0, 0.0]])
      >>> retrieval_plan(scores, sa.causal() & sa.window(8))
      (per_head(causal() & window(8), causal()), causal() & window(8))
    """
    layers = []
    for row in np.asarray(scores) >= threshold:
        maps = [dense if is_retrieval else local for is_retrieval in row]
        layers.append(maps[0] if len(set(maps)) == 1 else per_head(*maps))
    return tuple(layers)


def _map_of(spec: Spec | str) -> IndexMap:
    """The one map of a spec whose weights grow with the product of query and key.

    Raises:
      NotImplementedError: it is another kind of spec.
    """
    term = any_term(spec)
    if not isinstance(term, Softmax) or term.bias is not None:
        raise NotImplementedError(
            f"{term!r}: the top key is defined here for softmax over a map without a "
            "bias: give such a spec"
        )
    return term.map


def _tests(
    of_map: IndexMap, q_seq_len: int, kv_seq_len: int, num_heads: int
) -> tuple[ir.Pred, ...]:
    """The predicate of each head at these lengths."""
    node = ir.substitute(of_map.node, {"n": ir.Const(kv_seq_len)})
    nodes = heads.per_head(node, num_heads)
    verify.verify(nodes, q_seq_len, kv_seq_len)
    known = fits.known_of(q_seq_len, kv_seq_len, num_heads)
    return tuple(fits.exact(node, known) for node in nodes)


def _operands(of_map: IndexMap, inputs: LayerInputs) -> dict[str, np.ndarray]:
    """The arrays that a map reads, ``[batch or 1, ...]``, with what content chose."""
    given = dict(inputs.operands or {})
    chosen = select(of_map, inputs.q, inputs.k, operands=given)
    names = set(ir.operand_names(of_map.node)) - set(chosen)
    read = operand_arrays({name: x for name, x in given.items() if name in names})
    missing = names - set(read)
    if missing:
        raise ValueError(
            f"{of_map!r} reads {min(missing)!r}, which was not given: pass it in the "
            "operands of the layer"
        )
    found = with_batch_axis(read, operands_of(of_map), len(inputs.q))
    return {name: np.asarray(x, np.int64) for name, x in {**found, **chosen}.items()}
