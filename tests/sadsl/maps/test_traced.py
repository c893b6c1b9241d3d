"""Every operator of a traced value is traced, or raises an error with a way out."""

import inspect
import math
import operator
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.maps import numbers, symbols
from sadsl.maps.symbols import POSITIONS
from sadsl.maps.traced import TracedValue
from sadsl.terms.biases import Bias

Q, K = POSITIONS["q"], POSITIONS["k"]


def subclasses(kind):
    return {kind, *(each for sub in kind.__subclasses__() for each in subclasses(sub))}


# One value of each class that a user can hold while a function is traced.
VALUES = {
    "Symbol": Q, "Truth": Q >= K, "OperandArray": sa.operand("n"),
    "TableValues": sa.table((3, 1, 2)), "Real": 0.5 * Q,
    "TableNumbers": sa.table((0.5, 1.0)), "WeightsArray": sa.weights("b"),
}  # fmt: skip
OTHERS = {
    "int": 2, "zero": 0, "bool": True, "float": 0.5, "None": None, "text": "x",
    "tuple": (1, 2), "numpy int": np.int64(2), "numpy float": np.float32(0.5),
    "numpy bool": np.True_, "numpy array": np.arange(3), "numpy bools": np.eye(2) > 0,
    "jax scalar": jnp.int32(2), "jax array": jnp.arange(3), **VALUES,
}  # fmt: skip
# The operators of Python's own types, by the names that the language gives them.
KINDS = (int, float, complex, bool, tuple, list)
DUNDERS = {n for kind in KINDS for n, v in vars(kind).items() if callable(v)}
# What makes, copies and prints a value, or has a meaning of its own in a class.
NOT_OPERATORS = [
    "__new__", "__init__", "__repr__", "__str__", "__format__", "__hash__", "__bool__",
    "__getattribute__", "__getnewargs__", "__sizeof__", "__class_getitem__",
    "__getformat__", "__reduce__", "__setitem__", "__delitem__", "__iadd__", "__imul__",
]  # fmt: skip
OPERATORS = sorted(n for n in DUNDERS - {*NOT_OPERATORS} if n.startswith("__"))
BINARY = [operator.lt, operator.le, operator.eq, operator.ne, operator.ge, operator.gt]
BINARY += [operator.add, operator.sub, operator.mul, operator.matmul, operator.truediv]
BINARY += [operator.floordiv, operator.mod, divmod, pow, operator.lshift]
BINARY += [operator.rshift, operator.and_, operator.or_, operator.xor]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.imatmul]
IN_PLACE += [operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow]
IN_PLACE += [operator.ilshift, operator.irshift, operator.iand, operator.ior]
IN_PLACE += [operator.ixor]
UNARY = [operator.neg, operator.pos, abs, operator.invert, int, float, complex, bool]
UNARY += [round, math.floor, math.ceil, math.trunc, operator.index, iter, len, list]
UNARY += [hash, math.log, np.asarray, reversed, operator.not_]
WAY_OUT = re.compile(r"\b(write|use|look up|traced are|combined by|give)\b")


def outcome(function: Callable, *values):
    """The traced result, or the sentence of the refusal."""
    try:
        found = function(*values)
    except (TypeError, ValueError) as error:
        return str(error)
    return found


def check(function, *values):
    """Traced or refused with a way out; a text is the refusal."""
    found = outcome(function, *values)
    shown = f"{function.__name__} of {', '.join(map(repr, values))}: {found!r}"
    if isinstance(found, str):
        assert WAY_OUT.search(found), shown
    else:
        assert isinstance(found, TracedValue), shown


def test_every_class_is_here():
    """A class that is added must be walked too."""
    found = {kind.__name__ for kind in subclasses(TracedValue)} - {"TracedValue"}
    assert found == set(VALUES)
    for name, value in VALUES.items():
        assert type(value).__name__ == name
    # No other class of the two rooms holds an expression.
    for module in (symbols, numbers):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                assert issubclass(kind, TracedValue), name


