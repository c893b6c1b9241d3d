"""Values for every function that makes a part of a spec, for the laws of text.

A function is called with the arguments that it needs, and then with another value for
each parameter.
"""

import numpy as np

import sadsl as sa
from sadsl.maps.base import IndexMap
from sadsl.maps.numbers import Real, TableNumbers, WeightsArray
from sadsl.maps.symbols import POSITIONS, OperandArray, Symbol, TableValues, Truth
from sadsl.selections.attended import Attended
from sadsl.selections.budgets import Share, Tokens, share
from sadsl.selections.cell_scores import Score, scored
from sadsl.selections.cells import Rules, rules
from sadsl.selections.dot_scores import Dot
from sadsl.selections.lsh import SortedChunks, sorted_chunks
from sadsl.selections.tiles import GridTiles, tiles
from sadsl.terms.base import Term
from sadsl.terms.biases import Bias
from sadsl.terms.features import CosformerFeatures
from sadsl.terms.regions import Partition

Q, K, H = POSITIONS["q"], POSITIONS["k"], POSITIONS["h"]
CAUSAL = sa.causal()
GRID = sa.Grid(a=4, b=6)

# How a value of each class becomes a spec.
PLACES = {
    IndexMap: lambda x: x,
    Term: lambda x: x,
    Bias: lambda x: sa.softmax(CAUSAL, bias=x),
    Partition: sa.summaries,
    Score: lambda x: sa.topk(2, score=x),
    Dot: lambda x: sa.topk(2, score=x),
    Attended: lambda x: sa.topk(2, score=x),
    Rules: lambda x: sa.topk(2, rules=x),
    Share: sa.topk,
    Tokens: sa.topk,
    GridTiles: lambda x: sa.topk(2, block=x),
    SortedChunks: lambda x: sa.lsh(4, chunks=x),
    sa.Grid: lambda x: x.axial(x.names[0]),
    OperandArray: lambda x: sa.where(lambda q, k: x[q, k] == 1),
    Truth: lambda x: sa.where(lambda q, k, h: x),
    Symbol: lambda x: sa.where(lambda q, k, h: x == 1),
    CosformerFeatures: sa.linear,
    TableValues: lambda x: sa.where(lambda q, k: x[q % 2] == 1),
    TableNumbers: lambda x: PLACES[Real](x[Q % 2]),
    WeightsArray: lambda x: PLACES[Real](x[H, Q]),
    Real: lambda x: sa.softmax(CAUSAL, bias=sa.bias(lambda q, k, h: x)),
    tuple: lambda x: sa.average(*x),
}

