"""Cases for the kernels: patterns and shapes, built without the compiler."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import dispatch
from pallas_kernels.block_mask import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockMask,
    blank,
    from_blocks,
)
from pallas_kernels.call import Call, Inputs, Masks, Vectors
from pallas_kernels.config import Tile, Tiles


@dataclass(frozen=True)
class Pattern:
    """A named predicate; ``maps`` > 1 gives heads different maps."""

    name: str
    maps: int = 1
    segments: bool = False

    def __call__(self, index, q, k, q_vectors, kv_vectors, bits=()):
        match self.name:
            case "full":
                return (q >= 0) & (k >= 0)
            case "causal":
                return k <= q
            case "window":
                return (k <= q) & (q - k <= 37)
            case "sinks":
                return (k <= q) & ((q - k <= 20) | (k < 5))
            case "holes":  # rows 40 to 79 are empty, and so are keys 10 to 19
                q_kept, k_kept = (q < 40) | (q >= 80), (k < 10) | (k >= 20)
                return q_kept & k_kept & ((q // 32 + k // 32) % 2 == 0)
            case "empty":
                return (q < 0) & (k < 0)
            case "strided":
                return (k <= q) & ((q - k) % 7 == 0)
            case "segments":
                return (k <= q) & (q_vectors[0] == kv_vectors[0])
            case "two maps":
                near, far = (k <= q) & (q - k <= 9), (k <= q) & (k % 3 == 0)
                return jnp.where(jnp.asarray(index) == 0, near, far)
        raise ValueError(self.name)


PATTERNS = [
    Pattern(n)
    for n in ("full", "causal", "window", "sinks", "holes", "empty", "strided")
] + [Pattern("segments", segments=True), Pattern("two maps", maps=2)]


@dataclass(frozen=True, kw_only=True)
class Case:
    pattern: Pattern = Pattern("causal")
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = 130
    kv_len: int = 130
    dim: int = 16
    dim_v: int = 16
    dtype: str = "float32"
    soft_cap: float | None = None
    forward: Tile = field(default_factory=lambda: Tile(block_q=32, block_kv=32))
    dkv: Tile = field(default_factory=lambda: Tile(block_q=16, block_kv=32))
    seed: int = 0

    def __str__(self):
        heads = f"h{self.q_heads}/{self.kv_heads}"
        size = f"{self.q_len}x{self.kv_len}-d{self.dim}/{self.dim_v}"
        return f"{self.pattern.name}-{heads}-{size}-{self.dtype}-cap{self.soft_cap}"

    def map_of_head(self):
        return np.arange(self.q_heads) * self.pattern.maps // self.q_heads

    def segment_ids(self):
        """Different in every batch row and unsorted across documents."""
        rng = np.random.default_rng(self.seed)
        cut = rng.integers(1, 40, (2, self.batch, 1))
        q = np.arange(self.q_len) // cut[0]
        kv = np.arange(self.kv_len) // cut[1] * 2
        return q.astype(np.int32), kv.astype(np.int32)

    def vectors(self):
        if not self.pattern.segments:
            return Vectors()
        q, kv = self.segment_ids()
        return Vectors((jnp.asarray(q)[:, None],), (jnp.asarray(kv)[:, None],))

    def pairs(self):
        """bool [batch or 1, heads, q, kv], straight from the predicate in NumPy."""
        q, k = np.arange(self.q_len)[:, None], np.arange(self.kv_len)[None, :]
        vectors = [((), ())]
        if self.pattern.segments:
            ids_q, ids_kv = self.segment_ids()
            vectors = [
                ((a[:, None],), (b[None, :],))
                for a, b in zip(ids_q, ids_kv, strict=True)
            ]
        rows = [
            [
                np.asarray(self.pattern(np.int32(m), q, k, *xs))
                for m in self.map_of_head()
            ]
            for xs in vectors
        ]
        return np.array(rows)

    def mask(self, tile: Tile, by="q") -> BlockMask:
        """Exact runs, from all pairs; blocks of run-time predicates are partial."""
        like = blank(self.q_len, self.kv_len, tile.block_q, tile.block_kv, by)
        pairs = self.pairs()
        maps = self.map_of_head()
        first = [int(np.argmax(maps == m)) for m in range(self.pattern.maps)]
        some, every = pairs.any(axis=0)[first], pairs.all(axis=0)[first]
        bq, bk = tile.block_q, tile.block_kv
        kinds = np.zeros((len(first), like.num_q_blocks, like.num_kv_blocks), np.int8)
        for i in range(like.num_q_blocks):
            for j in range(like.num_kv_blocks):
                at = np.s_[:, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
                full = every[at].all(axis=(1, 2)) & ((j + 1) * bk <= self.kv_len)
                full &= not self.pattern.segments
                hit = some[at].any(axis=(1, 2))
                kinds[:, i, j] = np.where(full, FULL, np.where(hit, PARTIAL, EMPTY))
        if by == "kv":
            kinds = np.swapaxes(kinds, 1, 2)
        return from_blocks(kinds, map_of_head=maps, like=like)

    def masks(self):
        return Masks(
            self.mask(self.forward), self.mask(self.forward), self.mask(self.dkv, "kv")
        )

    def call(self, **options) -> Call:
        tiles = Tiles(forward=self.forward, dq=self.forward, dkv=self.dkv)
        scale = self.dim**-0.5
        return Call(self.pattern, scale, tiles, self.soft_cap, **options)

    def arrays(self):
        """Inputs, do, dlse."""
        rng = np.random.default_rng(self.seed)
        shapes = [
            (self.batch, self.q_heads, self.q_len, self.dim),
            (self.batch, self.kv_heads, self.kv_len, self.dim),
            (self.batch, self.kv_heads, self.kv_len, self.dim_v),
            (self.batch, self.q_heads, self.q_len, self.dim_v),
        ]
        q, k, v, do = (jnp.asarray(rng.normal(size=s), self.dtype) for s in shapes)
        dlse = jnp.asarray(rng.normal(size=do.shape[:-1]), jnp.float32)
        return Inputs(q, k, v), do, dlse

    def expected(self):
        inputs, do, dlse = self.arrays()
        scale = self.dim**-0.5
        pairs = self.pairs()
        return oracle.with_gradients(
            *inputs, pairs, scale, self.soft_cap, do=do, dlse=dlse
        )

    def actual(self, impl, **options):
        """Values and gradients through ``dispatch.attend``, jitted."""
        inputs, do, dlse = self.arrays()
        vectors, masks, call = self.vectors(), self.masks(), self.call(**options)

        @jax.jit
        def run(inputs, vectors, do, dlse):
            def f(inputs):
                return dispatch.attend(inputs, vectors, masks, call, impl=impl)

            out, pull = jax.vjp(f, inputs)
            (gradients,) = pull(type(out)(do, dlse))
            return (*out, *gradients)

        return oracle.Result(*run(inputs, vectors, do, dlse))

    def check(self, impl, **options):
        """Every value and gradient against float64, at the tolerance of the dtype."""
        actual, expected = self.actual(impl, **options), self.expected()
        for name, a, b in zip(actual._fields, actual, expected, strict=True):
            oracle.assert_close(a, b, self.dtype, f"{self} {name}")


def params() -> list:
    """The table for ``parametrize``; cases that others nearly cover are ``slow``."""
    return [
        pytest.param(case, marks=pytest.mark.slow if near else ())
        for case, near in ((case, _is_near(case)) for case in table())
    ]


def _is_near(case: Case) -> bool:
    grouped = case.q_heads == 4 and case.kv_heads == 2
    if case.dtype == "float16":
        return case.pattern != PATTERNS[2]
    if grouped:
        return PATTERNS.index(case.pattern) % 2 == 0
    return (case.q_len, case.kv_len) in ((13, 13), (13, 130), (257, 257)) and (
        case.pattern == PATTERNS[4]
    )


def table() -> list[Case]:
    """Map x shape x dtype x GQA: every backend passes all of it."""
    base = Case()
    cases = [replace(base, pattern=p) for p in PATTERNS]
    cases += [replace(base, pattern=p, q_heads=4, kv_heads=2) for p in PATTERNS]
    cases += [
        replace(base, pattern=p, dtype=t, q_heads=4, kv_heads=1)
        for p in PATTERNS[2:5]
        for t in ("bfloat16", "float16")
    ]
    cases += [
        replace(base, pattern=p, q_len=a, kv_len=b, batch=1, q_heads=1, kv_heads=1)
        for p in (PATTERNS[2], PATTERNS[4])
        for a, b in ((1, 1), (13, 13), (257, 257), (13, 130), (130, 13))
    ]
    cases += [
        replace(base, dim=16, dim_v=32, soft_cap=5.0),
        replace(base, dim=64, dim_v=16, pattern=PATTERNS[3]),
        replace(base, dim=24, dim_v=40, pattern=PATTERNS[3], soft_cap=2.0),
    ]
    return cases
