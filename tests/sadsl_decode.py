"""Runs a spec on a cache, in pieces and token by token."""

import jax
import jax.numpy as jnp
import numpy as np

import sadsl as sa
from sadsl.selections.base import selections_of
from sadsl.text.specs import any_term

STEP = jax.jit(sa.step, static_argnames=("impl", "interpret", "sm_scale"))


def of_tokens(spec, given, start, stop, n):
    """The entries of some tokens, of arrays that have one for each of ``n`` tokens."""
    cache_axes = {a: i for s in selections_of(spec) for a, i in s.of_keys.items()}
    ranks = {a: r for s in selections_of(spec) for a, r in s.operands.items()}
    found = {}
    for name, x in given.items():
        if callable(x):
            found[name] = x
            continue
        x = np.asarray(x)
        axis = 1
        if name in cache_axes:
            axis = x.ndim - ranks[name] + cache_axes[name]
        has = x.ndim > axis and x.shape[axis] == n
        found[name] = np.take(x, range(start, stop), axis=axis) if has else x
    return found


def decoded(spec, inputs, given=None, *, pieces=(13, 8), cache=None, **options):
    """The outputs of all tokens: some pieces, then one token at a time."""
    q, k, v = inputs
    n, given = q.shape[1], given or {}
    steps = k.shape[1] // n
    if cache is None:
        cache = sa.init_cache(
            spec, len(q), n, k.shape[2], k.shape[3], k.dtype, num_heads=q.shape[2],
            num_v_heads=v.shape[2], head_dim_v=v.shape[3], operands=given,
        )  # fmt: skip
    term, found, at = any_term(spec), [], 0
    for size in pieces:
        stop = min(at + size, n)
        part = slice(at * steps, stop * steps)
        cache, out = sa.prefill(
            cache, q[:, at:stop], k[:, part], v[:, part],
            operands=of_tokens(term, given, at, stop, n), **options,
        )  # fmt: skip
        found.append(out)
        at = stop
    for i in range(at, n):
        own = of_tokens(term, given, i, i + 1, n)
        functions = {name: x for name, x in own.items() if callable(x)}
        part = k[:, i * steps : (i + 1) * steps], v[:, i * steps : (i + 1) * steps]
        if functions:
            cache, out = sa.prefill(cache, q[:, i : i + 1], *part, operands=own)
        else:
            part = (x[:, 0] for x in part) if steps == 1 else part
            cache, out = STEP(cache, q[:, i], *part, operands=own, **options)
            out = out[:, None]
        found.append(out)
    return jnp.concatenate(found, axis=1), cache
