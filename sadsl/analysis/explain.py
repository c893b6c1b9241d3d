"""``explain``: counts, FLOPs, bytes and predicted times of a lowered call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np

from lowering import pipeline
from lowering.cost import cost
from lowering.targets.chips import TARGETS, Target
from lowering.cost.cost import CallSizes, Cost, Work
from lowering.cost.rooflines import PEAKS, Time, predict
from lowering.facts.plan_counts import Plan
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.call import Masks
from pallas_kernels.config import KernelConfig
from sadsl.run.backends import DEFAULT_IMPL
from sadsl.run.lists import ListForm, form_of, possible_form
from sadsl.run.options import Options

THIS = "this call"
SIDES = {"forward": False, "backward": True}
# A spec with more distinct maps than this is shown by their sums only.
MOST_MAPS = 16


@dataclass(frozen=True)
class ReportTable:
    """A table of text cells; the first column holds names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [
            max(len(cell) for cell in column) for column in zip(*lines, strict=True)
        ]
        text = [self.title]
        for name, *cells in lines:
            numbers = (
                f"  {cell:>{width}}"
                for cell, width in zip(cells, widths[1:], strict=True)
            )
            text.append(f"{name:<{widths[0]}}{''.join(numbers)}".rstrip())
        return "\n".join(text)


