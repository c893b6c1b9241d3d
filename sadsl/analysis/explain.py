"""``explain``: counts, FLOPs, bytes and predicted times of a lowered call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lowering import pipeline
from lowering.cost import cost
from lowering.cost.cost import CallSizes, Cost, Work
from lowering.cost.rooflines import PEAKS, Time, predict
from lowering.facts.plan_counts import Plan
from lowering.targets.chips import TARGETS, Target
from lowering.targets.report import ReportTable, html_page
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Masks
from pallas_kernels.config import KernelConfig
from sadsl.analysis.parts import SoftmaxPart
from sadsl.run.backends import DEFAULT_IMPL
from sadsl.run.lists import ListForm, form_of, possible_form
from sadsl.run.options import Options
from sadsl.terms.base import Term

THIS = "this call"
SIDES = {"forward": False, "backward": True}
# A spec with more distinct maps than this is shown by their sums only.
MOST_MAPS = 16


@dataclass(frozen=True, repr=False)
class Explanation:
    """The result of ``explain``: facts, tables, and the cost as numbers.

    ``print`` shows it as aligned text, and a notebook as HTML tables.
    """

    facts: tuple[tuple[str, str], ...]
    tables: tuple[ReportTable, ...]
    costs: tuple[Cost, ...]

    @property
    def cost(self) -> Cost:
        """The cost of a call with one softmax; ``costs`` has those of all parts.

        Raises:
          NotImplementedError: there are several, or none.
        """
        if len(self.costs) == 1:
            return self.costs[0]
        raise NotImplementedError(
            f"the call has {len(self.costs)} softmax parts: take costs, one for each"
        )

    def __str__(self) -> str:
        facts = "\n".join(f"{name:<22}{value}" for name, value in self.facts)
        return "\n\n".join([facts, *map(str, self.tables)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_page(self.facts, self.tables)


def explain(part: SoftmaxPart) -> Explanation:
    """Counts blocks, pairs, FLOPs and bytes of a softmax call, and predicts times.

    Blocks and FLOPs are exact, over whole blocks as the kernels visit them. Bytes and
    times follow the model of ``lowering.cost``. Users call ``Lowered.explain()``.
    """
    columns = compared(part)
    of = columns[THIS]
    plan = part.plan
    pairs = () if plan.operands else plan.pairs_of_maps
    tables = [_kernels(part, of)]
    if 1 < plan.mask.num_maps <= MOST_MAPS:
        tables.append(_maps(plan, pairs))
    tables.append(comparison(columns, part.target))
    tables.append(_chips(part))
    return Explanation(_facts(part, of, pairs), tuple(tables), (of,))


def explain_parts(
    term: Term, target: str, arguments: tuple, parts: tuple[SoftmaxPart, ...]
) -> Explanation:
    """Explains a call whose term has several softmaxes, or none.

    Blocks, FLOPs and bytes of each softmax are those of its own kernels. What is
    computed around them, such as pools and recurrences, is not counted.
    """
    facts = [
        ("spec", repr(term)),
        ("target", target),
        *(
            (name, f"{x.dtype}{list(x.shape)}")
            for name, x in zip("qkv", arguments[:3], strict=True)
        ),
        ("softmax parts", str(len(parts))),
    ]
    if not parts:
        text = "no softmax over pairs: no blocks to count; compile().report() has code"
        return Explanation((*facts, ("counts", text)), (), ())
    costs = tuple(_cost(part, _sizes(part)) for part in parts)
    header = "", "spec", "blocks", "full", "partial", "FLOPs", "bytes", "time"

    def row(at: int, part: SoftmaxPart, of: Cost) -> tuple[str, ...]:
        tile, known = part.tiles.forward, target in PEAKS
        return (
            f"part {at + 1}",
            _shortened(repr(part.options.term)),
            f"{tile.block_q} x {tile.block_kv}",
            *(f"{n:,}" for n in (of.forward.num_full, of.forward.num_partial)),
            *(f"{n:,}" for n in (of.flops(), of.bytes())),
            _time(predict(of, target)) if known else "-",
        )

    pairs = enumerate(zip(parts, costs, strict=True))
    table = ReportTable(
        "softmax parts, forward (low.parts[i].plan has more)",
        header,
        tuple(row(at, part, of) for at, (part, of) in pairs),
    )
    return Explanation(tuple(facts), (table,), costs)


def _shortened(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def compared(part: SoftmaxPart) -> dict[str, Cost]:
    """Costs by name: the call, the call in the given order, and dense attention."""
    sizes, problem = _sizes(part), part.options.problem
    columns = {THIS: _cost(part, sizes)}
    if part.stages.layouts is not None:
        given = pipeline.masks(part.options.stages, part.tiles)
        columns["in given order"] = cost.cost(given, sizes)
    causal = cost.dense_causal(_lengths_as_given(part), problem.q_offset)
    columns["dense"] = _dense(part, sizes)
    columns["dense causal"] = cost.cost(causal, sizes)
    return columns


def _dense(part: SoftmaxPart, sizes: CallSizes) -> Cost:
    return cost.cost(cost.dense(_lengths_as_given(part)), sizes)


def _lengths_as_given(part: SoftmaxPart) -> Masks:
    """The plans with the lengths of the call, instead of those with padding slots."""
    problem = part.options.problem
    lengths = {"q_seq_len": problem.q_seq_len, "kv_seq_len": problem.kv_seq_len}
    return Masks(*(replace(mask, **lengths) for mask in part.masks))


def _sizes(part: SoftmaxPart) -> CallSizes:
    q, k, v = part.arguments
    impl = part.options.setting.impl
    itemsize = np.dtype(q.dtype).itemsize
    # TPU kernels widen float16, since the chip has no arithmetic for it.
    widened = impl == "tpu" and np.dtype(q.dtype) == np.float16
    return CallSizes(
        batch=q.shape[0],
        num_q_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        itemsize=4 if widened else itemsize,
        impl=impl,
    )


def _cost(part: SoftmaxPart, sizes: CallSizes) -> Cost:
    moved = 0
    if part.stages.layouts is not None:
        given, slots = (
            (problem.q_seq_len, problem.kv_seq_len)
            for problem in (part.options.problem, part.stages.planned.problem)
        )
        moved = cost.permutation_bytes(sizes, given, slots)
    return cost.cost(part.masks, sizes, moved)


def _facts(
    part: SoftmaxPart, of: Cost, pairs: tuple[int, ...]
) -> tuple[tuple[str, str], ...]:
    q, k, v = part.arguments
    plan, options = part.plan, part.options
    facts = [
        ("spec", repr(options.term)),
        ("target, impl", f"{part.target}, {options.setting.impl}"),
        *(
            (x, f"{y.dtype}{list(y.shape)}")
            for x, y in zip("qkv", (q, k, v), strict=True)
        ),
        ("heads, distinct maps", f"{plan.num_heads}, {plan.mask.num_maps}"),
    ]
    form = possible_form(options, k.shape[2])
    if form is not None:
        facts.append(("choice", _form_text(form, options)))
    if part.stages.layouts is not None:
        q_order, kv_order = part.stages.layouts
        facts.append(("order of queries", str(q_order)))
        facts.append(("order of keys", str(kv_order)))
    if plan.operands:
        text = f"decided at run time by {', '.join(plan.operands)}"
        most = "of all blocks that some content visits; see plan_for for one content"
        return (*facts, ("pairs", text), ("counts below", most))
    total = cost.blocks(plan.mask).over_heads(pairs)
    area = plan.num_heads * options.problem.q_seq_len * options.problem.kv_seq_len
    waste = cost.padding_waste(q.shape[0] * total, of.forward, plan.mask)
    return (
        *facts,
        ("pairs", f"{total:,} of {area:,} over all heads ({total / area:.2%})"),
        ("padding waste", f"{waste:.1%} of the pairs computed attend nothing"),
    )


def _form_text(form: ListForm, options: Options) -> str:
    """Whether ``attention`` runs a choice by lists or as bits, and why."""
    impl, counts = options.setting.impl, form.counts
    chosen = "lists" if form_of(options, form.num_kv_heads, {}) else "bits"
    costs = f"{counts.by_list(impl):.3g}", f"{counts.visited:.3g}"
    return (
        f"by {chosen}: lists cost as much as {costs[0]} pairs, and bits visit "
        f"{costs[1]}; the tables below are of bits"
    )


def _kernels(part: SoftmaxPart, of: Cost) -> ReportTable:
    masks = part.masks
    plans: dict[str, BlockMask] = masks._asdict()
    if part.options.setting.impl == "xla":
        plans = {"forward": masks.forward, "backward": masks.dq}

    def row(work: Work) -> tuple[str, ...]:
        sums = f"{work.flops:,}", f"{work.bytes:,}"
        if work.name not in plans:
            return (work.name, *("",) * 6, *sums)
        mask = plans[work.name]
        counts = work.num_full, work.num_partial, work.num_padded, work.num_empty
        return (
            work.name,
            f"{mask.block_q} x {mask.block_kv}",
            *(f"{n:,}" for n in (*counts, len(mask.run_start))),
            *sums,
        )

    return ReportTable(
        "kernels (over all heads and batch rows; runs of all distinct maps)",
        ("", "block", "full", "partial", "padded", "empty", "runs", "FLOPs", "bytes"),
        tuple(row(work) for work in (of.forward, *of.backward)),
    )


def _maps(plan: Plan, pairs: tuple[int, ...]) -> ReportTable:
    count = cost.blocks(plan.mask)
    counts = (count.heads, count.full, count.partial, count.empty)
    found = (f"{n:,}" for n in pairs) if pairs else ("",) * len(plan.maps)
    rows = zip(*counts, found, strict=True)
    return ReportTable(
        "blocks of the distinct maps, forward",
        ("map", "heads", "full", "partial", "empty", "pairs"),
        tuple(
            (str(m), *(f"{n:,}" for n in row), last)
            for m, (*row, last) in enumerate(rows)
        ),
    )


def comparison(columns: Mapping[str, Cost], target: str) -> ReportTable:
    """A table of costs, one column each; its last rows are ratios to the first column.

    The ratios are of predicted times on a target with public peaks, else of FLOPs.
    """
    costs = list(columns.values())
    known = target in PEAKS
    rows: list[tuple[str, ...]] = []

    def add(name: str, cell: Callable[[Cost, bool], str]) -> None:
        for side, backward in SIDES.items():
            rows.append((f"{name} {side}", *(cell(c, backward) for c in costs)))

    def amount(of: Cost, backward: bool) -> float:
        if known:
            return predict(of, target, backward=backward).seconds
        return float(of.flops(backward=backward))

    add("FLOPs", lambda c, back: f"{c.flops(backward=back):,}")
    add("bytes", lambda c, back: f"{c.bytes(backward=back):,}")
    add("least bytes", lambda c, back: f"{c.least_bytes(backward=back):,}")
    if any(c.permutation_bytes for c in costs):
        moved = (f"{c.permutation_bytes:,}" for c in costs)
        rows.append(("permutation bytes", *moved))
    add("FLOPs per byte", lambda c, back: f"{c.intensity(backward=back):.1f}")
    if known:
        add("time", lambda c, back: _time(predict(c, target, backward=back)))
    add("ratio", lambda c, back: _ratio(amount(c, back), amount(costs[0], back)))
    of = f"predicted times on {target}" if known else "FLOPs"
    title = f"beside dense attention (ratios are of {of})"
    return ReportTable(title, ("", *columns), tuple(rows))


def _chips(part: SoftmaxPart) -> ReportTable:
    """A table of predicted times on every chip, with the kernels of its platform."""
    of_impl: dict[str, tuple[Cost, Cost]] = {}
    rows = []
    for target in TARGETS.values():
        there = _on(part, target)
        impl = there.options.setting.impl
        if impl not in of_impl:
            sizes = _sizes(there)
            of_impl[impl] = _cost(there, sizes), _dense(there, sizes)
        here, all_ = (
            [predict(of, target.name, backward=back) for back in SIDES.values()]
            for of in of_impl[impl]
        )
        ratios = (_ratio(a.seconds, b.seconds) for a, b in zip(all_, here, strict=True))
        mark = " *" if target.name == part.target else ""
        rows.append((f"{target.name}{mark}", impl, *map(_time, here), *ratios))
    return ReportTable(
        "predicted times at peak, with default blocks where the platform is another",
        ("", "impl", *SIDES, "dense takes", "backward"),
        tuple(rows),
    )


def _on(part: SoftmaxPart, target: Target) -> SoftmaxPart:
    """The call lowered for another chip."""
    platform = {"cuda": "gpu"}.get(target.platform, target.platform)
    here = part.target in TARGETS
    if here and TARGETS[part.target].platform == target.platform:
        return replace(part, target=target.name)
    setting = replace(
        part.options.setting,
        impl=DEFAULT_IMPL[platform],
        # Block sizes named for one platform may be impossible on another.
        config=KernelConfig(relayout=part.options.setting.config.relayout),
    )
    options = replace(part.options, setting=setting)
    return replace(part, target=target.name, options=options)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f} x" if b else "-"


def _time(time: Time) -> str:
    """A time with three digits and a unit, and whether compute or memory limits it."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    unit = next((u for u, scale in units.items() if time.seconds >= scale), "ns")
    return f"{time.seconds / units[unit]:.3g} {unit} ({time.limit})"
