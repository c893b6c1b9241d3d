"""Few queries over a cache with its heads in front equal the ordinary path."""

from dataclasses import dataclass, field, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from pallas_kernels.xla import few_queries, tile
from sadsl.run import traced_offset
from sadsl.run.attend import attend
from sadsl.run.few_queries import attend_few
from sadsl.run.types import Setting
from sadsl.text.specs import any_term

NEAR = sa.causal() & (sa.window(5) | sa.sinks(2))
TWO = sa.per_head(sa.causal(), sa.causal() & sa.window(3))
# Slots of a ring: the position of each, -1 if it is empty.
RING = sa.parse(
    "where(lambda q, k: (operand('slot')[k] >= 0) & (operand('slot')[k] <= q)"
    " & (q - operand('slot')[k] <= 9))"
)
GROWING = sa.bias(lambda q, k, h: 1 + 0.1 * sa.log(1 + q) + 0.01 * h)


@dataclass(frozen=True)
class Case:
    spec: object = NEAR
    queries: int = 1
    slots: int = 37
    heads: tuple = (4, 2)
    at: tuple = (5, 20)
    shared: bool = False  # one position for all batch entries
    given: dict = field(default_factory=dict)
    dim: int = 8
    page: int | None = None

    def arrays(self, dtype="float32"):
        rng = np.random.default_rng(0)
        batch, (q_heads, kv_heads) = len(self.at), self.heads
        cache = batch, kv_heads, self.slots, self.dim
        shapes = (batch, self.queries, q_heads, self.dim), cache, cache
        return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def term(self):
        at = jnp.asarray(self.at[0] if self.shared else self.at)
        given = {n: jnp.asarray(x) for n, x in self.given.items()}
        spec = any_term(self.spec)
        return traced_offset.with_offset(spec, at, given, len(self.at))

    def pages(self, *caches):
        """The caches in shuffled pages, with NaN where no page of the table is."""
        rng, batch = np.random.default_rng(1), len(self.at)
        count = -(-self.slots // self.page)
        order = rng.permutation(batch * count + 2)[: batch * count]
        table = order.reshape(batch, count).astype(np.int32)

        def paged(x):
            short = ((0, 0), (0, 0), (0, count * self.page - self.slots), (0, 0))
            x = jnp.pad(x, short, constant_values=jnp.nan)
            x = x.reshape(*x.shape[:2], count, self.page, -1)
            x = jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], self.page, x.shape[4])
            pool = jnp.full((batch * count + 2, *x.shape[1:]), jnp.nan, x.dtype)
            return pool.at[order].set(x)

        pools = [paged(x) for x in caches]
        last = np.broadcast_to(self.at[0] if self.shared else self.at, batch)
        unused = np.arange(count) > (last[:, None] + self.queries - 1) // self.page
        table = np.where(unused, -1, table)
        return *pools, jnp.asarray(table)


def outcomes(case, impl="xla", dtype="float32", **options):
    q, k, v = case.arrays(dtype)
    term, given = case.term()
    setting = Setting(0.3, impl=impl, interpret=impl != "xla", **options)
    dense = replace(setting, impl="reference", interpret=False)
    expected = attend(term, (q, *(jnp.swapaxes(x, 1, 2) for x in (k, v))), given, dense)
    pages = None
    if case.page:
        k, v, pages = case.pages(k, v)
    return attend_few(term, (q, k, v), given, setting, pages), expected


def check(found, expected, atol=1e-5):
    np.testing.assert_allclose(found.out, expected.out, atol=atol)
    np.testing.assert_allclose(found.lse, expected.lse, atol=atol)


def ring(length, last):
    """The positions in the slots of a ring whose last position is ``last``."""
    slot = np.arange(length)
    position = last - (last - slot) % length
    return np.where(position < 0, -1, position)