@dataclass(frozen=True, repr=False)
class Explanation:
    """The result of ``explain``: facts, tables, and the cost as numbers.

    ``print`` shows it as aligned text, and a notebook as HTML tables.
    """

    facts: tuple[tuple[str, str], ...]
    tables: tuple[ReportTable, ...]
    cost: Cost

    def __str__(self) -> str:
        facts = "\n".join(f"{name:<22}{value}" for name, value in self.facts)
        return "\n\n".join([facts, *map(str, self.tables)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        facts = "".join(
            f"<tr>{_cell('th', name, 'left')}{_cell('td', value, 'left')}</tr>"
            for name, value in self.facts
        )
        parts = [_html(facts), *map(_html_table, self.tables)]
        return f'<div style="font-size: 90%">{"".join(parts)}</div>'


# These styles inherit the colours of the page, so they work on light and dark pages.
_TABLE = "border-collapse: collapse; margin: 0 0 0.8em 0"
_LINE = "border-bottom: 1px solid color-mix(in srgb, currentColor 40%, transparent)"


def _cell(tag: str, text: str, align: str, style: str = "") -> str:
    whole = f"text-align: {align}; padding: 0.1em 0.7em; {style}".rstrip()
    return f'<{tag} style="{whole}">{escape(text)}</{tag}>'


def _html(rows: str, title: str = "") -> str:
    caption = (
        f'<caption style="text-align: left; padding: 0.2em 0.7em"><b>{escape(title)}'
        "</b></caption>"
        if title
        else ""
    )
    return f'<table style="{_TABLE}">{caption}{rows}</table>'


def _html_table(table: ReportTable) -> str:
    def line(cells: tuple[str, ...], head: bool) -> str:
        style = _LINE if head else ""
        tag = "th" if head else "td"
        first, *rest = cells
        numbers = "".join(_cell(tag, cell, "right", style) for cell in rest)
        return f"<tr>{_cell('th', first, 'left', style)}{numbers}</tr>"

    rows = [line(table.header, True), *(line(row, False) for row in table.rows)]
    return _html("".join(rows), table.title)


def explain(lowered: Any) -> Explanation:
    """Counts blocks, pairs, FLOPs and bytes of a ``Lowered`` call, and predicts times.

    Blocks and FLOPs are exact, over whole blocks as the kernels visit them. Bytes and
    times follow the model of ``lowering.cost``. Users call ``Lowered.explain()``.
    """
    columns = compared(lowered)
    of = columns[THIS]
    plan = lowered.plan
    pairs = () if plan.operands else plan.pairs_of_maps
    tables = [_kernels(lowered, of)]
    if 1 < plan.mask.num_maps <= MOST_MAPS:
        tables.append(_maps(plan, pairs))
    tables.append(comparison(columns, lowered.target))
    tables.append(_chips(lowered))
    return Explanation(_facts(lowered, of, pairs), tuple(tables), of)


def compared(lowered: Any) -> dict[str, Cost]:
    """Costs by name: the call, the call in the given order, and dense attention."""
    sizes, problem = _sizes(lowered), lowered.options.problem
    columns = {THIS: _cost(lowered, sizes)}
    if lowered.stages.layouts is not None:
        given = pipeline.masks(lowered.options.stages, lowered.tiles)
        columns["in given order"] = cost.cost(given, sizes)
    causal = cost.dense_causal(_lengths_as_given(lowered), problem.q_offset)
    columns["dense"] = _dense(lowered, sizes)
    columns["dense causal"] = cost.cost(causal, sizes)
    return columns


def _dense(lowered: Any, sizes: CallSizes) -> Cost:
    return cost.cost(cost.dense(_lengths_as_given(lowered)), sizes)


def _lengths_as_given(lowered: Any) -> Masks:
    """The plans with the lengths of the call, instead of those with padding slots."""
    problem = lowered.options.problem
    lengths = {"q_seq_len": problem.q_seq_len, "kv_seq_len": problem.kv_seq_len}
    return Masks(*(replace(mask, **lengths) for mask in lowered.masks))


def _sizes(lowered: Any) -> CallSizes:
    q, k, v, _ = lowered.arguments
    impl = lowered.options.setting.impl
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


def _cost(lowered: Any, sizes: CallSizes) -> Cost:
    moved = 0
    if lowered.stages.layouts is not None:
        given, slots = (
            (problem.q_seq_len, problem.kv_seq_len)
            for problem in (lowered.options.problem, lowered.stages.planned.problem)
        )
        moved = cost.permutation_bytes(sizes, given, slots)
    return cost.cost(lowered.masks, sizes, moved)


def _facts(
    lowered: Any, of: Cost, pairs: tuple[int, ...]
) -> tuple[tuple[str, str], ...]:
    q, k, v, _ = lowered.arguments
    plan, options = lowered.plan, lowered.options
    facts = [
        ("spec", repr(options.term)),
        ("target, impl", f"{lowered.target}, {options.setting.impl}"),
        *(
            (x, f"{y.dtype}{list(y.shape)}")
            for x, y in zip("qkv", (q, k, v), strict=True)
        ),
        ("heads, distinct maps", f"{plan.num_heads}, {plan.mask.num_maps}"),
    ]
    form = possible_form(options, k.shape[2])
    if form is not None:
        facts.append(("choice", _form_text(form, options)))
    if lowered.stages.layouts is not None:
        q_order, kv_order = lowered.stages.layouts
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


def _kernels(lowered: Any, of: Cost) -> ReportTable:
    masks = lowered.masks
    plans: dict[str, BlockMask] = masks._asdict()
    if lowered.options.setting.impl == "xla":
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


def _chips(lowered: Any) -> ReportTable:
    """A table of predicted times on every chip, with the kernels of its platform."""
    of_impl: dict[str, tuple[Cost, Cost]] = {}
    rows = []
    for target in TARGETS.values():
        there = _on(lowered, target)
        impl = there.options.setting.impl
        if impl not in of_impl:
            sizes = _sizes(there)
            of_impl[impl] = _cost(there, sizes), _dense(there, sizes)
        here, all_ = (
            [predict(of, target.name, backward=back) for back in SIDES.values()]
            for of in of_impl[impl]
        )
        ratios = (_ratio(a.seconds, b.seconds) for a, b in zip(all_, here, strict=True))
        mark = " *" if target.name == lowered.target else ""
        rows.append((f"{target.name}{mark}", impl, *map(_time, here), *ratios))
    return ReportTable(
        "predicted times at peak, with default blocks where the platform is another",
        ("", "impl", *SIDES, "dense takes", "backward"),
        tuple(rows),
    )


def _on(lowered: Any, target: Target) -> Any:
    """The call lowered for another chip."""
    platform = {"cuda": "gpu"}.get(target.platform, target.platform)
    here = lowered.target in TARGETS
    if here and TARGETS[lowered.target].platform == target.platform:
        return replace(lowered, target=target.name)
    setting = replace(
        lowered.options.setting,
        impl=DEFAULT_IMPL[platform],
        # Block sizes named for one platform may be impossible on another.
        config=KernelConfig(relayout=lowered.options.setting.config.relayout),
    )
    options = replace(lowered.options, setting=setting)
    return replace(lowered, target=target.name, options=options)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f} x" if b else "-"


def _time(time: Time) -> str:
    """A time with three digits and a unit, and whether compute or memory limits it."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    unit = next((u for u, scale in units.items() if time.seconds >= scale), "ns")
    return f"{time.seconds / units[unit]:.3g} {unit} ({time.limit})"
