"""Few queries: parts of a row, block sizes, and code for chips that are not here."""

import re
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import sadsl as sa
from lowering.targets import compiling
from pallas_kernels import few_queries, softmax
from pallas_kernels.block_mask import blank, from_blocks
from pallas_kernels.call import Call
from pallas_kernels.config import Tile, Tiles
from pallas_kernels.pages import FewSizes
from pallas_kernels.tpu.runs import plan_of_rows
from pallas_kernels.triton import few_queries as triton
from pallas_kernels.triton.runs import blocks_before, blocks_of_part, plan_of
from sadsl.run import traced_offset
from sadsl.run.attend import attend
from sadsl.run.few_queries import attend_few
from sadsl.run.types import Setting
from sadsl.text.specs import any_term

NEAR = sa.causal() & (sa.window(200) | sa.sinks(4))


@pytest.mark.parametrize("parts", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_parts_of_a_row_have_equally_many_blocks(parts):
    rng = np.random.default_rng(parts)
    kinds = rng.integers(0, 3, (2, 2, 17))
    kinds[1, 1] = 0
    maps = np.arange(2, dtype=np.int32)
    mask = from_blocks(kinds, map_of_head=maps, like=blank(32, 17 * 16, 16, 16))
    plan = plan_of(mask)
    runs = plan.runs._replace(before=blocks_before(mask, np))
    runs = jax.tree.map(jnp.asarray, runs)
    sizes = replace(plan.sizes, parts=parts)
    for row in range(4):
        found = []
        for part in range(parts):
            blocks = blocks_of_part(runs, sizes, jnp.int32(row), jnp.int32(part))
            ends = [
                [int(x) for x in blocks(r)]
                for r in range(runs.row_ptr[row], runs.row_ptr[row + 1])
            ]
            found.append([i for start, stop in ends for i in range(start, stop)])
        visited = [i for part in found for i in part]
        assert visited == np.flatnonzero(kinds.reshape(4, 17)[row]).tolist()
        lengths = [len(x) for x in found]
        assert max(lengths) - min(lengths) <= 1


def test_merged_parts():
    rng = np.random.default_rng(0)
    score, v = rng.normal(size=(1, 2, 5, 12)) * 9, rng.normal(size=(1, 2, 12, 3))
    # The first row sees no key, the second none of some parts.
    score[..., 0, :], score[..., 1, :9] = -np.inf, -np.inf
    weight = np.exp(score.reshape(1, 2, 5, 4, 3))
    total = weight.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        o = np.einsum("bhqpk,bhpkd->bhpqd", weight, v.reshape(1, 2, 4, 3, 3))
        o = np.nan_to_num(o / np.swapaxes(total, 2, 3)[..., None])
        lse = np.log(np.swapaxes(total, 2, 3))
        whole = np.log(total.sum(axis=-1))
    expected = np.einsum("bhqk,bhkd->bhqd", np.exp(score), v)
    expected /= np.maximum(np.exp(score).sum(axis=-1), 1e-300)[..., None]
    found = triton.merged(jnp.asarray(o, "float32"), jnp.asarray(lse, "float32"))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], whole, atol=1e-5)


def test_block_sizes():
    def sizes(impl, *args, dtype="bfloat16"):
        tile = few_queries.default_tile(FewSizes(*args), impl, dtype)
        return tile.block_q, tile.block_kv

    assert sizes("xla", 4, 37, 64, None) == (4, 37)
    assert sizes("xla", 4, 4096, 64, None) == (4, 512)
    assert sizes("xla", 4, 6000, 64, None) == (4, 500)
    assert sizes("xla", 4, 4099, 64, None) == (4, 512)
    assert sizes("xla", 4, 4096, 64, 1021) == (4, 1)
    assert sizes("tpu", 4, 4096, 128, None) == (16, 512)
    assert sizes("tpu", 600, 300, 128, None) == (384, 384)
    assert sizes("tpu", 17, 4096, 128, 128) == (32, 128)
    assert sizes("tpu", 17, 4096, 256, 1024, dtype="float32") == (32, 256)
    assert sizes("triton", 4, 4096, 128, None) == (16, 64)
    assert sizes("triton", 40, 4096, 128, 96) == (64, 32)


