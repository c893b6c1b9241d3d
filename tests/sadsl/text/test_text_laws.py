"""Every function and parameter of a spec survives a round trip through text and files.

The functions and their parameters are read off the package. The test of a new parameter
fails until ``spec_values`` has a value for it.
"""

import inspect
import operator
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few
from spec_values import (
    CAUSAL,
    GRID,
    NEEDED,
    NEEDED_OF,
    ONE_VALUE,
    OTHER,
    OTHER_OF,
    PLACES,
    SEVERAL,
    H,
    K,
    Q,
)

import sadsl as sa
from sadsl import catalog
from sadsl.maps.base import IndexMap
from sadsl.text import parsing


def functions():
    """All functions that return a part of a spec, by name."""
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
    # `load` and `parse` return what others made; plans of layers are tuples of specs.
    given = {"path", "text", "source"} & inspect.signature(value).parameters.keys()
    if typing.get_origin(made) is tuple:
        return typing.get_args(made)[0] is IndexMap
    every = typing.get_args(made) if union else [made]
    kinds = (*PLACES,)[:-1]
    return not given and all(inspect.isclass(m) and issubclass(m, kinds) for m in every)


FUNCTIONS = functions()


def parameters(function):
    return inspect.signature(function).parameters.values()


def first_of(name, function):
    """The arguments that a function needs, and those of its `*args` and `**kwargs`."""
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
    """Arguments that give a parameter a value other than its default."""
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
    """Calls a function; positional-only parameters are passed by position."""
    every = parameters(function)
    by_place = [given[p.name] for p in every if p.kind is p.POSITIONAL_ONLY]
    bare = {p.name for p in every if p.kind is p.POSITIONAL_ONLY}
    rest = {name: x for name, x in given.items() if name not in bare}
    return function(*by_place, *stars[0], **rest, **stars[1])


def spec_of(value):
    """A spec that holds the value."""
    kind = next(kind for kind in type(value).__mro__ if kind in PLACES)
    return PLACES[kind](value)


def cases(name):
    """Values of a function: with the arguments that it needs, then one a parameter."""
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
    """The same number as a NumPy scalar, as users get when they compute sizes."""
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
    """A repr leaves out the defaults of the function, not those of a class."""
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
    """Expressions of integers, as a lambda may write them."""
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
        # `~True` is -2 in Python.
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


@settings(max_examples=few(100), deadline=None)
@given(TRUTHS)
def test_text_of_what_was_traced(truth):
    found = sa.where(lambda q, k, h: truth)
    assert sa.parse(repr(found)) == found


@settings(max_examples=few(100), deadline=None)
@given(REALS)
def test_text_of_a_bias_that_was_traced(real):
    found = sa.softmax(CAUSAL, bias=sa.bias(lambda q, k, h: real))
    assert sa.parse(repr(found)) == found