# Arguments without a default, by the name of the parameter.
NEEDED = {
    "left": 4, "n": 3, "start": 1, "stop": 5, "stride": 3, "right": 1, "dilation": 2,
    "size": 4, "values": (1, 4), "map": CAUSAL, "a": CAUSAL, "x": Q - K, "name": "some",
    "buckets": 4, "w": 5, "k": 2, "t": 0.5, "p": 0.5, "fraction": 0.5, "count": 128,
    "sizes": (4, 6), "tile": (2, 3), "partition": 4, "by": "mean", "num_clusters": 4,
    "term": CAUSAL, "log_weight": 0.5, "vertical": 5, "slash": 6, "mass": 0.9,
    "source": "entries", "choice": sa.topk(2),
    "prompt": 64, "capacity": 16, "queries": 1, "budget": 8, "width": 4, "block": 4,
    "order": (1, 0, 2), "window": 3, "num_blocks": 16, "local": 32, "num": 2,
    "function": lambda q, k: q - k <= 3, "of_pair": lambda q, k: 0.5 * (q - k),
    "kmeans": sa.kmeans(4, members="argmax"),
    "members": sa.where(lambda q, k: k // 4 == q),
    "seen": sa.where(lambda q, k: k < q // 4), "grid": (14, 14), "num_prefix": 5,
    "vision": (3, 64), "frame_stride": 8, "span": (1, 7), "num_positions": 9,
    "image": (2, 5), "question": (5, 9), "prefix": 2, "documents": (3, 4),
    "num_frames": 4, "tokens_per_frame": 8, "shape": (4, 8, 8), "layer": 0, "frames": 2,
    "length": 64, "cube": (2, 4, 4), "spans": ((64, 0.5), (-64, 1)), "ridge": 0.5,
}  # fmt: skip
# The same for one function, by its name.
NEEDED_OF = {
    "minimum": {"a": Q, "b": K}, "maximum": {"a": Q, "b": K}, "scatter_mean": {
        "map": sa.kmeans(4) & CAUSAL},
    "summaries": {"partition": sa.spans(4)}, "catalog.swapped_window": {
        "window": (2, 4, 4)},
    "catalog.vmoba": {"grid": (4, 8, 8), "tile": (4, 4)},
    "catalog.mminference_grid": {"vision": (0, 4096)},
    "catalog.residue_major": {"stride": 2},
    "dense_map": {"pairs": np.eye(3, dtype=bool)},
    "query_distance_bias": {"distances": "table", "channels": 2, "extent": 8},
}  # fmt: skip
# Two values for each `*args` and `**kwargs`.
SEVERAL = {
    "per_head": [(CAUSAL,), (CAUSAL, sa.full())],
    "heads": [((CAUSAL, 1),), ((CAUSAL, 1), (sa.softmax(sa.full(), 2.0), 3))],
    "terms": [(CAUSAL,), (CAUSAL, sa.weighted(sa.full(), 0.5))],
    "names": [("a",), ("a", "b")],
    "sizes": [{"h": 4}, {"h": 4, "w": 3}],
    "maps": [{"a": CAUSAL}, {"a": CAUSAL, "b": sa.window(1)}],
}
# Another value for a parameter, by its name; if there is none, it is derived.
OTHER = {
    "block_q": 32, "score": "max", "forced": sa.sinks(4), "eligible": CAUSAL,
    "rules": rules(at_least=1), "otherwise": "eligible", "of": "triangle",
    "scale": 0.25, "logits_soft_cap": 5.0,
    "sm_scale": 0.5, "decay": (0.5, 0.25), "feature_map": "relu", "key": "k_proj",
    "value": "v_proj", "phi": ("phi_q", "phi_k"), "valid": "real", "smooth": 8,
    "kind": "signs", "chunks": sorted_chunks(8), "queries": 1,
    "keys": 2, "max_chunks": 3, "slopes": (0.5, 0.25), "covers": CAUSAL,
    "order": (2, 0, 1), "x": Q + K, "a": sa.window(2), "bias": "of_keys",
    "function": lambda q, k, h: k % 3 == h, "of_pair": lambda q, k, h: 0.5 * h,
    "restart": 8, "chunk": 16, "num_local": 2, "k": 5, "term": sa.softmax(CAUSAL, 2.0),
    "map": sa.window(3), "members": sa.where(lambda q, k: k // 3 == q),
    "seen": sa.where(lambda q, k: k < q // 5), "by": "gate",
    "tile": (4, 3), "partition": 8, "sizes": (8, 6), "values": (0.5, 2.0), "p": 0.25,
    "spans": ((32, 0.5),), "dilations": (1, 2), "documents": (2, 2, 3), "ratio": 0.25,
    "shape": (28, 28), "image": (1, 5), "question": (6, 9), "vision": (3, 80),
    "ridge": "ridge", "iterations": 8,
    "variant": "xSQA", "patterns": {(0, 1): sa.full()}, "grid": (28, 14),
}  # fmt: skip
# The same for the parameter of one function. A dict also holds the arguments that the
# value needs.
OTHER_OF = {
    ("minimum", "a"): Q + 1, ("minimum", "b"): 3, ("maximum", "a"): 2,
    ("maximum", "b"): K * 2, ("isin", "values"): {3, -1}, (".isin", "values"): {3, -1},
    ("softmax", "sink"): "logit", ("Softmax", "sink"): "logit",
    ("scored", "normalise"): "softmax", ("catalog.residue_major", "span"): (2, 8),
    ("lsh", "alone"): {"alone": "causal", "share": True}, ("kmeans", "window"): 3,
    ("clusters", "kmeans"): sa.kmeans(3, members="argmax"),
    ("catalog.biformer", "regions"): 2, ("offsets", "values"): {3, -1},
    ("operand", "name"): "another", ("dense_map", "pairs"): np.tri(3, 4, dtype=bool),
    ("softmax", "values"): (0, 4), ("Softmax", "values"): (0, 4),
    ("softmax", "scale"): sa.bias(lambda q, k, h: 1 + 0.1 * sa.log(q + 1)),
    ("Softmax", "scale"): sa.bias(lambda q, k, h: sa.weights("t")[h]),
    ("query_distance_bias", "factor"): sa.bias(lambda q, k, h: 1 + 0.1 * sa.log(q)),
    ("over", "values"): "others", ("latent", "form"): "absorbed",
    ("dot", "weights"): "iw", ("dot", "act"): "relu", ("dot", "k"): "other",
    ("attended", "keys"): "short_k",
    ("reused", "choice"): sa.topk(3),
    ("softmax", "bias"): sa.alibi(), ("Softmax", "bias"): sa.t5_bias() + sa.alibi(),
    ("scatter_mean", "map"): sa.kmeans(4), ("scatter_mean", "own_key"): "alone",
    ("topk", "k"): share(0.5, plus=1, of="eligible"), ("topk", "score"): scored(
        "mean", normalise="minmax", scale=2.0), ("mass", "score"): "mean",
    ("topk", "block"): tiles((4, 6), (2, 3)), ("threshold", "t"): float("-inf"),
    ("within", "partition"): tiles((4, 6), (2, 3)), ("topk", "scope"): "overall",
    ("spans", "own"): {"own": True, "causal": False},
    ("catalog.combiner_fixed", "own"): {"own": True, "causal": False},
    ("rows", "part"): {"part": "before", "causal": False},
    ("channel", "scale"): "tokens",
    ("summaries", "partition"): sa.columns(4), ("rowmajor", "key"): "none",
    ("rowmajor", "proj"): "other", ("lsh", "buckets"): 8,
    ("t5_bias", "bidirectional"): True, ("t5_bias", "max_distance"): 64,
    ("weighted", "term"): sa.softmax(sa.window(3), 2.0), ("rules", "at_least"): 2,
    ("linear", "map"): sa.full(), ("kmeans", "members"): {"members": "argmax"},
    ("catalog.nsa_topk", "score"): "gate", ("heads", "parts"): None,
    ("catalog.combiner_axial_rowmajor", "key"): "none", (".product", "extra"): 2,
    ("catalog.linear_and_window", "decay"): "decay", ("regions", "num"): 3,
    ("catalog.neighborhood", "shape"): (28, 56),
    ("catalog.neighborhood", "window"): (5, 7),
    ("catalog.neighborhood", "stride"): (1, 2),
    ("catalog.neighborhood", "dilation"): (1, 2),
    ("catalog.neighborhood", "causal"): (True, False),
    (".neighborhood", "causal"): (False, True), (".neighborhood", "window"): (2, 3),
    (".neighborhood", "stride"): (2, 1), (".neighborhood", "dilation"): (1, 2),
    ("catalog.routing_transformer", "variant"): "lucidrains",
    ("catalog.swapped_window", "shape"): (8, 8, 8),
    ("catalog.swapped_window", "window"): (4, 4, 4),
    ("catalog.vmoba", "grid"): (8, 8, 8), ("catalog.vmoba", "layer"): 1,
    ("catalog.vmoba", "tile"): {"tile": (2, 4), "layer": 1},
    ("catalog.vmoba", "cube"): {"cube": (4, 4, 4), "layer": 2},
    ("catalog.vmoba", "k"): {"k": 3}, ("catalog.residue_major", "a"): sa.window(2),
    ("catalog.mminference_grid", "block"): 100,
    ("catalog.mminference_grid", "vision"): (64, 4096),
    ("catalog.power_attention", "block"): 128, (".lift", "block"): 5,
    ("catalog.native_sparse_attention", "score"): "gate",
    ("linear", "feature_map"): "phi", ("linear", "normalise"): "channel",
    ("linear", "by"): {"by": "channel", "decay": "g"},
    ("linear", "read"): {"read": "before", "normalise": False},
    ("linear", "bonus"): {"bonus": "u", "read": "before", "normalise": False},
    ("delta", "by"): {"by": "channel", "decay": "g"}, ("delta", "map"): sa.full(),
    ("delta", "beta"): 0.5, ("delta", "erase"): "p",
    ("delta", "write"): {"write": "b", "erase": "a", "beta": None},
    ("catalog.residue_major", "num_positions"): 12,
    ("catalog.minimax_lightning", "layer"): 1,
    ("catalog.minimax_lightning", "num_layers"): {"num_layers": 4, "layer": 1},
    ("catalog.hebbian", "decay"): {"decay": 0.5, "rule": "decay"},
    ("catalog.hebbian", "beta"): {"beta": 0.5, "rule": "delta"},
}  # fmt: skip
OTHER_OF |= {
    (f"catalog.{name}", "map"): CAUSAL & sa.segments()
    for name in (
        "comba", "delta_net", "gated_delta_net", "gated_delta_product", "gla",
        "hebbian", "hgrn2", "kimi_delta", "light_net", "mamba2", "minimax_lightning",
        "precond_kda", "ret_net", "rwkv7",
    )
}  # fmt: skip


# Parameters that accept only one value; it exists because other functions accept more.
ONE_VALUE = {("catalog.combiner_logsparse", "causal")}
