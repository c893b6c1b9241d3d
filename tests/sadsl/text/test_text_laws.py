"""Text and files give back what they were made of: every function, every parameter.

The functions and their parameters are read off the package. A parameter that is new
needs a value here, or fails.
"""

import inspect
import operator
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sadsl as sa
from sadsl import catalog
from sadsl.maps.base import IndexMap
from sadsl.maps.numbers import Real, TableNumbers, WeightsArray
from sadsl.maps.symbols import POSITIONS, OperandArray, Symbol, TableValues, Truth
from sadsl.selections.budgets import Share, Tokens, share
from sadsl.selections.cell_scores import Score, scored
from sadsl.selections.cells import Rules, rules
from sadsl.selections.lsh import SortedChunks, sorted_chunks
from sadsl.selections.tiles import GridTiles, tiles
from sadsl.terms.base import Term
from sadsl.terms.biases import Bias
from sadsl.terms.regions import Partition
from sadsl.text import parsing

Q, K, H = POSITIONS["q"], POSITIONS["k"], POSITIONS["h"]
CAUSAL = sa.causal()
GRID = sa.Grid(a=4, b=6)

# What a part is put into, to stand in a spec.
PLACES = {
    IndexMap: lambda x: x,
    Term: lambda x: x,
    Bias: lambda x: sa.softmax(CAUSAL, bias=x),
    Partition: sa.summaries,
    Score: lambda x: sa.topk(2, score=x),
    Rules: lambda x: sa.topk(2, rules=x),
    Share: sa.topk,
    Tokens: sa.topk,
    GridTiles: lambda x: sa.topk(2, block=x),
    SortedChunks: lambda x: sa.lsh(4, chunks=x),
    sa.Grid: lambda x: x.axial(x.names[0]),
    OperandArray: lambda x: sa.where(lambda q, k: x[q, k] == 1),
    Truth: lambda x: sa.where(lambda q, k, h: x),
    Symbol: lambda x: sa.where(lambda q, k, h: x == 1),
    TableValues: lambda x: sa.where(lambda q, k: x[q % 2] == 1),
    TableNumbers: lambda x: PLACES[Real](x[Q % 2]),
    WeightsArray: lambda x: PLACES[Real](x[H, Q]),
    Real: lambda x: sa.softmax(CAUSAL, bias=sa.bias(lambda q, k, h: x)),
    tuple: lambda x: sa.average(*x),
}


def functions():
    """What makes a part of a spec, by name: the grammar, the exports, the catalogue."""
    found = {**parsing.CALLS}
    exports = {name: getattr(sa, name) for name in sa.__all__}
    published = {
        f"catalog.{name}": value
        for name, value in vars(catalog).items()
        if callable(value) and not name.startswith("_")
    }
    for name, value in {**exports, **published}.items():
        if name not in found and makes_a_part(value):
            found[name] = value
    methods = {"lift": CAUSAL.lift, "permute": CAUSAL.permute, "isin": (Q - K).isin}
    methods |= {n: getattr(GRID, n) for n in ("product", "axial", "neighborhood")}
    assert methods.keys() == parsing.METHODS
    return found | {f".{name}": method for name, method in methods.items()}


def makes_a_part(value):
    if inspect.isclass(value):
        return issubclass(value, (*PLACES,)[:-1]) and value is not IndexMap
    made = typing.get_type_hints(value).get("return")
    union = isinstance(made, types.UnionType)
    # `load`, `parse` give back what others made; plans of layers are tuples of specs.
    given = {"path", "text", "source"} & inspect.signature(value).parameters.keys()
    if typing.get_origin(made) is tuple:
        return typing.get_args(made)[0] is IndexMap
    every = typing.get_args(made) if union else [made]
    kinds = (*PLACES,)[:-1]
    return not given and all(inspect.isclass(m) and issubclass(m, kinds) for m in every)


FUNCTIONS = functions()