def test_a_block_of_rows_need_not_fill_the_lanes_of_a_tpu():
    tile = Tile(block_q=16, block_kv=128)
    call = Call(lambda *_: True, 1.0, Tiles(tile, tile, tile))

    def planned(rows, block_q, block_kv):
        like = blank(rows, 256, block_q, block_kv)
        kinds = np.ones((1, like.num_rows, like.num_columns), int)
        maps = np.zeros(1, np.int32)
        return plan_of_rows(from_blocks(kinds, map_of_head=maps, like=like), call)

    assert planned(9, 16, 128).sizes.block_q == 16
    with pytest.raises(ValueError, match="block_q=16 must be a multiple of 128"):
        planned(17, 16, 128)
    with pytest.raises(ValueError, match="block_kv=64 must be a multiple of 128"):
        planned(9, 16, 64)


def program(impl, *, spec=NEAR, page=None, interpret=False):
    """A step of 2 sequences of 1,024 slots, and the arrays that it takes."""

    def step(q, k, v, at, pages=None):
        term, given = traced_offset.with_offset(any_term(spec), at, {}, 2)
        setting = Setting(0.1, impl=impl, interpret=interpret)
        return attend_few(term, (q, k, v), given, setting, pages)[:2]

    shape = (2, 2, 1024, 128) if page is None else (2048 // page, 2, page, 128)
    cache = jax.ShapeDtypeStruct(shape, "bfloat16")
    q = jax.ShapeDtypeStruct((2, 3, 8, 128), "bfloat16")
    args = q, cache, cache, jax.ShapeDtypeStruct((2,), "int32")
    table = jax.ShapeDtypeStruct((2, 1024 // (page or 1)), "int32")
    return step, args if page is None else (*args, table)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize(
    ("page", "spec"),
    [(None, NEAR), (128, NEAR), (512, sa.softmax(NEAR, bias=sa.alibi()))],
    ids=str,
)
def test_tpu_code_copies_no_cache(target, page, spec):
    compiled = compiling.compile_for(*program("tpu", spec=spec, page=page), target)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2 * 1024 * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize("page", [None, 16, 64])
def test_gpu_code_copies_no_cache(page):
    text = compiling.lower_for(*program("triton", page=page), "h100").as_text()
    cache = f"{128 * 16 if page == 16 else 32}x2x{page}x128xbf16" if page else ""
    cache = cache or "2x2x1024x128xbf16"
    made = re.findall(rf"-> tensor<(?:{cache}|2x1024x2x128xbf16)>", text)
    assert made == []


@pytest.mark.slow
def test_pages_with_copies_as_on_a_tpu():
    """The copies of a paged cache, in an interpreter that knows the memories."""
    params = pltpu.InterpretParams(
        dma_execution_mode="on_wait", out_of_bounds_reads="raise", detect_races=True
    )
    step, shapes = program("tpu", page=128, interpret=params)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=x.shape), "float32") for x in shapes[:3])
    at, table = jnp.array([100, 1000]), rng.permutation(16).reshape(2, 8)
    table[0, 1:] = -1
    found = step(q, k, v, at, jnp.asarray(table, jnp.int32))
    keys = [jnp.swapaxes(x[table], 2, 3).reshape(2, 1024, 2, 128) for x in (k, v)]
    term, given = traced_offset.with_offset(any_term(NEAR), at, {}, 2)
    expected = attend(term, (q, *keys), given, Setting(0.1, impl="reference"))
    np.testing.assert_allclose(found[0], expected.out, atol=1e-5)
    np.testing.assert_allclose(found[1], expected.lse, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "tpu"])
def test_kernels_visit_the_blocks_of_the_plan(impl):
    count, fold = 0, softmax.fold

    def counted(*args):
        def add():
            nonlocal count
            count += 1

        jax.debug.callback(add)
        return fold(*args)

    def tiles(spec, at):
        nonlocal count
        count = 0
        step, shapes = program(impl, spec=spec, interpret=True)
        q, k, v = (jnp.zeros(x.shape, "float32") for x in shapes[:3])
        with mock.patch.object(softmax, "fold", counted):
            jax.block_until_ready(step(q, k, v, jnp.array(at)))
        jax.effects_barrier()
        return count

    sizes = FewSizes(12, 1024, 128, None)
    block = few_queries.default_tile(sizes, impl, "float32").block_kv
    last = np.array([40, 1000]) + 2
    heads = 2
    assert tiles(sa.causal(), (40, 1000)) == heads * (last // block + 1).sum()
    first = np.array([0, 800]) // block
    live = last // block + 1 - first + (first > 0)
    assert tiles(NEAR, (40, 1000)) == heads * live.sum()