def test_no_operator_is_left_to_python():
    """Neither to ``object``, which compares identities, nor to ``NotImplemented``."""
    for kind in subclasses(TracedValue):
        for name in OPERATORS:
            defined = inspect.getattr_static(kind, name, None)
            assert defined is not None, (kind, name)
            assert defined is not getattr(object, name, None), (kind, name)


@pytest.mark.parametrize("name", VALUES)
def test_operators_of_two(name):
    """On both sides, with values of every kind."""
    value = VALUES[name]
    for other in OTHERS.values():
        for function in (*BINARY, *IN_PLACE):
            check(function, value, other)
            if isinstance(other, str) and function in (operator.mod, operator.imod):
                continue  # `"x" % value` formats a text: Python asks nobody else.
            if isinstance(other, np.ndarray) and function in IN_PLACE:
                continue  # See `test_what_is_captured_or_not_ours`.
            check(function, other, value)


@pytest.mark.parametrize("name", VALUES)
def test_operators_of_one(name):
    for function in UNARY:
        check(function, VALUES[name])
    for other in OTHERS.values():
        check(operator.contains, VALUES[name], other)
        check(operator.getitem, VALUES[name], other)


SAME = [
    (lambda q, k: np.True_ & (q >= k), lambda q, k: True & (q >= k)),
    (lambda q, k: (q >= k) | np.False_, lambda q, k: (q >= k) | False),
    (lambda q, k: q >= np.int64(3), lambda q, k: q >= 3),
    (lambda q, k: np.int32(3) <= q, lambda q, k: q >= 3),
    (lambda q, k: jnp.int32(3) <= q, lambda q, k: q >= 3),
    (lambda q, k: np.int32(3) == sa.operand("n"), lambda q, k: sa.operand("n") == 3),
]


@pytest.mark.parametrize(("found", "wanted"), SAME)
def test_constants_of_numpy_are_those_of_python(found, wanted):
    assert sa.where(found) == sa.where(wanted)


def test_floats_of_numpy_are_those_of_python():
    found = sa.bias(lambda q, k: np.float32(0.5) * q + np.int64(3) * sa.weights("b")[k])
    assert found == sa.bias(lambda q, k: 0.5 * q + 3 * sa.weights("b")[k])


@pytest.mark.parametrize(
    "text",
    [
        "(k <= q) & ((operand('n') == 1) | (operand('n') >= 3))",
        "operand('n') != operand('m')",
        "1 == operand('n')",
        "(q >= k) == (k < 5)",
        "(q >= k) != (k < 5)",
        "(q >= k) == True",
        "operand('n') % 4 == -operand('m')",
        "abs(operand('n')) < minimum(operand('m'), q)",
    ],
)
def test_means_what_python_means(text):
    """Evaluated pair by pair on integers; parsed, it is the same map."""
    function = eval(f"lambda q, k: {text}", {**vars(sa)})
    found = sa.where(function)
    assert sa.parse(f"where(lambda q, k: {text})") == found
    assert sa.parse(repr(found)) == found
    n = 7
    arrays = {"m": np.array(-2), "n": np.array(2)}
    names = {"operand": lambda name: int(arrays[name]), "minimum": min, "abs": abs}
    meant = eval(f"lambda q, k: {text}", names)
    given = {name: x for name, x in arrays.items() if f"'{name}'" in text}
    wanted = [[bool(meant(q, k)) for k in range(n)] for q in range(n)]
    np.testing.assert_array_equal(found.dense(n, operands=given)[0], wanted)


UNTRACED = [
    "table((1, 2)) == 1", "weights('b') == 1", "q == table((1, 2))",
    "operand('n')[0] == 1",
]  # fmt: skip


@pytest.mark.parametrize("text", UNTRACED)
def test_text_refuses_what_python_refuses(text):
    with pytest.raises(TypeError) as of_python:
        sa.where(eval(f"lambda q, k: {text}", {**vars(sa)}))
    with pytest.raises(ValueError, match="is refused") as of_text:
        sa.parse(f"where(lambda q, k: {text})")
    assert str(of_python.value) in str(of_text.value)