CASES = {
    "a window": Case(),
    "three queries": Case(queries=3, heads=(5, 1), at=(0, 34)),
    "thirteen queries": Case(sa.causal(), queries=13, heads=(2, 2), at=(3, 24)),
    "one position": Case(sa.causal() & sa.strided(3), shared=True),
    "two maps in a group": Case(TWO, queries=3),
    "two maps": Case(TWO, queries=2, heads=(4, 4), shared=True),
    "no positions": Case(sa.full(), queries=2, slots=13),
    "nothing": Case(sa.causal() & ~sa.causal(), slots=13),
    "long": Case(sa.causal(), slots=1301, at=(700, 1300)),
    "a ring": Case(
        RING, at=(4, 33), given={"slot": [ring(13, 4), ring(13, 33)]}, slots=13
    ),
    "sinks and a cap": Case(
        sa.softmax(NEAR, logits_soft_cap=2.0, sink=True),
        given={"sink": np.linspace(-1, 1, 4)},
    ),
    "a bias": Case(sa.softmax(NEAR, bias=sa.alibi())),
    "a bias, three queries": Case(sa.softmax(NEAR, bias=sa.alibi()), queries=3),
    "a scale": Case(sa.softmax(NEAR, scale=GROWING), queries=3),
    "pages": Case(NEAR, slots=40, page=8, queries=3),
    "pages of an odd size": Case(sa.causal(), slots=39, page=13, shared=True),
    "pages and two maps": Case(TWO, slots=48, page=8, heads=(4, 4)),
    "segments": Case(
        sa.causal() & sa.segments(),
        queries=2,
        given={
            "q_segment_ids": np.ones((2, 2), "int32"),
            "kv_segment_ids": np.repeat(np.arange(2)[None], 2, 0).repeat(19, 1)[:, 1:],
        },
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CASES)
def test_xla_equals_the_dense_path(name):
    check(*outcomes(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["triton", "tpu"])
def test_kernels_equal_the_dense_path(name, impl):
    case = CASES[name]
    if case.page:
        # A page of a TPU has at least a tile.
        page = 128 if impl == "tpu" else 16
        case = replace(case, page=page, slots=4 * page, at=(page + 3, 3 * page))
    config = sa.KernelConfig(block_q=16, block_kv=16)
    check(*outcomes(case, impl, config=config))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "triton", "tpu"])
