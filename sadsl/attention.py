"""``attention`` and ``plan``: check, build nodes, lower, call."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer

from lowering import hoist, ir, pipeline, verify
from lowering.counts import Plan
from lowering.kernel_predicate import KernelPredicate
from lowering.pipeline import Problem, Stages
from pallas_kernels import dispatch
from pallas_kernels.call import Call, Inputs, Vectors
from pallas_kernels.config import KernelConfig, Tiles
from sadsl import checks, reference
from sadsl.maps import IndexMap
from sadsl.terms import Softmax, Spec
from sadsl.text import parse

IMPLS = ("reference", *dispatch.BACKENDS)
PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "tpu": ("tpu",), "triton": ("gpu",)}
DEFAULT_IMPL = {"cpu": "xla", "tpu": "tpu", "gpu": "triton"}


@dataclass(frozen=True)
class Options:
    """The static part of a call, as one hashable value."""

    term: Softmax
    problem: Problem
    sm_scale: float
    impl: str
    interpret: Hashable = False
    config: KernelConfig = field(default_factory=KernelConfig)

    @property
    def stages(self) -> Stages:
        """The lowered map in the given order of positions, every stage kept."""
        return pipeline.run(self.term.map.node, self.problem)

    def arranged(self, tiles: Tiles) -> Stages:
        """The lowered map in the order of positions that kernels work in."""
        if self.config.relayout is False:
            return self.stages
        forward = tiles.forward
        return pipeline.arrange(self.stages, forward.block_q, forward.block_kv)


def attention(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    v: Float[Array, "batch kv_seq num_kv_heads head_dim_v"],
    spec: Spec | str,
    *,
    q_segment_ids: Integer[Array, "..."] | None = None,
    kv_segment_ids: Integer[Array, "..."] | None = None,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    q_offset: int = 0,
    return_lse: bool = False,
    impl: str | None = None,
    interpret: Any = False,
    config: KernelConfig | None = None,
) -> (
    Float[Array, "batch q_seq num_q_heads head_dim_v"]
    | tuple[
        Float[Array, "batch q_seq num_q_heads head_dim_v"],
        Float32[Array, "batch num_q_heads q_seq"],
    ]
):
    """Attention over the pairs that ``spec`` selects.

    ``jit``, ``grad``, ``vmap``, ``jax.checkpoint`` and ``shard_map`` (over batch or
    heads, ``check_vma=False``) work. A query that selects no key yields 0, and
    ``lse == -inf``. Lengths need not be multiples of a block.

    Args:
      q, k, v: float32, bfloat16 or float16, all of one dtype; the number of heads of q
        is a multiple of that of k and v. Products accumulate in float32.
      spec: an index map, ``softmax(map, ...)``, or their text.
      q_segment_ids, kv_segment_ids: integers ``[batch, seq]`` for ``segments()``.
      operands: run-time integer arrays by name, for maps made of ``operand(name)``.
      sm_scale: factor before the softmax; ``head_dim ** -0.5`` if None.
      q_offset: the position of the first query, as decoding needs.
      return_lse: also return the natural log-sum-exp, f32; it has a gradient.
      impl: "xla", "tpu", "triton", "reference" (dense), or None for the default device.
      interpret: run Pallas kernels in an interpreter (True, or its parameters).
      config: block sizes and pipelining; never changes the result.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it; nothing falls back silently.
    """
    term = as_term(spec)
    problem = checks.problem(q, k, v, q_offset)
    options = Options(
        term=term,
        problem=problem,
        sm_scale=float(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale),
        impl=choose_impl(impl, interpret, q, k, v),
        interpret=interpret,
        config=config or KernelConfig(),
    )
    arrays = checks.operand_arrays(operands, q_segment_ids, kv_segment_ids)
    arrays = fit_operands(arrays, options.stages, q.shape[0])
    out, lse = traced(q, k, v, arrays, options=options)
    return (out, lse) if return_lse else out


@partial(jax.jit, static_argnames=("options",))
def traced(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *, options: Options
) -> tuple[Array, Array]:
    """Output and lse of a checked call; ``arrays`` have a batch axis."""
    run = _dense if options.impl == "reference" else _kernels
    return run(q, k, v, arrays, options)


def _dense(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    problem = options.problem
    program = options.stages["resolve_heads"]
    nodes = tuple(program.maps[m] for m in program.map_of_head)
    # An operand indexed by the head reads the head at hand.
    nodes = tuple(
        ir.substitute(node, {"h": ir.Const(head)}) for head, node in enumerate(nodes)
    )
    allowed = reference.pairs(nodes, problem.q_seq_len, problem.kv_seq_len, arrays)
    out, lse = reference.attention(
        q, k, v, allowed,
        sm_scale=options.sm_scale, logits_soft_cap=options.term.logits_soft_cap,
    )  # fmt: skip
    return out, lse.astype(jnp.float32)


def _kernels(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    if q.dtype == jnp.float64:
        raise NotImplementedError(
            f"impl={options.impl!r} takes float32, bfloat16 or float16, not float64: "
            "cast, or use impl='reference'"
        )
    tiles = choose_tiles(options, q.shape[-1], v.shape[-1], q.dtype)
    stages = options.arranged(tiles)
    layouts = stages.layouts
    if layouts is not None:
        # Before the heads come to the front: the two are one change of layout.
        q = layouts.q.to_slots(q, 1)
        k, v = (layouts.kv.to_slots(x, 1) for x in (k, v))
    inputs = Inputs(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    vectors = call_vectors(stages, arrays)
    masks = pipeline.masks(stages, tiles)
    call = kernel_call(options, stages, tiles)
    o, lse = dispatch.attend(inputs, vectors, masks, call, impl=options.impl)
    o = jnp.swapaxes(o, 1, 2)
    if layouts is not None:
        o, lse = layouts.q.to_positions(o, 1), layouts.q.to_positions(lse, 2)
    return o, lse


def call_vectors(stages: Stages, arrays: Mapping[str, Array]) -> Vectors:
    """The vectors that the predicate of a call reads, computed from its operands."""
    program = stages["hoist"]
    problem = program.problem
    heads_ = problem.num_heads
    return Vectors(
        hoist.vectors(program.q_vectors, problem.q_seq_len, heads_, arrays),
        hoist.vectors(program.kv_vectors, problem.kv_seq_len, heads_, arrays),
    )


def kernel_call(options: Options, stages: Stages, tiles: Tiles) -> Call:
    """The static part of the kernel call."""
    return Call(
        predicate=KernelPredicate(stages["hoist"].maps),
        sm_scale=options.sm_scale,
        tiles=tiles,
        logits_soft_cap=options.term.logits_soft_cap,
        interpret=options.interpret,
    )


def choose_tiles(options: Options, head_dim: int, head_dim_v: int, dtype: Any) -> Tiles:
    """The block sizes of a call: the config's, else the backend's for these sizes."""
    backend = dispatch.BACKENDS[options.impl]
    defaults = backend.default_tiles(head_dim, head_dim_v, dtype)
    return options.config.resolve(defaults)


def choose_impl(impl: str | None, interpret: Any, *arrays: Any) -> str:
    """The backend of a call.

    Raises:
      ValueError: it does not exist, or concrete arrays lie where it cannot run.
    """
    if impl is None:
        impl = DEFAULT_IMPL.get(jax.default_backend(), "xla")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be None or one of {', '.join(IMPLS)}")
    concrete = not any(isinstance(x, jax.core.Tracer) for x in arrays)
    platform = jax.default_backend()
    runs_on = PLATFORMS.get(impl, (platform,))
    real = all(isinstance(x, jax.Array) for x in arrays)
    if concrete and real and not interpret and platform not in runs_on:
        raise ValueError(
            f"impl={impl!r} cannot run on the default device, which is of platform "
            f"{platform!r}: pass interpret=True to run its kernels in an interpreter, "
            "impl=None for a backend that fits, or use sadsl.lower(..., target=...) to "
            "compile it for another chip"
        )
    return impl


def fit_operands(
    arrays: Mapping[str, Array], stages: Stages, batch: int
) -> dict[str, Array]:
    """The run-time arrays with a batch axis, checked against what the map reads."""
    ranks = operand_ranks(stages, arrays)
    fitted = checks.with_batch_axis(arrays, ranks, batch)
    check_operands(fitted, stages)
    return fitted


def operand_ranks(stages: Stages, arrays: Mapping[str, Any]) -> dict[str, int]:
    """The axes of each array beside the batch: none if it is read bare, else one."""
    bare = {
        n.name
        for node in stages["simplify"].maps
        for n in ir.walk(node)
        if isinstance(n, ir.Operand) and n.index is None
    }
    return {name: 0 if name in bare else 1 for name in arrays}


def check_operands(arrays: Mapping[str, Any], stages: Stages) -> None:
    """Checks arrays ``[batch or 1, ...]`` against what the map reads."""
    program = stages["simplify"]
    problem = program.problem
    shapes = {name: tuple(x.shape[1:]) for name, x in arrays.items()}
    verify.verify_operands(
        program.maps, problem.q_seq_len, problem.kv_seq_len, shapes, problem.num_heads
    )


def as_term(spec: Spec | str) -> Softmax:
    """The term that a spec stands for."""
    if isinstance(spec, str):
        spec = parse(spec)
    if isinstance(spec, IndexMap):
        return Softmax(spec)
    if isinstance(spec, Softmax):
        return spec
    raise TypeError(
        f"spec={spec!r} must be an index map, softmax(map, ...), or the text of one"
    )


def plan(
    spec: Spec | str,
    q_seq_len: int,
    kv_seq_len: int | None = None,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    num_heads: int = 1,
    q_offset: int = 0,
    exact: bool = False,
    relayout: bool = True,
) -> Plan:
    """Which blocks a spec visits, computed from its expression: no arrays, no jit.

    The plan never misses a pair and never calls a block full that is not. Blocks that
    the analysis leaves open are looked into up to a budget; past it they count as
    partial, and ``exact=True`` looks into all of them. Where another order of the
    positions visits enough fewer blocks to pay for it, the plan is in that order, and
    ``plan.layouts`` says which.

    Args:
      spec: an index map, a term, or text.
      q_seq_len, kv_seq_len: numbers of queries and keys (``q_seq_len`` if None).
      block_q, block_kv: block sizes, any positive integers.
      num_heads: heads; maps that differ by head are planned once each.
      q_offset: the position of the first query.
      exact: settle every block, whatever it costs.
      relayout: look for a better order of positions; False keeps the given one.
    """
    kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
    sizes = {"q_seq_len": q_seq_len, "kv_seq_len": kv_seq_len, "block_q": block_q}
    sizes |= {"block_kv": block_kv, "num_heads": num_heads}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    problem = Problem(q_seq_len, kv_seq_len, num_heads, q_offset)
    given = pipeline.run(as_term(spec).map.node, problem)
    stages = pipeline.arrange(given, block_q, block_kv) if relayout else given
    return plan_of(stages, given, block_q, block_kv, exact=exact)


def plan_of(
    stages: Stages, given: Stages, block_q: int, block_kv: int, *, exact: bool = False
) -> Plan:
    """The plan of lowered stages, beside the counts of the given order."""
    found = _counted(stages, block_q, block_kv, exact)
    if stages.layouts is None:
        return found
    plain = _counted(given, block_q, block_kv, exact)
    counts = plain.num_full, plain.num_partial
    return replace(found, layouts=stages.layouts, given=counts, given_maps=plain.maps)


def _counted(stages: Stages, block_q: int, block_kv: int, exact: bool) -> Plan:
    # Spelt as the other callers do, so that all share one cached plan.
    options = (True,) if exact else ()
    mask = pipeline.block_mask(stages, block_q, block_kv, "q", *options)
    return Plan(stages.planned.maps, mask, stages.planned.problem.num_heads)