ARRAY, JAX_ARRAY = np.arange(8), jnp.arange(8)
OUTSIDE = {
    "jnp.log": lambda q, k: jnp.log(q) < 3,
    "jnp.where": lambda q, k: jnp.where(q < 3, q, k) == 1,
    "np.log": lambda q, k: np.log(q) < 3,
    "np.minimum": lambda q, k: np.minimum(q, 3) < k,
    "math.log": lambda q, k: math.log(q) < 3,
    "numpy[q]": lambda q, k: ARRAY[q] == ARRAY[k],
    "jax[q]": lambda q, k: JAX_ARRAY[q] == JAX_ARRAY[k],
    "list[q]": lambda q, k: [1, 2, 3][q] == 1,
    "dict[q]": lambda q, k: {1: 2}[q] == 1,
    "numpy <=": lambda q, k: q >= ARRAY,
    "<= numpy": lambda q, k: q <= ARRAY,
    "jax <=": lambda q, k: q >= JAX_ARRAY,
    "<= jax": lambda q, k: q <= JAX_ARRAY,
    "in list": lambda q, k: q in [1, 2],
    "in set": lambda q, k: (q - k) in {1, 2},
    "numpy +=": lambda q, k: operator.iadd(np.arange(3), q) > k,
    "len": lambda q, k: len(q) > k,
    "lax": lambda q, k: jax.lax.shift_left(q, 1) > k,
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_captured_or_not_ours(name):
    """The error says what stands for it: in where, in bias and in a class of maps."""

    class Mine(sa.IndexMap):
        def pairs(self, q, k, h):
            return OUTSIDE[name](q, k)

    class MyBias(Bias):
        def of_heads(self, num_heads):
            return OUTSIDE[name](Q, K)

    mine = lambda f: Mine().node, lambda f: MyBias().score(1)
    for make in (sa.where, sa.bias, *mine):
        with pytest.raises(TypeError, match=WAY_OUT):
            make(OUTSIDE[name])


def test_a_traced_array_is_an_operand():
    """Under jit, a captured array has no value yet."""

    @jax.jit
    def call(x):
        with pytest.raises(TypeError, match=r"operand\(name\)\[q\]"):
            sa.where(lambda q, k: q < x)
        return x

    call(jnp.int32(3))


@pytest.mark.parametrize("value", [sa.causal(), sa.softmax(sa.causal()), sa.alibi()])
def test_specs_have_no_truth_value(value):
    """Else `a or b` is `a`, in silence."""
    with pytest.raises(TypeError, match="has no truth value: write"):
        bool(value)


# --- parameters ---

KEPT = [
    lambda q, k, w=5: sa.minimum(q - k, w),
    lambda q, k, *, w=5: sa.minimum(q - k, w),
    lambda q, k, *rest: sa.minimum(q - k, 5 + len(rest)),
    lambda q, k, **rest: sa.minimum(q - k, 5 + len(rest)),
]


@pytest.mark.parametrize("function", KEPT)
def test_defaults_are_left_alone(function):
    """By ``where`` and ``bias`` alike."""
    plain = lambda q, k: sa.minimum(q - k, 5)
    assert sa.bias(function) == sa.bias(plain)
    of_map = lambda f: lambda q, k: f(q, k) > 3
    assert sa.where(of_map(function)) == sa.where(of_map(plain))
    taken = lambda q, k, h, w=5: sa.minimum(q - k, w) + h
    assert sa.bias(taken) == sa.bias(lambda q, k, h: sa.minimum(q - k, 5) + h)


def by_keyword(q, k, *, d):
    return q - k < d


@pytest.mark.parametrize("trace", [sa.where, sa.bias])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q: q > 1, "not of 1 arguments"),
        (lambda q, k=5: q > k, "not of 1 arguments"),
        (lambda *all: all[0] > 1, "not of 0 arguments"),
        (lambda q, k, h, n, x: q > k, "not of 5 arguments"),
        (by_keyword, "'d' of them by keyword: give every other parameter a default"),
        (5, "whose parameters can be read, not 5"),
    ],
)
def test_parameters_that_cannot_be_bound(trace, function, message):
    with pytest.raises(TypeError, match=message):
        trace(function)


