"""Attention of few queries over a cache whose heads stand in front, for decoding."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering import pipeline
from lowering.problem import Problem
from lowering.run_time import bias_values, plans
from pallas_kernels import few_queries
from pallas_kernels.call import Inputs, Vectors
from pallas_kernels.config import Tiles
from pallas_kernels.pages import FewSizes, Pages
from pallas_kernels.precision import wide
from pallas_kernels.shared_values import loaded_once, of_keys
from sadsl.run import merging
from sadsl.run.attend import attend
from sadsl.run.kernels import call_vectors, kernel_call
from sadsl.run.operands import call_arrays
from sadsl.run.options import Options, traced_scale
from sadsl.run.query_rows import QueryRows, arrays_of_rows, options_of_rows
from sadsl.run.query_scale import scaled
from sadsl.run.softmax import sinks_of
from sadsl.run.types import Outcome, Setting
from sadsl.selections.base import with_packed
from sadsl.terms.base import DROPOUT_KEY, read_by
from sadsl.terms.softmax import Softmax


def attend_few(
    term: Softmax,
    inputs: tuple[Array, Array, Array | None],
    given: Mapping[str, Any],
    setting: Setting,
    pages: Array | None = None,
) -> Outcome:
    """One softmax of few queries over a cache; the work follows the blocks it visits.

    The result equals ``attend(term, (q, k', v'), given, setting)``, where ``k'`` and
    ``v'`` have the heads behind the positions. It has no gradient.

    Args:
      term: a softmax over a map, whose run-time operands are in ``given``.
      inputs: q ``[batch, queries, heads, dim]``, and k and v ``[batch, kv_heads,
        slots, dim]``. v may be None if ``term.values`` takes the values from k.
      given: the run-time arrays by name: ``q_offset`` of ``traced_offset``, segment
        ids, positions of slots, sinks, biases, the parts that selections have chosen.
      setting: the options of the call; ``block_q`` of its config is not used.
      pages: int ``[batch, n]``: k and v are then ``[num_pages, kv_heads, page_size,
        dim]``, and page ``pages[b, j]`` has the keys from ``j * page_size`` on of
        batch entry ``b``. A negative number stands for no page: its keys do not
        exist.

    Raises:
      ValueError: the arrays and the term do not fit together, a choice was not given,
        or pages are smaller than a block of the backend.
      TypeError: pages are no integers.
      NotImplementedError: dropout, a traced scale, a choice that is given as a list,
        pages with impl="reference", or a gradient.
    """
    sizes = _checked(term, inputs, given, setting, pages)
    q, k, v = inputs
    batch, queries, heads, _ = q.shape
    problem = Problem(queries, sizes.slots, heads, setting.q_offset)
    if setting.impl == "reference":
        keys = jnp.swapaxes(k, 1, 2)
        values = keys if v is None else jnp.swapaxes(v, 1, 2)
        return attend(term, (q, keys, values), given, setting)
    if term.scale is not None:
        q = scaled(q, term.scale, problem, given)
        term = replace(term, scale=None)
        given = read_by(term, given)
    options = Options(replace(term, sink=None), problem, setting)
    operands = {name: x for name, x in given.items() if name != term.sink}
    arrays = _with_choices(call_arrays(options, operands, batch), options)
    rows = QueryRows(queries, heads // k.shape[1], k.shape[1])
    table = None if pages is None else Pages(jnp.asarray(pages, jnp.int32), k.shape[2])
    out, lse = _traced(q, k, v, arrays, table, options=options, rows=rows, sizes=sizes)
    if term.sink is None:
        return Outcome(out, lse)
    return merging.with_sink(out, lse, sinks_of(term, given, q))


def _checked(
    term: Softmax,
    inputs: tuple[Array, Array, Array | None],
    given: Mapping[str, Any],
    setting: Setting,
    pages: Array | None,
) -> FewSizes:
    """The sizes of a call whose arrays fit together."""
    q, k, v = inputs
    what = "attend_few"
    if q.ndim != 4 or k.ndim != 4 or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{what}: q has shape {q.shape} and k {k.shape}: they must be [batch, "
            "queries, heads, dim] and [batch, kv_heads, slots, dim]"
        )
    batch, queries, heads, dim = q.shape
    if heads % k.shape[1]:
        raise ValueError(
            f"{what}: {heads} query heads are no multiple of {k.shape[1]} key heads"
        )
    if k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        raise ValueError(
            f"{what}: q has dtype {q.dtype} and the cache {k.dtype}: cast q to the "
            "dtype of the cache"
        )
    if term.values is None and (v is None or v.shape[:3] != k.shape[:3]):
        shape = None if v is None else v.shape
        raise ValueError(
            f"{what}: v has shape {shape} and k {k.shape}: they must agree but for "
            "the last axis (only softmax(values=...) takes no v)"
        )
    if term.values is not None and term.values[1] > dim:
        raise ValueError(f"{what}: {term!r} takes values from {dim} channels of keys")
    _check_supported(given, setting, pages)
    if pages is None:
        if k.shape[0] != batch:
            raise ValueError(
                f"{what}: {batch} batch entries of q, and {k.shape[0]} of the cache"
            )
        return FewSizes(queries * heads // k.shape[1], k.shape[2], dim, None)
    if not jnp.issubdtype(pages.dtype, jnp.integer):
        raise TypeError(f"{what}: pages have dtype {pages.dtype}: pass integers")
    if pages.ndim != 2 or pages.shape[0] != batch:
        raise ValueError(
            f"{what}: pages have shape {pages.shape}: they must be [{batch}, pages of "
            "a sequence]"
        )
    slots = pages.shape[1] * k.shape[2]
    return FewSizes(queries * heads // k.shape[1], slots, dim, k.shape[2])


def _check_supported(
    given: Mapping[str, Any], setting: Setting, pages: Array | None
) -> None:
    if setting.dropout_rate or DROPOUT_KEY in given:
        raise NotImplementedError("attend_few has no dropout: pass dropout_rate=0")
    if traced_scale(setting):
        raise NotImplementedError(
            "attend_few takes sm_scale as a Python float: multiply q by a traced scale"
        )
    if setting.impl == "reference" and pages is not None:
        raise NotImplementedError(
            "impl='reference' reads no pages: gather the keys of each sequence, or use "
            "impl='xla'"
        )


def _with_choices(arrays: dict[str, Any], options: Options) -> dict[str, Any]:
    """The arrays, with the bools of choices packed as kernels read them."""
    for choice in options.selections:
        if choice.key("listed") in arrays:
            raise NotImplementedError(
                f"attend_few takes the choice of {choice!r} as bools, "
                f"{choice.key('chosen')!r}, not as lists: select without lists=True"
            )
        names = [n for n in options.read if choice.owns(n) and n not in arrays]
        if names:
            raise ValueError(
                f"attend_few: {choice!r} does not choose here, and {names[0]!r} was "
                "not given: pass what sadsl.select returns"
            )
        arrays = with_packed(arrays, choice.key("chosen"))
    return arrays


@partial(jax.jit, static_argnames=("options", "rows", "sizes"))
def _traced(
    q: Array, k: Array, v: Array | None, arrays: Mapping[str, Any],
    pages: Pages | None, *, options: Options, rows: QueryRows, sizes: FewSizes,
) -> tuple[Array, Array]:  # fmt: skip
    if v is None:
        v = k
    run = partial(_run, options=options, rows=rows, sizes=sizes)
    return _without_gradient(run, (q, k, v, arrays, pages))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_gradient(run: Any, args: tuple) -> tuple[Array, Array]:
    return run(*args)


@_without_gradient.defjvp
def _refuse_gradient(run: Any, primals: tuple, tangents: tuple) -> Any:
    del run, primals, tangents
    raise NotImplementedError(
        "attend_few has no gradient: use sadsl.attention to train, or "
        "jax.lax.stop_gradient on what decoding returns"
    )


def _run(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Any], pages: Pages | None, *,
    options: Options, rows: QueryRows, sizes: FewSizes,
) -> tuple[Array, Array]:  # fmt: skip
    of_rows, impl, dtype = options_of_rows(options, rows), options.setting.impl, q.dtype
    tile = few_queries.default_tile(sizes, impl, dtype)
    config = replace(of_rows.setting.config, block_q=None)
    tiles = config.resolve(Tiles(tile, tile, tile))
    tile, stages = tiles.forward, of_rows.stages
    arrays = arrays_of_rows(arrays, of_rows)
    vectors = _vectors(of_rows, arrays, tiles, wide(dtype))
    block = tile.block_q, tile.block_kv
    if pages is None and not plans.is_run_time(stages):
        mask = pipeline.block_mask(stages, *block)
    else:
        present = None if pages is None else pages.present(tile.block_kv)
        mask = plans.plan(stages, *block, vectors, "q", present)
    call = kernel_call(of_rows, stages, tiles, wide(dtype))
    values = options.term.values
    if values is not None:
        v = of_keys(k, values)
        values = values if impl == "xla" else loaded_once(values, k.shape[3], impl)
    inputs = Inputs(rows.to_rows(q), k, v)
    found = few_queries.attend(
        inputs, vectors, mask, replace(call, values=values), impl=impl, pages=pages
    )
    lse = found.lse.reshape(q.shape[0], q.shape[2], q.shape[1])
    return rows.to_queries(found.o), lse


def _vectors(
    options: Options, arrays: Mapping[str, Any], tiles: Tiles, dtype: Any
) -> Vectors:
    vectors = call_vectors(options.stages, arrays, tiles)
    lowered = options.lowered_score
    if lowered is None:
        return vectors
    added = bias_values.values(lowered, options.problem, arrays, dtype)
    return vectors._replace(scores=added)
