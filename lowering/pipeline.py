"""Runs the passes that turn a map into a program and its plans; keeps every stage."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from lowering import hoist as hoisting
from lowering import ir
from lowering.expr import fits, heads, places
from lowering.expr import simplify as simplification
from lowering.expr.printing import show
from lowering.expr.static_range import Known, Span
from lowering.order import relayout
from lowering.order.candidates import Layouts
from lowering.planning import BlockSizes, plan
from lowering.problem import Problem
from lowering.ranges.verify import verify
from lowering.solve import narrow
from pallas_kernels.block_mask import Axis, BlockMask
from pallas_kernels.call import Masks
from pallas_kernels.config import Tile, Tiles


@dataclass(frozen=True)
class Program:
    """The maps of all heads at one stage of lowering.

    ``maps`` are the distinct predicates; head ``h`` has ``maps[map_of_head[h]]``. After
    ``arrange``, ``q`` and ``k`` are slots of ``layouts`` instead of positions, and the
    lengths of the problem count slots. After ``hoist``, ``q_vectors``, ``kv_vectors``
    and ``bits`` are computed outside of kernels.
    """

    problem: Problem
    maps: tuple[ir.Pred, ...]
    map_of_head: tuple[int, ...] = ()
    q_vectors: tuple[ir.Expr, ...] = ()
    kv_vectors: tuple[ir.Expr, ...] = ()
    bits: tuple[ir.Pred, ...] = ()
    layouts: Layouts | None = None

    def sizes_in(self, block_q: int, block_kv: int) -> BlockSizes:
        """The lengths of this program together with the given block sizes."""
        lengths = self.problem.q_seq_len, self.problem.kv_seq_len
        return BlockSizes(*lengths, block_q, block_kv)

    def __str__(self) -> str:
        lines = []
        for m, node in enumerate(self.maps):
            whose = [h for h, i in enumerate(self.map_of_head) if i == m]
            title = f"heads {_ranges(whose)}: " if len(self.maps) > 1 else ""
            lines.append(f"{title}{show(node)}")
        for axis, exprs in (("q", self.q_vectors), ("k", self.kv_vectors)):
            lines += [f"{axis}_vector{i} = {show(e)}" for i, e in enumerate(exprs)]
        lines += [f"bits{i}[q, k] = {show(p)}" for i, p in enumerate(self.bits)]
        if self.layouts is not None:
            q, kv = self.layouts
            lines += [f"order of q: {q}", f"order of k: {kv}"]
        return "\n".join(lines)


def shift_queries(program: Program) -> Program:
    """Replaces positions by array indices: ``q`` becomes ``q + q_offset``."""
    offset = program.problem.q_offset
    if not offset:
        return program
    maps = tuple(places.shift_queries(node, offset) for node in program.maps)
    return replace(program, maps=maps)


def resolve_heads(program: Program) -> Program:
    """Makes one map for each head, and replaces ``n`` by the number of keys."""
    (node,) = program.maps
    node = ir.substitute(node, {"n": ir.Const(program.problem.kv_seq_len)})
    num_heads = program.problem.num_heads
    every = heads.per_head(node, num_heads)
    maps, map_of_head = heads.distinct(every)
    return replace(program, maps=maps, map_of_head=map_of_head)


def simplify(program: Program) -> Program:
    """Brings maps into normal form; heads whose maps become equal share one."""
    known = _known(program)
    every = tuple(
        fits.bounded(simplification.simplify(node), known) for node in program.maps
    )
    maps, renamed = heads.distinct(every)
    return replace(
        program, maps=maps, map_of_head=tuple(renamed[i] for i in program.map_of_head)
    )


def hoist(program: Program, arrays: dict[str, Span] | None = None) -> Program:
    """Replaces tables, run-time arrays and 64-bit parts by hoisted vectors or bits.

    ``arrays`` gives spans of run-time arrays that are narrower than int32.
    """
    known = _known(program, arrays)
    maps = tuple(narrow.narrow(node, known) for node in program.maps)
    found = hoisting.hoist(maps, known)
    return replace(
        program,
        maps=found.maps,
        q_vectors=found.q,
        kv_vectors=found.kv,
        bits=found.bits,
    )


def _known(program: Program, arrays: dict[str, Span] | None = None) -> Known:
    problem = program.problem
    lengths = problem.q_seq_len, problem.kv_seq_len
    return fits.known_of(*lengths, problem.num_heads, arrays)


PASSES: tuple[Callable[[Program], Program], ...] = (
    shift_queries,
    resolve_heads,
    simplify,
    hoist,
)


@dataclass(frozen=True, eq=False)
class Stages:
    """The program after every pass, by the name of the pass; compared by identity."""

    named: tuple[tuple[str, Program], ...]

    def __getitem__(self, name: str) -> Program:
        return dict(self.named)[name]

    @property
    def planned(self) -> Program:
        """The program from which plans are made: after all passes but ``hoist``."""
        return self.named[-2][1]

    @property
    def layouts(self) -> Layouts | None:
        """The order of positions that kernels use, or None if it is the given one."""
        return self.planned.layouts

    def __str__(self) -> str:
        parts = []
        last = None
        for name, program in self.named:
            text = str(program)
            parts.append(f"-- {name}\n{'(as before)' if text == last else text}")
            last = text
        return "\n\n".join(parts)


@lru_cache(maxsize=512)
def run(node: ir.Pred, problem: Problem) -> Stages:
    """Runs all passes over a map.

    Raises:
      ValueError: the map does not fit the problem (heads, tables, grids).
    """
    program = Program(problem, (node,))
    stages = [("input", program)]
    for rewrite in PASSES:
        program = rewrite(program)
        stages.append((rewrite.__name__, program))
        if rewrite is resolve_heads:
            verify(program.maps, problem.q_seq_len, problem.kv_seq_len)
    return Stages(tuple(stages))


@lru_cache(maxsize=512)
def arrange(stages: Stages, block_q: int, block_kv: int) -> Stages:
    """The stages in a better order of positions for these blocks, if one pays off."""
    program = stages["simplify"]
    if stages["hoist"].bits:
        return stages
    maps = relayout.Maps(program.maps, program.map_of_head)
    found = relayout.arrange(maps, program.sizes_in(block_q, block_kv))
    if found is None:
        return stages
    q, kv = found.layouts
    problem = Problem(q.num_slots, kv.num_slots, program.problem.num_heads)
    moved = replace(program, problem=problem, maps=found.nodes, layouts=found.layouts)
    kept = [(name, p) for name, p in stages.named if name != hoist.__name__]
    return Stages((*kept, ("relayout", moved), (hoist.__name__, hoist(moved))))


@lru_cache(maxsize=512)
def block_mask(
    stages: Stages, block_q: int, block_kv: int, by: Axis = "q", exact: bool = False
) -> BlockMask:
    """The plan of a lowered map, as NumPy arrays."""
    program = stages.planned
    sizes = program.sizes_in(block_q, block_kv)
    return plan(program.maps, program.map_of_head, sizes, by=by, exact=exact)


def masks(stages: Stages, tiles: Tiles) -> Masks:
    """The plans of the three kernels: forward, dq and dkv."""

    def of(tile: Tile, by: Axis) -> BlockMask:
        return block_mask(stages, tile.block_q, tile.block_kv, by)

    return Masks(of(tiles.forward, "q"), of(tiles.dq, "q"), of(tiles.dkv, "kv"))


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
