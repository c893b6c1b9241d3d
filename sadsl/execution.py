"""How a checked call runs: what content decides, the order, the plan, the kernels."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering import bits, hoist, ir, pipeline, score_values, scores, sort, verify
from lowering import select as run_time
from lowering.kernel_predicate import KernelPredicate
from lowering.pipeline import Problem, Stages
from lowering.verify_scores import verify_scores
from pallas_kernels import dispatch
from pallas_kernels.call import Call, Inputs, Masks, Vectors
from pallas_kernels.config import KernelConfig, Tiles
from pallas_kernels.precision import wide, widened
from sadsl import checks, dropout, reference
from sadsl.selections.content import (
    Content,
    Selection,
    choose,
    operands_of,
    selections_of,
)
from sadsl.symbolic_batch import KNOWN_SIZES, entry_by_entry, is_symbolic
from sadsl.term import DROPOUT_KEY, TRACED_SCALE
from sadsl.terms import Softmax


@dataclass(frozen=True)
class Options:
    """The static part of a call, as one hashable value.

    ``sm_scale`` is None where the scale is among the arrays.
    """

    term: Softmax
    problem: Problem
    sm_scale: Any
    impl: str
    interpret: Hashable = False
    config: KernelConfig = field(default_factory=KernelConfig)
    dropout_rate: float = 0.0

    @cached_property
    def selections(self) -> tuple[Selection, ...]:
        """The parts of the map that are decided by content."""
        return selections_of(self.term)

    @cached_property
    def read(self) -> frozenset[str]:
        """The arrays that the simplified map still reads."""
        maps = self.stages["simplify"].maps
        return frozenset(name for node in maps for name in ir.operand_names(node))

    @cached_property
    def asked(self) -> dict[str, int]:
        """The arrays of floats that selections and the bias read, with their axes."""
        own = {} if self.term.bias is None else self.term.bias.operands
        return {n: r for s in self.selections for n, r in s.operands.items()} | own

    @cached_property
    def of_bias(self) -> dict[str, int]:
        """All run-time arrays that the bias reads, integers too."""
        bias = self.term.bias
        return {} if bias is None else {**bias.operands, **bias.integer_operands}

    @cached_property
    def score(self) -> scores.Score | None:
        """The bias as an expression."""
        bias = self.term.bias
        return None if bias is None else bias.score(self.problem.num_heads)

    @property
    def lowered_score(self) -> scores.Lowered | None:
        """The bias as kernels take it."""
        if self.score is None:
            return None
        return scores.lower(self.score, self.problem)

    @property
    def keeps_order(self) -> bool:
        """Whether positions stay as given: a bias is made for pairs in that order."""
        return self.config.relayout is False or self.term.bias is not None

    @property
    def stages(self) -> Stages:
        """The lowered map in the given order of positions, every stage kept."""
        return pipeline.run(self.term.map.node, self.problem)

    @cached_property
    def sorted_by(self) -> sort.Keys | None:
        """The labels that positions are sorted by at run time, if they are."""
        orders = [
            (s.key(s.order["q"]), s.key(s.order["k"]))
            for s in self.selections
            if s.order
        ]
        if not orders or self.keeps_order:
            return None
        return sort.keys(self.stages["simplify"], orders)

    def arranged(self, tiles: Tiles) -> Stages:
        """The lowered map in the order of positions that kernels work in."""
        if self.keeps_order:
            return self.stages
        if self.sorted_by is not None:
            return sort.sorted_stages(self.stages)
        forward = tiles.forward
        return pipeline.arrange(self.stages, forward.block_q, forward.block_kv)


@partial(jax.jit, static_argnames=("options",))
def traced(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *, options: Options
) -> tuple[Array, Array]:
    """Output and lse of a checked call; ``arrays`` have a batch axis.

    With dropout, the words of its key are among them.
    """
    differ = options.selections or options.dropout_rate
    differ = differ or any(x.ndim and is_symbolic(x) for x in arrays.values())
    if is_symbolic(q) and (differ or options.impl in KNOWN_SIZES):
        if options.dropout_rate:
            entry = jnp.arange(q.shape[0], dtype=jnp.int32)
            arrays = {**arrays, dropout.ENTRY: entry}
        return entry_by_entry(partial(_run, options=options), q, k, v, arrays)
    return _run(q, k, v, arrays, options=options)


def _run(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], *, options: Options
) -> tuple[Array, Array]:
    known = {*options.of_bias, DROPOUT_KEY, dropout.ENTRY}
    own = {name: x for name, x in arrays.items() if name in known}
    chosen = {**with_parts(q, k, arrays, options), **own}
    run = _dense if options.impl == "reference" else _kernels
    if options.sm_scale is not None:
        return run(q, k, v, chosen, options)
    # Kernels have their scale as a constant. All three are widened: the product of q
    # and the scale is not rounded, and kernels take arrays of one dtype.
    dtype, scale = q.dtype, arrays[TRACED_SCALE]
    q, k, v = map(widened, (q, k, v))
    q = q * scale.astype(q.dtype)
    out, lse = run(q, k, v, chosen, replace(options, sm_scale=1.0))
    return out.astype(dtype), lse


def with_parts(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> Mapping[str, Array]:
    """The arrays that the map reads, what content decides among them.

    A choice that simplification has removed from the map is not made.
    """
    if not options.selections:
        return arrays
    read = options.read
    needed = tuple(s for s in options.selections if any(map(s.owns, read)))
    arrays = {**arrays, **choose(needed, content_of(q, k, arrays, options))}
    known = operands_of(options.term.map)
    arrays = {name: x for name, x in arrays.items() if name in known}
    mine = {name: x for name, x in arrays.items() if name in read}
    check_operands(mine, options.stages)
    return arrays


def chosen_parts(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> dict[str, Array]:
    """What the selections of a call choose, by the names that its map reads."""

    def chosen(q: Array, k: Array, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return choose(options.selections, content_of(q, k, arrays, options))

    if is_symbolic(q):
        return entry_by_entry(chosen, q, k, arrays)
    return chosen(q, k, arrays)


def content_of(
    q: Array, k: Array, arrays: Mapping[str, Array], options: Options
) -> Content:
    """What selections may look at."""
    scale = arrays[TRACED_SCALE] if options.sm_scale is None else options.sm_scale
    return Content(
        q=jnp.swapaxes(q, 1, 2),
        k=jnp.swapaxes(k, 1, 2),
        given=arrays,
        sm_scale=scale,
        q_offset=options.problem.q_offset,
    )


def _dense(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    problem = options.problem
    program = options.stages["resolve_heads"]
    maps = tuple(without_missing(node, arrays) for node in program.maps)
    # An operand indexed by the head reads the head at hand.
    nodes = tuple(
        ir.substitute(maps[m], {"h": ir.Const(head)})
        for head, m in enumerate(program.map_of_head)
    )
    allowed = reference.pairs(nodes, problem.q_seq_len, problem.kv_seq_len, arrays)
    factor, rate = None, options.dropout_rate
    if rate:
        dtype = wide(q.dtype)
        factor = dropout.of_all_pairs(arrays, q.shape[0], problem, rate, dtype)
    return reference.attention(
        q, k, v, allowed,
        sm_scale=options.sm_scale, logits_soft_cap=options.term.logits_soft_cap,
        bias=_dense_bias(arrays, options, q.dtype), factor=factor,
    )  # fmt: skip


def without_missing(node: ir.Pred, arrays: Mapping[str, Array]) -> ir.Pred:
    """The map as it is written, with 0 for the arrays that are not there.

    ``check_operands`` has made sure that the map does not depend on those.
    """

    def change(part: Any) -> Any:
        if isinstance(part, ir.Operand) and part.name not in arrays:
            return ir.Const(0)
        return ir.rebuild(part, change)

    return change(node)


def _dense_bias(
    arrays: Mapping[str, Array], options: Options, dtype: Any
) -> Array | None:
    """The bias of every pair, straight from its expression."""
    if options.score is None:
        return None
    problem = options.problem
    places = score_values.Places(
        jnp.arange(problem.q_seq_len, dtype=jnp.int32)[None, None, :, None],
        jnp.arange(problem.kv_seq_len, dtype=jnp.int32)[None, None, None, :],
        problem,
        arrays,
        dtype=wide(dtype),
    )
    return score_values.dense(scores.resolved(options.score, problem), places)


def _kernels(
    q: Array, k: Array, v: Array, arrays: Mapping[str, Array], options: Options
) -> tuple[Array, Array]:
    tiles = choose_tiles(options, q.shape[-1], v.shape[-1], q.dtype)
    dtype = wide(q.dtype)
    ready = prepare(arrays, options, tiles, dtype)
    layouts, orders = ready.stages.layouts, ready.orders
    if layouts is not None:
        # Before the heads come to the front: the two are one change of layout.
        q = layouts.q.to_slots(q, 1)
        k, v = (layouts.kv.to_slots(x, 1) for x in (k, v))
    if orders is not None:
        q, k, v = orders.to_slots(q, k, v)
    inputs = Inputs(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    call, vectors = kernel_call(options, ready.stages, tiles, dtype), ready.vectors
    if options.dropout_rate:
        order, problem = layouts or orders, options.problem
        vectors = dropout.with_seeds(vectors, arrays, q.shape[0], problem, order)
    o, lse = dispatch.attend(inputs, vectors, ready.masks, call, impl=options.impl)
    o = jnp.swapaxes(o, 1, 2)
    if layouts is not None:
        o, lse = layouts.q.to_positions(o, 1), layouts.q.to_positions(lse, 2)
    if orders is not None:
        o, lse = orders.to_positions(o, lse)
    return o, lse


class Prepared(NamedTuple):
    """A call but for q, k and v: the map in its order, what it reads, its plans."""

    stages: Stages
    vectors: Vectors
    masks: Masks
    orders: sort.Orders | None


def prepare(
    arrays: Mapping[str, Array],
    options: Options,
    tiles: Tiles,
    dtype: Any = jnp.float32,
) -> Prepared:
    """The order, the vectors and the plans, made at run time where content decides."""
    stages, orders = options.arranged(tiles), None
    if options.sorted_by is not None:
        orders = sort.orders(options.sorted_by, options.stages["simplify"], arrays)
        arrays = {**arrays, **orders.operands}
    vectors = call_vectors(stages, arrays, tiles)
    lowered = options.lowered_score
    if lowered is not None:
        added = score_values.values(lowered, options.problem, arrays, dtype)
        vectors = vectors._replace(scores=added)
    if run_time.is_run_time(stages):
        masks = run_time.masks(stages, tiles, vectors)
    else:
        masks = pipeline.masks(stages, tiles)
    return Prepared(stages, vectors, masks, orders)


def call_vectors(stages: Stages, arrays: Mapping[str, Array], tiles: Tiles) -> Vectors:
    """The vectors and bits that the predicate reads, computed from the operands."""
    program = stages["hoist"]
    lengths = program.problem.q_seq_len, program.problem.kv_seq_len
    heads_, block_kv = program.problem.num_heads, tiles.forward.block_kv
    return Vectors(
        hoist.vectors(program.q_vectors, lengths[0], heads_, arrays),
        hoist.vectors(program.kv_vectors, lengths[1], heads_, arrays),
        bits.pack(program.bits, lengths, block_kv, heads_, arrays),
    )


def kernel_call(
    options: Options, stages: Stages, tiles: Tiles, dtype: Any = jnp.float32
) -> Call:
    """The static part of the kernel call."""
    score = options.lowered_score
    return Call(
        predicate=KernelPredicate(stages["hoist"].maps),
        sm_scale=options.sm_scale,
        tiles=tiles,
        logits_soft_cap=options.term.logits_soft_cap,
        interpret=options.interpret,
        scores=None if score is None else replace(score.kernel, dtype=dtype),
        learned_scores=score is not None and score.learned,
        dropout_rate=options.dropout_rate,
    )


def choose_tiles(options: Options, head_dim: int, head_dim_v: int, dtype: Any) -> Tiles:
    """The block sizes of a call: the config's, else the backend's for these sizes."""
    backend, problem = dispatch.BACKENDS[options.impl], options.problem
    lengths = problem.q_seq_len, problem.kv_seq_len
    defaults = backend.default_tiles(lengths, head_dim, head_dim_v, dtype)
    if not options.stages["hoist"].bits:
        return options.config.resolve(defaults)
    # Bits are packed for blocks of keys: the smallest fits the registers of all three.
    smallest = min(t.block_kv for t in (defaults.forward, defaults.dq, defaults.dkv))
    tiles = options.config.resolve(defaults.with_block_kv(smallest))
    sizes = tiles.forward.block_kv, tiles.dq.block_kv, tiles.dkv.block_kv
    if len(set(sizes)) > 1:
        raise ValueError(
            f"config: block_kv is {sizes[0]} in the forward kernel, {sizes[1]} in dq "
            f"and {sizes[2]} in dkv, but {options.term!r} looks up pairs in a run-time "
            "array, which is packed for one block_kv: name the same in all three"
        )
    return tiles


def call_arrays(
    options: Options, operands: Mapping[str, Any] | None, ids: tuple, batch: int
) -> dict[str, Array]:
    """The run-time arrays of a call with a batch axis, checked against its map."""
    arrays = checks.operand_arrays(operands, *ids, floats=frozenset(options.asked))
    ranks = operand_ranks(options, arrays)
    fitted = checks.with_batch_axis(arrays, ranks, batch)
    check_given(fitted, options)
    return fitted


def check_given(arrays: Mapping[str, Any], options: Options) -> None:
    """Checks the arrays of a caller, but for what selections check or make."""
    chosen = options.selections
    known = {*options.asked, *options.of_bias, *operands_of(options.term.map)}
    if options.score is not None:
        shapes = {n: x.shape[1:] for n, x in arrays.items() if n in options.of_bias}
        verify_scores(options.score, options.problem, shapes)
    mine = {
        name: x
        for name, x in arrays.items()
        if name in options.read or name not in known
        if not any(s.owns(name) for s in chosen)
    }
    check_operands(mine, options.stages, made=chosen)


def operand_ranks(options: Options, arrays: Mapping[str, Any]) -> dict[str, int]:
    """The axes of each array beside the batch: as many as it is indexed by.

    The map is taken as it was written: simplification may remove what reads an array,
    which a caller passes all the same. An array that nothing reads is refused later.
    """
    unread = {name: x.ndim for name, x in arrays.items()}
    written = operands_of(options.term.map)
    return {**unread, **written, **options.asked, **options.of_bias}


def check_operands(
    arrays: Mapping[str, Any], stages: Stages, made: tuple[Selection, ...] = ()
) -> None:
    """Checks arrays ``[batch or 1, ...]`` against what the map reads.

    The parts of the selections ``made`` need not be there yet.
    """
    program = stages["simplify"]
    problem = program.problem
    shapes = {name: tuple(x.shape[1:]) for name, x in arrays.items()}
    needed = {
        n
        for node in program.maps
        for n in ir.walk(node)
        if isinstance(n, ir.Operand) and not any(s.owns(n.name) for s in made)
    }
    lengths = problem.q_seq_len, problem.kv_seq_len
    verify.verify_operands(needed, *lengths, shapes, problem.num_heads)