# Arguments that a function needs: by its name, else by that of the parameter.
NEEDED = {
    "left": 4, "n": 3, "start": 1, "stop": 5, "stride": 3, "right": 1, "dilation": 2,
    "size": 4, "values": (1, 4), "map": CAUSAL, "a": CAUSAL, "x": Q - K, "name": "some",
    "buckets": 4, "w": 5, "k": 2, "t": 0.5, "p": 0.5, "fraction": 0.5, "count": 128,
    "sizes": (4, 6), "tile": (2, 3), "partition": 4, "by": "mean", "num_clusters": 4,
    "term": CAUSAL, "log_weight": 0.5, "vertical": 5, "slash": 6, "mass": 0.9,
    "prompt": 64, "capacity": 16, "queries": 1, "budget": 8, "width": 4, "block": 4,
    "order": (1, 0, 2), "window": 3, "num_blocks": 16, "local": 32, "num": 2,
    "function": lambda q, k: q - k <= 3, "of_pair": lambda q, k: 0.5 * (q - k),
    "kmeans": sa.kmeans(4, members="argmax"),
    "members": sa.where(lambda q, k: k // 4 == q),
    "seen": sa.where(lambda q, k: k < q // 4), "grid": (14, 14), "num_prefix": 5,
    "vision": (3, 64), "frame_stride": 8, "span": (1, 7), "num_positions": 9,
    "image": (2, 5), "question": (5, 9), "prefix": 2, "documents": (3, 4),
    "num_frames": 4, "tokens_per_frame": 8, "shape": (4, 8, 8), "layer": 0, "frames": 2,
    "cube": (2, 4, 4), "spans": ((64, 0.5), (-64, 1)),
}  # fmt: skip
NEEDED_OF = {
    "minimum": {"a": Q, "b": K}, "maximum": {"a": Q, "b": K}, "scatter_mean": {
        "map": sa.kmeans(4) & CAUSAL},
    "summaries": {"partition": sa.spans(4)}, "catalog.swapped_window": {
        "window": (2, 4, 4)},
    "catalog.vmoba": {"grid": (4, 8, 8), "tile": (4, 4)},
    "catalog.mminference_grid": {"vision": (0, 4096)},
    "catalog.residue_major": {"stride": 2},
}  # fmt: skip
# What stands for `*args` and `**kwargs`, first and then otherwise.
SEVERAL = {
    "per_head": [(CAUSAL,), (CAUSAL, sa.full())],
    "heads": [((CAUSAL, 1),), ((CAUSAL, 1), (sa.softmax(sa.full(), 2.0), 3))],
    "terms": [(CAUSAL,), (CAUSAL, sa.weighted(sa.full(), 0.5))],
    "names": [("a",), ("a", "b")],
    "sizes": [{"h": 4}, {"h": 4, "w": 3}],
    "maps": [{"a": CAUSAL}, {"a": CAUSAL, "b": sa.window(1)}],
}
# Other values, by the function and the parameter, else by the parameter, else derived.
# Where a value asks for others, they stand beside it.
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
    "variant": "xSQA", "patterns": {(0, 1): sa.full()}, "grid": (28, 14),
}  # fmt: skip
OTHER_OF = {
    ("minimum", "a"): Q + 1, ("minimum", "b"): 3, ("maximum", "a"): 2,
    ("maximum", "b"): K * 2, ("isin", "values"): {3, -1}, (".isin", "values"): {3, -1},
    ("softmax", "sink"): "logit", ("Softmax", "sink"): "logit",
    ("scored", "normalise"): "softmax", ("catalog.residue_major", "span"): (2, 8),
    ("lsh", "alone"): {"alone": "causal", "share": True}, ("kmeans", "window"): 3,
    ("clusters", "kmeans"): sa.kmeans(3, members="argmax"),
    ("catalog.biformer", "regions"): 2, ("offsets", "values"): {3, -1},
    ("operand", "name"): "another",
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
    ("linear", "feature_map"): "phi", ("catalog.residue_major", "num_positions"): 12,
}  # fmt: skip


# Parameters with one value, which others have more of; any other is an error.
ONE_VALUE = {("catalog.combiner_logsparse", "causal")}


def parameters(function):
    return inspect.signature(function).parameters.values()


def first_of(name, function):
    """The arguments that it needs, and those of its stars."""
    given, stars = {}, ((), {})
    for each in parameters(function):
        if each.kind is each.VAR_POSITIONAL:
            stars = several(name, each.name)[0], stars[1]
        elif each.kind is each.VAR_KEYWORD:
            stars = stars[0], several(name, each.name)[0]
        elif each.default is each.empty:
            given[each.name] = NEEDED_OF.get(name, {}).get(
                each.name, NEEDED.get(each.name)
            )
            assert given[each.name] is not None, f"{name}: no value of {each.name!r}"
    return given, stars


def several(name, parameter):
    return SEVERAL.get(name) or SEVERAL[parameter]


def other(name, each, given):
    """Arguments with which the parameter is not at its default."""
    key = name, each.name
    # Not by `get`: a traced value has no truth value of its own.
    known = OTHER_OF[key] if key in OTHER_OF else OTHER.get(each.name)
    at = given.get(each.name, each.default)
    if known is not None and repr(known) != repr(at):
        return (
            known
            if isinstance(known, dict) and each.name in known
            else {each.name: known}
        )
    options = (
        typing.get_args(each.annotation)
        if (typing.get_origin(each.annotation) is typing.Literal)
        else ()
    )
    match at:
        case bool():
            return {each.name: not at}
        case str() if options:
            return {each.name: next(x for x in options if x != at)}
        case str():
            return {each.name: f"{at}_too"}
        case int():
            return {each.name: at + 2 if at % 2 else max(1, 2 * at)}
        case float():
            return {each.name: at / 2}
    raise AssertionError(f"{name}: give another value of {each.name!r}")


def call(function, given, stars):
    """By position where a parameter has no name to be called by."""
    every = parameters(function)
    by_place = [given[p.name] for p in every if p.kind is p.POSITIONAL_ONLY]
    bare = {p.name for p in every if p.kind is p.POSITIONAL_ONLY}
    rest = {name: x for name, x in given.items() if name not in bare}
    return function(*by_place, *stars[0], **rest, **stars[1])


def spec_of(value):
    """The part in a spec."""
    kind = next(kind for kind in type(value).__mro__ if kind in PLACES)
    return PLACES[kind](value)


def cases(name):
    """Specs of a function: as it is called at least, and one a parameter."""
    function = FUNCTIONS[name]
    given, stars = first_of(name, function)
    plain = call(function, given, stars)
    yield "the least", plain
    for each in parameters(function):
        if each.kind is each.VAR_POSITIONAL:
            yield (
                each.name,
                call(function, given, (several(name, each.name)[1], stars[1])),
            )
        elif each.kind is each.VAR_KEYWORD:
            yield (
                each.name,
                call(function, given, (stars[0], several(name, each.name)[1])),
            )
        elif (name, each.name) not in ONE_VALUE:
            changed = other(name, each, given)
            yield each.name, call(function, {**given, **changed}, stars)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_text_and_files_give_back_what_was_made(name, tmp_path):
    path = tmp_path / "spec.json"
    seen = []
    for parameter, value in cases(name):
        spec = spec_of(value)
        assert sa.parse(repr(spec)) == spec, f"{name}, {parameter}: {spec!r}"
        sa.save(spec, path)
        assert sa.load(path) == spec, f"{name}, {parameter}: {spec!r}"
        # A parameter that makes no difference is lost where the value is made.
        assert spec not in seen[:1], f"{name}, {parameter}: is {spec!r} with it or not"
        seen.append(spec)


def as_numpy(value):
    """The same number as NumPy has it: what a user computes sizes with."""
    match value:
        case bool():
            return np.bool_(value)
        case int():
            return np.int64(value)
        case float():
            return np.float64(value)
        case tuple():
            return tuple(map(as_numpy, value))
    return value


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("abs", "Grid")])
def test_numbers_of_numpy_have_text(name):
    function = FUNCTIONS[name]
    given, stars = first_of(name, function)
    plain = spec_of(call(function, given, stars))
    changed = {key: as_numpy(value) for key, value in given.items()}
    found = spec_of(call(function, changed, (as_numpy(stars[0]), as_numpy(stars[1]))))
    assert found == plain
    assert repr(found) == repr(plain)
    for each in parameters(function):
        starred = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if starred or (name, each.name) in ONE_VALUE:
            continue
        values = other(name, each, given)
        wanted = spec_of(call(function, {**given, **values}, stars))
        values = {key: as_numpy(value) for key, value in values.items()}
        found = spec_of(call(function, {**given, **values}, stars))
        assert repr(found) == repr(wanted), f"{name}, {each.name}"


