"""The static part of a checked call, as one hashable value."""

from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Array

from lowering import ir, pipeline
from lowering.bias.nodes import LoweredScore, Score, lower
from lowering.pipeline import Stages
from lowering.problem import Problem
from lowering.run_time import sort
from pallas_kernels.config import Tiles
from sadsl.run.types import Setting
from sadsl.selections.base import Selection, selections_of
from sadsl.terms.base import TRACED_SCALE
from sadsl.terms.softmax import Softmax


@dataclass(frozen=True)
class Options:
    """The static part of a call with one softmax, as one hashable value.

    ``setting.sm_scale`` is None where the scale is among the arrays.
    """

    term: Softmax
    problem: Problem
    setting: Setting

    def with_scale(self, sm_scale: float) -> "Options":
        """These options with another factor of the scores."""
        return replace(self, setting=replace(self.setting, sm_scale=sm_scale))

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
    def score(self) -> Score | None:
        """The bias as an expression."""
        bias = self.term.bias
        return None if bias is None else bias.score(self.problem.num_heads)

    @property
    def lowered_score(self) -> LoweredScore | None:
        """The bias as kernels take it."""
        if self.score is None:
            return None
        return lower(self.score, self.problem)

    @property
    def keeps_order(self) -> bool:
        """Whether positions stay as given: a bias is made for pairs in that order."""
        return self.setting.config.relayout is False or self.term.bias is not None

    @property
    def stages(self) -> Stages:
        """The lowered map in the given order of positions, every stage kept."""
        return pipeline.run(self.term.map.node, self.problem)

    @cached_property
    def sorted_by(self) -> sort.SortKeys | None:
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


def options_of(inputs: tuple[Array, ...], term: Softmax, setting: Setting) -> Options:
    """The static part of a call with one softmax; ``inputs`` start with q and k."""
    q, k = inputs[0], inputs[1]
    problem = Problem(q.shape[1], k.shape[1], q.shape[2], setting.q_offset)
    if traced_scale(setting):
        setting = replace(setting, sm_scale=None)
    return Options(replace(term, sink=None), problem, setting)


def traced_scale(setting: Setting) -> dict[str, Array]:
    """The factor of the scores as a run-time array, if it is one."""
    scale = setting.sm_scale
    return {} if isinstance(scale, float) else {TRACED_SCALE: scale}
