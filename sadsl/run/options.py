"""``Options``: the static part of a checked call, as one hashable value."""

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

    ``setting.sm_scale`` is None if the scale is traced: then it is among the arrays.
    """

    term: Softmax
    problem: Problem
    setting: Setting

    def with_scale(self, sm_scale: float) -> "Options":
        """These options with another scale."""
        return replace(self, setting=replace(self.setting, sm_scale=sm_scale))

    @cached_property
    def selections(self) -> tuple[Selection, ...]:
        """The selections in the map, which content decides."""
        return selections_of(self.term)

    @cached_property
    def read(self) -> frozenset[str]:
        """The names of the operands that the simplified map still reads."""
        maps = self.stages["simplify"].maps
        return frozenset(name for node in maps for name in ir.operand_names(node))

    @cached_property
    def asked(self) -> dict[str, int]:
        """The operands of floats that selections and the bias read.

        By name, with their number of axes beside the batch.
        """
        own = {} if self.term.bias is None else self.term.bias.operands
        return {n: r for s in self.selections for n, r in s.operands.items()} | own

    @cached_property
    def of_bias(self) -> dict[str, int]:
        """All operands that the bias reads, integers too, as ``asked`` has them."""
        bias = self.term.bias
        return {} if bias is None else {**bias.operands, **bias.integer_operands}

    @cached_property
    def score(self) -> Score | None:
        """The bias as an expression, or None."""
        bias = self.term.bias
        return None if bias is None else bias.score(self.problem.num_heads)

    @property
    def lowered_score(self) -> LoweredScore | None:
        """The bias in the form that kernels take, or None."""
        if self.score is None:
            return None
        return lower(self.score, self.problem)

    @property
    def keeps_order(self) -> bool:
        """Whether the kernels keep the given order of positions.

        With a bias they do, since its arrays are laid out in that order.
        """
        return self.setting.config.relayout is False or self.term.bias is not None

    @property
    def stages(self) -> Stages:
        """The lowered map in the given order of positions, with every stage."""
        return pipeline.run(self.term.map.node, self.problem)

    @cached_property
    def sorted_by(self) -> sort.SortKeys | None:
        """The labels by which the call sorts positions at run time, or None."""
        orders = [
            (s.key(s.order["q"]), s.key(s.order["k"]))
            for s in self.selections
            if s.order
        ]
        if not orders or self.keeps_order:
            return None
        return sort.keys(self.stages["simplify"], orders)

    def arranged(self, tiles: Tiles) -> Stages:
        """The lowered map in the order of positions that the kernels work in."""
        if self.keeps_order:
            return self.stages
        if self.sorted_by is not None:
            return sort.sorted_stages(self.stages)
        forward = tiles.forward
        return pipeline.arrange(self.stages, forward.block_q, forward.block_kv)


def check_kernel_term(term: Softmax, what: str) -> Softmax:
    """A term whose ``scale`` and ``values`` are not applied before the kernel.

    Raises:
      NotImplementedError: it has one of them, which ``what`` would ignore.
    """
    for name in ("scale", "values"):
        value = getattr(term, name)
        if value is not None:
            raise NotImplementedError(
                f"{what}: {term!r} has {name}={value!r}, which attention applies to q, "
                f"k and v before the kernel: leave it out here, and pass the q and v "
                "that the kernel gets"
            )
    return term


def problem_of(inputs: tuple[Array, ...], setting: Setting) -> Problem:
    """The sizes of a call; ``inputs`` start with q and k."""
    q, k = inputs[0], inputs[1]
    return Problem(q.shape[1], k.shape[1], q.shape[2], setting.q_offset)


def options_of(inputs: tuple[Array, ...], term: Softmax, setting: Setting) -> Options:
    """The static part of a call with one softmax; ``inputs`` start with q and k."""
    if traced_scale(setting):
        setting = replace(setting, sm_scale=None)
    plain = replace(term, sink=None, scale=None)
    return Options(plain, problem_of(inputs, setting), setting)


def traced_scale(setting: Setting) -> dict[str, Array]:
    """The traced scale by its name among the run-time arrays; empty for a number."""
    scale = setting.sm_scale
    return {} if isinstance(scale, float) else {TRACED_SCALE: scale}