def test_unused_slots_may_hold_nan(impl):
    case = Case(queries=3)
    q, k, v = case.arrays()
    term, given = case.term()
    setting = Setting(0.3, impl=impl, interpret=impl != "xla")
    used = (np.arange(37) < np.array([[8], [23]]))[:, None, :, None]
    caches = [jnp.where(used, x, jnp.nan) for x in (k, v)]
    expected = attend_few(term, (q, k, v), given, setting)
    check(attend_few(term, (q, *caches), given, setting), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    case = Case(sa.causal(), slots=1301, at=(700, 1300), queries=3)
    found, expected = outcomes(case, dtype=dtype)
    wide = [x.out.astype("float32") for x in (found, expected)]
    np.testing.assert_allclose(*wide, atol=2e-2)


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        check(*outcomes(Case(queries=3), dtype="float64"), atol=1e-12)


def latent(term, queries=2):
    rng = np.random.default_rng(2)
    q, k = (
        jnp.asarray(rng.normal(size=shape), "float32")
        for shape in ((2, queries, 4, 24), (2, 1, 37, 24))
    )
    term, given = traced_offset.with_offset(term, jnp.array([5, 20]), {}, 2)
    return term, given, q, k


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "triton", "tpu", "reference"])
def test_values_among_the_keys(impl):
    term, given, q, k = latent(sa.softmax(sa.causal(), values=slice(0, 16)))
    setting = Setting(0.3, impl=impl, interpret=impl in ("triton", "tpu"))
    keys = jnp.swapaxes(k, 1, 2)
    dense = Setting(0.3, impl="reference")
    expected = attend(term, (q, keys, keys), given, dense)
    check(attend_few(term, (q, k, None), given, setting), expected)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "triton", "tpu"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_choice_that_was_made_before(impl, block):
    q, k, v = Case(queries=3).arrays()
    spec = sa.causal() & sa.topk(8 // block, block=block, block_q=1)
    keys = [jnp.swapaxes(x, 1, 2) for x in (k, v)]
    given = sa.select(spec, q, keys[0], q_offset=30)
    setting = Setting(0.3, 30, impl, interpret=impl != "xla")
    dense = replace(setting, impl="reference", interpret=False)
    term = any_term(spec)
    expected = attend(term, (q, *keys), given, dense)
    check(attend_few(term, (q, k, v), given, setting), expected)


def test_time_follows_the_visited_blocks():
    """The steps of the loop on CPUs, counted while it runs."""
    count, scores = 0, tile.scores

    def counted(*args):
        def add():
            nonlocal count
            count += 1

        jax.debug.callback(add)
        return scores(*args)

    def steps(spec, at):
        nonlocal count
        count = 0
        case = Case(spec, slots=4096, at=at, heads=(2, 1))
        term, given = case.term()
        out = attend_few(term, tuple(case.arrays()), given, Setting(0.3))
        jax.block_until_ready(out)
        jax.effects_barrier()
        return count

    with mock.patch.object(tile, "scores", counted):
        block = few_queries.KEYS
        assert steps(sa.causal(), (0, 4095)) == 1 + 4096 // block
        assert steps(sa.causal(), (block - 1, block)) == 1 + 2
        near = sa.causal() & (sa.window(511) | sa.sinks(4))
        assert steps(near, (100, 4095)) == 1 + 2


def test_what_is_refused():
    q, k, v = Case().arrays()
    term, given = Case().term()
    pages = jnp.zeros((2, 3), jnp.int32)

    def refused(
        error, match, *, inputs=(q, k, v), of=term, known=given, pages=None, **options
    ):
        setting = Setting(**{"sm_scale": 0.3, **options})
        with pytest.raises(error, match=match):
            attend_few(of, inputs, known, setting, pages)

    refused(ValueError, r"q has shape .*, 8\) and k", inputs=(q, k[..., :4], v))
    refused(ValueError, "3 query heads.*2 key heads", inputs=(q[:, :, :3], k, v))
    half = q.astype("bfloat16")
    refused(ValueError, "bfloat16 and the cache float32: cast q", inputs=(half, k, v))
    refused(ValueError, "v has shape None", inputs=(q, k, None))
    refused(ValueError, "v has shape", inputs=(q, k, v[:, :, 1:]))
    refused(
        ValueError, "2 batch entries of q, and 1 of the cache", inputs=(q, k[:1], v[:1])
    )
    refused(ValueError, r"pages have shape \(1, 3\)", pages=pages[:1])
    refused(TypeError, "float32: pass integers", pages=pages.astype("float32"))
    wide = sa.softmax(sa.causal(), values=slice(0, 9))
    refused(ValueError, "values from 8 channels", of=wide)
    refused(NotImplementedError, "no dropout", dropout_rate=0.5)
    refused(NotImplementedError, "sm_scale as a Python", sm_scale=jnp.float32(1))
    refused(NotImplementedError, "reads no pages", pages=pages, impl="reference")
    refused(ValueError, "page_size=37: impl='tpu'", pages=pages, impl="tpu")
    refused(ValueError, "page_size=37: impl='triton'", pages=pages, impl="triton")
    config = sa.KernelConfig(block_kv=16)
    refused(
        ValueError, "block_kv=16 does not divide a page", pages=pages, config=config
    )
    chosen = any_term(sa.causal() & sa.topk(1, block=8))
    refused(
        ValueError, r"topk.*does not choose here.*sadsl\.select", of=chosen, known={}
    )


def test_there_is_no_gradient():
    q, k, v = Case().arrays()
    term, given = Case().term()

    def loss(q):
        return attend_few(term, (q, k, v), given, Setting(0.3)).out.sum()

    with pytest.raises(NotImplementedError, match=r"no gradient.*sadsl\.attention"):
        jax.grad(loss)(q)