@pytest.mark.parametrize("head", ["q, k, w=5", "q, k=5", "q, k, *a", "k, q", "q", ""])
def test_text_takes_positions_only(head):
    """What a lambda of Python would leave alone, a spec has no use for."""
    for name in ("where", "bias"):
        with pytest.raises(ValueError, match="needs `lambda q, k:` or"):
            sa.parse(f"softmax(causal(), bias={name}(lambda {head}: 1))")


def test_functions_that_are_written_for_arrays():
    """As jax's splash attention has them: queries ``[q, 1]`` and keys ``[1, k]``."""

    def near(q, k):
        assert q.ndim == k.ndim == (q <= k).ndim == 2
        if q.size == 0 or k.size == 0:
            return np.empty((q.shape[0], k.shape[1]), dtype=np.bool_)
        mask = np.ones((q.shape[0], k.shape[1]), dtype=np.bool_)
        mask &= np.True_
        mask = mask & (q - 2 <= k)
        mask &= k <= q
        return mask

    assert np.array_equal(sa.where(near).dense(7), sa.window(2).dense(7))
    every = sa.where(lambda q, k: np.ones((q.shape[0], k.shape[1]), bool))
    assert every.dense(3).all()
    with pytest.raises(TypeError, match="expected a comparison"):
        sa.where(lambda q, k: np.ones((2, 1), bool))


JAX_FUNCTIONS = {
    "logical": lambda q, k: jnp.logical_and(k <= q, jnp.logical_not(q - 3 > k)),
    "where": lambda q, k: jnp.where(q < 4, k <= q, (q // 3 == k // 3) | (k == 0)),
    "divided": lambda q, k: jnp.equal((q - k) % 3, 1) ^ (jnp.floor_divide(k, 2) == q),
    "ends": lambda q, k: jnp.abs(q - k) <= jnp.minimum(jnp.maximum(q, 2), 4),
    "ones": lambda q, k: jnp.ones((q.shape[0], k.shape[1]), bool) & (k < 4),
    "clipped": lambda q, k: jnp.where(q >= 2, True, k == jnp.clip(q, 1, 5)),
    "head": lambda q, k, h: jnp.logical_or(k == h, jax.lax.add(q, 1) == k),
}


@pytest.mark.parametrize("name", JAX_FUNCTIONS)
def test_functions_of_jax_numpy(name):
    function = JAX_FUNCTIONS[name]
    q, k = jnp.arange(7)[:, None], jnp.arange(7)[None, :]
    heads = [(h,) if name == "head" else () for h in range(2)]
    wanted = [np.broadcast_to(function(q, k, *h), (7, 7)) for h in heads]
    spec = sa.where(function)
    np.testing.assert_array_equal(spec.dense(7, num_heads=2), np.stack(wanted))
    np.testing.assert_array_equal(sa.parse(repr(spec)).dense(7, num_heads=2), wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k: jnp.where(q < 2, k, q) == 1,  # a choice of integers
        lambda q, k: jnp.equal(jnp.asarray([[1, 2]]), q),  # a constant array
        lambda q, k: jnp.floor_divide(k, -1) == q,  # a divisor below 1
        lambda q, k: jnp.sqrt(q) <= k,  # floats
        lambda q, k: jnp.bitwise_and(q, k) == 1,  # bits of integers
        lambda q, k: (jnp.minimum(q, k) <= 1, k <= q),  # two results
        lambda q, k: jnp.logical_and(q, k) if q < 1 else k <= q,  # a branch
    ],
)
def test_functions_of_jax_numpy_that_symbols_have_not(function):
    with pytest.raises(TypeError, match="trace"):
        sa.where(function)