def test_every_default_is_that_of_the_function():
    """A repr leaves out what the function, not the class, has by default."""
    assert repr(sa.mass(0.2)) == "mass(0.2)"
    assert repr(sa.mass(0.2, score="mean")) == "mass(0.2, score='mean')"
    assert sa.parse("mass(0.2, score='mean')") != sa.parse("mass(0.2)")


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities_have_text(value):
    assert sa.parse(repr(sa.threshold(value))) == sa.threshold(value)


# --- traced expressions ---

SMALL = st.integers(-3, 9)
LEAVES = st.sampled_from([Q, K, H, sa.operand("n"), sa.operand("at")[Q, K]]) | SMALL


def integers(inner):
    """Integers of integers, as a lambda may write them; constants among themselves."""
    two = st.tuples(inner, inner)
    return (
        two.map(lambda x: x[0] + x[1])
        | two.map(lambda x: x[0] - x[1])
        | st.tuples(inner, SMALL).map(lambda x: x[0] * x[1])
        | st.tuples(inner, st.integers(1, 5)).map(lambda x: x[0] // x[1])
        | st.tuples(inner, st.integers(1, 5)).map(lambda x: x[0] % x[1])
        | inner.map(lambda x: -x)
        | inner.map(lambda x: abs(x))
        | two.map(lambda x: sa.minimum(*x))
        | two.map(lambda x: sa.maximum(*x))
        | inner.map(sa.floor_log2)
        | inner.map(lambda x: sa.table((3, -1, 2))[x % 3])
    )


INTEGERS = st.recursive(LEAVES, integers, max_leaves=6)
COMPARED = [
    operator.lt,
    operator.le,
    operator.eq,
    operator.ne,
    operator.ge,
    operator.gt,
]
COMPARISONS = (
    st.tuples(st.sampled_from(COMPARED), INTEGERS, INTEGERS).map(lambda x: x[0](*x[1:]))
    | INTEGERS.map(sa.power_of_two)
    | INTEGERS.map(lambda x: sa.isin(x, {1, -2}))
    | st.booleans()
)
JOINED = [operator.and_, operator.or_, operator.xor, operator.eq, operator.ne]
TRUTHS = st.recursive(
    COMPARISONS,
    lambda inner: (
        st.tuples(st.sampled_from(JOINED), inner, inner).map(lambda x: x[0](*x[1:]))
        # Of a bool `~` is Python's, which is an integer.
        | inner.map(lambda x: not x if isinstance(x, bool) else ~x)
    ),
    max_leaves=4,
)
FLOATS = st.sampled_from([0.5, -2.0, 1e-7, 3e20, 0.0])
REALS = st.recursive(
    INTEGERS
    | FLOATS
    | st.sampled_from(
        [
            sa.weights("b")[H, Q - K],
        ]
    ),
    lambda inner: (
        st.tuples(
            st.sampled_from([operator.add, operator.sub, operator.mul]), inner, FLOATS
        ).map(lambda x: x[0](x[1], x[2]))
        | st.tuples(FLOATS, inner).map(lambda x: x[0] - x[1])
        | st.tuples(inner, st.just(sa.table((0.5, 2.0))[H % 2])).map(
            lambda x: x[0] * x[1]
        )
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(TRUTHS)
def test_text_of_what_was_traced(truth):
    found = sa.where(lambda q, k, h: truth)
    assert sa.parse(repr(found)) == found


@settings(max_examples=100, deadline=None)
@given(REALS)
def test_text_of_a_bias_that_was_traced(real):
    found = sa.softmax(CAUSAL, bias=sa.bias(lambda q, k, h: real))
    assert sa.parse(repr(found)) == found
