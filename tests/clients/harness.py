"""What the scripts of clients share: one edit, equal results, what was gained."""

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

TOLERANCE = 1e-5  # of a number in float32, relative to the largest of its array
LENGTHS = 2048, 4096


def edited(cls: type, start: str, stop: str, line: str, **names: Any) -> Any:
    """A second copy of a class, where one statement replaces some lines.

    The lines go from the one that begins with ``start`` to the one before the next
    that begins with ``stop``. The statement may use ``names`` too.

    Raises:
      ValueError: the class has no such lines, or several: it is another version.
    """
    lines = inspect.getsource(cls).splitlines()
    first = [i for i, x in enumerate(lines) if x.strip().startswith(start)]
    if len(first) != 1:
        raise ValueError(f"{cls}: {len(first)} lines begin with {start!r}, not one")
    last = next(
        i for i in range(first[0], len(lines)) if lines[i].strip().startswith(stop)
    )
    indent = " " * (len(lines[first[0]]) - len(lines[first[0]].lstrip()))
    lines[first[0] : last] = [indent + line]
    space = {**vars(sys.modules[cls.__module__]), **names}
    exec(compile("\n".join(lines), f"{cls.__name__} with one line", "exec"), space)
    return space[cls.__name__]


def drawn(params: Any) -> Any:
    """Weights at random: where all begin as 0 or 1, a difference may not show."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draws = [
        0.1 * jax.random.normal(key, x.shape, x.dtype) + (x == 1)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, draws)


def step_of(forward: Callable[..., jax.Array], seed: int = 0) -> Callable[..., Any]:
    """Output and gradients of a model, for random cotangents."""

    def step(params: Any, *inputs: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            out = forward(params, *inputs)
            weights = jax.random.normal(jax.random.key(seed), out.shape, out.dtype)
            return jnp.vdot(weights, out), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradients

    return step


def furthest(plain: Any, ours: Any) -> float:
    """The largest difference of two trees, relative to the largest of each array.

    An array of numbers that would cancel without rounding counts as a thousandth of the
    largest of the tree.
    """
    least = 1e-3 * max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(plain))
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True)
    return max(
        float(jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(x)), least))
        for x, y in pairs
    )


def check_equal(what: str, plain: Any, ours: Any, tolerance: float = TOLERANCE) -> None:
    """Prints how far two trees are apart.

    Raises:
      AssertionError: further than the tolerance, or an array has no number but 0.
    """
    found = furthest(plain, ours)
    assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(plain)), what
    assert found <= tolerance, f"{what}: {found:.1e} apart"
    print(f"equal   {what} ({found:.0e} apart)")


def measured(functions: Sequence[Callable[..., Any]], args: tuple) -> list:
    """Seconds of a call of each function, and MiB of temporary memory.

    The best of three rounds, in which the functions take turns, so that a busy host is
    busy for all of them.
    """
    compiled = [jax.jit(function).lower(*args).compile() for function in functions]
    seconds = [float("inf")] * len(compiled)
    for _ in range(3):
        for i, call in enumerate(compiled):
            start = time.perf_counter()
            jax.block_until_ready(call(*args))
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    memory = [x.memory_analysis().temp_size_in_bytes / 2**20 for x in compiled]
    return list(zip(seconds, memory, strict=True))


def gains(
    what: str,
    make: Callable[[int], tuple[Callable[..., Any], Callable[..., Any], tuple]],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Prints time and memory of a client's step, without and with the swapped line.

    Args:
      what: the head of the table.
      make: for a length: the step without, the step with, and their arguments.
      lengths: of the sequences.
    """
    print(what)
    print(f"{'length':>8}{'s before':>10}{'s after':>10}{'faster':>8}", end="")
    print(f"{'MiB before':>12}{'MiB after':>11}{'less':>7}")
    for length in lengths:
        plain, ours, args = make(length)
        (t0, m0), (t1, m1) = measured((plain, ours), args)
        print(f"{length:>8}{t0:>10.2f}{t1:>10.2f}{t0 / t1:>7.1f}x", end="")
        print(f"{m0:>12.0f}{m1:>11.0f}{m0 / m1:>6.1f}x", flush=True)
