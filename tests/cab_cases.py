"""Every mechanism of the catalogue, and every kind of term, as a call on q, k and v.

To add one: a ``Case`` of ``published`` or ``content_cases`` is here by itself. What
has no row there is an ``Entry`` of ``OTHERS`` or ``TERMS``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import content_cases
import jax
import jax.numpy as jnp
import numpy as np
import published
from content_cases import centroids, drawn, modality, nothing

import sadsl as sa
from sadsl import catalog

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Entry(NamedTuple):
    """A call of attention, and the sizes that it is made for.

    ``operands(q, k)`` makes the run-time arrays from NumPy ``q`` and ``k``, row by row.
    ``attend(q, k, v, given)`` is the call; that of ``spec``, unless that is None.
    """

    name: str
    attend: Callable[..., Any]
    operands: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]] = nothing
    n: int = 48
    num_heads: int = 2
    head_dim: int = 8
    spec: Any = None


def of_spec(spec: Any) -> Callable[..., Any]:
    """The call of a spec."""

    def attend(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
        return sa.attention(q, k, v, spec, operands=given, impl="reference")

    return attend


def entry(name: str, spec: Any, operands: Any = nothing, **sizes: int) -> Entry:
    """An entry of a spec."""
    return Entry(name, of_spec(spec), operands, spec=spec, **sizes)


# --- run-time arrays ---


def gates(count: int) -> Callable[..., Mapping[str, Any]]:
    """Gates of each query, from its own features."""
    return lambda q, k: {"gates": 1 / (1 + np.exp(-q[..., :count]))}


def block_means(x: np.ndarray, block: int) -> np.ndarray:
    """Means over blocks of positions; the last block may be short."""
    starts = range(0, x.shape[1], block)
    return np.stack([x[:, s : s + block].mean(axis=1) for s in starts], axis=1)


def block_gate(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """A gate over blocks of 8 tokens: a causal softmax of their mean products."""
    x, y = block_means(q, 8), block_means(k, 8)
    scores = np.exp(np.einsum("bihd,bjhd->bhij", x, y))
    scores *= np.tri(x.shape[1], y.shape[1])
    return {"gate": scores / scores.sum(axis=-1, keepdims=True)}


def importance(term: Any) -> Callable[..., Mapping[str, Any]]:
    """The scores of blocks that NSA computes from its compressed branch."""

    def scores(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
        wide = jnp.asarray(q), jnp.asarray(k)
        return {"importance": catalog.nsa_importance(*wide, term, block=8)}

    return scores


def both(*makers: Callable[..., Mapping[str, Any]]) -> Callable[..., Any]:
    """The arrays of several makers."""
    return lambda q, k: {n: x for make in makers for n, x in make(q, k).items()}


# --- calls that are functions of the catalogue ---


def dynamic_mask_attention(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
    heads, dim = k.shape[2:]
    weights = jnp.asarray(drawn(heads * dim, heads)), jnp.ones(heads)
    return catalog.dynamic_mask_attention(
        q, k, v, weights, catalog.dynamic_mask(9), impl="reference"
    )


def delta_llm(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
    return catalog.delta_llm(q, k, v, theta=0.5, window=3, impl="reference")


def performer(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
    phi = catalog.favor_features(jax.random.key(0), q.shape[3], 16)
    given = {**given, "phi": phi}
    return sa.attention(q, k, v, catalog.performer(), operands=given, impl="reference")


def hyper_attention(how: catalog.Hyper) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
        # One draw for all, as the two sides of a comparison differ in their length.
        draws = catalog.draw_hyper(jax.random.key(0), q[:1], k, how)
        batched = tuple(
            jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in draws.samples
        )
        draws = draws._replace(samples=batched)
        return catalog.hyper_attention(q, k, v, draws, how, impl="reference")

    return attend


def recurrent(spec: Any) -> Entry:
    """The entry of a recurrence; its decays, betas and vectors come from the keys."""

    def operands(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
        found = {}
        for name, axes in spec.operands.items():
            if name == spec.decay:
                x = -np.log1p(np.exp(k))
                found[name] = x if axes == 3 else x[..., 0]
            elif name == getattr(spec, "beta", None):
                found[name] = 1 / (1 + np.exp(-k[..., 1]))
            elif name == getattr(spec, "bonus", None):
                found[name] = drawn(*k.shape[2:])
            else:
                found[name] = 0.3 * k
        return found

    return entry("", spec, operands)


def two_keys(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
    """Each token writes its key and value, and then the key turned round."""
    k, v = (jnp.stack([x, x[..., ::-1]], 2) for x in (k, v))
    k, v = (x.reshape(len(x), -1, *x.shape[3:]) for x in (k, v))
    given = {**given, "beta": jnp.repeat(given["beta"], 2, axis=1)}
    spec = catalog.gated_delta_product()
    return sa.attention(q, k, v, spec, operands=given, impl="reference")


RECURRENT = {
    "light_net": catalog.light_net(),
    "light_net both ways": catalog.light_net(sa.full()),
    "hebbian": catalog.hebbian(),
    "ret_net": catalog.ret_net(2),
    "minimax_lightning": catalog.minimax_lightning(2),
    "gla": catalog.gla(),
    "hgrn2": catalog.hgrn2(),
    "rwkv6": catalog.rwkv6(),
    "mamba2": catalog.mamba2(),
    "delta_net": catalog.delta_net(),
    "gated_delta_net": catalog.gated_delta_net(),
    "kimi_delta": catalog.kimi_delta(),
    "comba": catalog.comba(),
    "rwkv7": catalog.rwkv7(),
    "precond_kda": catalog.precond_kda(),
}
HYPER = partial(catalog.Hyper, block=8, samples=8, bits=3, min_seq_len=12)
NSA = {"block": 8, "length": 6, "stride": 4, "window": 5}
SCORED = catalog.native_sparse_attention(4, score="importance", **NSA)
# A few more columns and offsets than those that are always kept.
FEW = {"vertical": 40, "slash": 110}

OTHERS: tuple[Entry, ...] = (
    entry("combiner_fixed", catalog.combiner_fixed(8)),
    entry("combiner_fixed both ways", catalog.combiner_fixed(8, causal=False)),
    entry("combiner_logsparse", catalog.combiner_logsparse()),
    entry("combiner_axial_vertical", catalog.combiner_axial_vertical(6)),
    entry("combiner_axial_horizontal", catalog.combiner_axial_horizontal(6)),
    entry("combiner_axial_rowmajor", catalog.combiner_axial_rowmajor(6, key="wsum")),
    entry("combiner_mixture", catalog.combiner_mixture(6)),
    entry("combiner_mixture code", catalog.combiner_mixture(6, "code")),
    entry("routing_combiner", catalog.routing_combiner(3), centroids),
    entry("routing_combiner both ways", catalog.routing_combiner(3, False), centroids),
    entry("davit_channel", catalog.davit_channel()),
    entry("linear_and_window", catalog.linear_and_window(5), gates(2)),
    entry("native_sparse_attention", catalog.native_sparse_attention(4, **NSA),
          gates(3)),
    entry("native_sparse_attention by importance", SCORED,
          both(gates(3), importance(SCORED.terms[0]))),
    Entry("delta_llm", delta_llm),
    Entry("performer", performer),
    *(recurrent(spec)._replace(name=name) for name, spec in RECURRENT.items()),
    recurrent(catalog.gated_delta_net())._replace(
        name="gated_delta_product", attend=two_keys
    ),
    Entry("dynamic_mask_attention", dynamic_mask_attention),
    Entry("hyper_attention", hyper_attention(HYPER())),
    Entry("hyper_attention causal", hyper_attention(HYPER(causal=True))),
    entry("routing_transformer",
          catalog.routing_transformer(2, 3, window=12, local_window=8, num_local=1),
          lambda q, k: {"centroids": drawn(1, 3, q.shape[3])}),
    entry("minference", catalog.minference(**FEW, last=5), n=192),
    entry("mminference_q_boundary", catalog.mminference_q_boundary(**FEW), modality,
          n=192),
    entry("mminference_2d_boundary", catalog.mminference_2d_boundary(**FEW), modality,
          n=192),
)  # fmt: skip

TERMS: tuple[Entry, ...] = (
    entry("full", sa.full()),
    entry("causal", sa.causal()),
    entry("window on both sides", sa.window(5, 5)),
    entry("heads", sa.heads((sa.causal() & sa.window(9), 1), (sa.full(), 1))),
    entry("average", sa.average(sa.causal() & sa.window(9), sa.causal())),
    entry("linear", sa.linear()),
    entry("linear with decay", sa.linear(decay=0.9)),
    entry("linear full", sa.linear(map=sa.full())),
    entry("delta", sa.delta(0.8, 0.9)),
    entry("delta full", sa.delta(0.8, map=sa.full())),
    entry("local_linear", sa.local_linear(sa.causal(), 0.5)),
    entry("compressed", sa.compressed(8, 4)),
    entry("compressed both ways", sa.compressed(8, 4, causal=False)),
    entry("summaries", sa.summaries(sa.spans(8), pool="mean")),
    entry("scatter_mean", sa.scatter_mean(sa.causal() & sa.kmeans(3, 12)), centroids),
    entry("channel", sa.channel()),
)

# Mechanisms whose row is one of ``content_cases``, by a selection at small sizes.
SELECTION_OF = {
    "anchor_attention": "stripes",
    "dhsa": "chunk_budget",
    "dynamic_mask": "key_topw",
    "flex_prefill": "vertical_slash_mass",
    "hip": "descent",
    "snapkv": "kept_keys",
}

# Functions of the catalogue that are not attention: what they make or measure.
NO_ATTENTION = {
    "FavorFeatures": "features of performer",
    "Hyper": "options of hyper_attention",
    "favor_features": "features of performer",
    "draw_hyper": "random parts of hyper_attention",
    "minference_candidates": "maps to search among",
    "mminference_candidates": "maps to search among",
    "nsa_importance": "scores of blocks",
    "preconditioned_keys": "keys of precond_kda",
    "reference_keys": "keys of delta_llm",
    "sparsifiner_loss": "a loss",
    "sqa": "head counts of a layer",
    "value_bias": "a bias of keys",
}


def by_positions() -> list[Entry]:
    """The table of ``published``, at the 60 positions that each case has a size for."""
    return [
        entry(case.name, case.make(size), n=case.length(size), num_heads=case.heads)
        for case in published.CASES
        for size in case.sizes[1:2]
    ]


def by_content() -> list[Entry]:
    """The table of ``content_cases``."""
    found = []
    mechanism = {row: name for name, row in SELECTION_OF.items()}
    for row, case in content_cases.CASES.items():
        name = f"{row} ({mechanism[row]})" if row in mechanism else row
        gate = case.operands is content_cases.block_gate
        operands = block_gate if gate else case.operands
        sizes = case.n, case.num_heads, case.head_dim
        found.append(Entry(name, of_spec(case.spec), operands, *sizes, case.spec))
    return found


def tables() -> dict[str, list[Entry]]:
    """All entries, by the title of their table."""
    return {
        "Mechanisms that positions decide": by_positions(),
        "Selections, and mechanisms that content decides": by_content(),
        "Mixtures, and mechanisms with options of their own": list(OTHERS),
        "Terms": list(TERMS),
    }


def every() -> dict[str, Entry]:
    """All entries by name."""
    return {x.name: x for entries in tables().values() for x in entries}
