"""The commands that say something about a spec: each returns its text and values."""

from typing import Any

import numpy as np
from absl import flags

from lowering.cost.cost import Cost
from lowering.cost.rooflines import PEAKS, predict
from lowering.facts.plan_counts import Plan
from sadsl.analysis.explain import SIDES, compared
from sadsl.analysis.parts import SoftmaxPart
from sadsl.analysis.properties import properties as properties_of
from sadsl.cli.call import kv_seq_len, lowered
from sadsl.cli.command import CommandResult
from sadsl.cli.progress import progress
from sadsl.run.plans import plan as plan_of_spec
from sadsl.terms.base import Spec


def explain(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Counts blocks, FLOPs and bytes of a call, and predicts its time."""
    with progress("planning and counting"):
        low = lowered(spec, asked)
        found = low.explain()
    shapes = {
        name: {"shape": x.shape, "dtype": str(x.dtype)}
        for name, x in zip("qkv", low.arguments, strict=False)
    }
    values = {
        "spec": repr(low.term),
        "target": low.target,
        "impl": low.setting.impl,
        "arrays": shapes,
    }
    parts = [_part_values(part) for part in low.parts]
    values |= parts[0] if len(parts) == 1 else {"parts": parts}
    return CommandResult(str(found), values)


def _part_values(part: SoftmaxPart) -> dict[str, Any]:
    """The plan of one softmax, and its cost beside that of dense attention."""
    costs = compared(part)
    return {
        "softmax": repr(part.options.term),
        "plan": _plan_values(part.plan),
        "cost": {
            name.replace(" ", "_"): _cost_values(cost, part.target)
            for name, cost in costs.items()
        },
    }


def _cost_values(cost: Cost, target: str) -> dict[str, Any]:
    def side(backward: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "flops": cost.flops(backward=backward),
            "bytes": cost.bytes(backward=backward),
            "least_bytes": cost.least_bytes(backward=backward),
        }
        if target in PEAKS:
            time = predict(cost, target, backward=backward)
            found |= {"seconds": time.seconds, "limit": time.limit}
        return found

    return {name: side(backward) for name, backward in SIDES.items()}


def asm(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Prints the lowest-level code of a call, or the figures of its compiler."""
    low = lowered(spec, asked, gradient=asked.gradient)
    with progress(f"compiling for {low.target}"):
        compiled = low.compile()
        about = {"spec": repr(low.term), "target": low.target}
        if not asked.report:
            code = compiled.asm()
            return CommandResult(code, {**about, "asm": code})
        report = compiled.report()
    return CommandResult(str(report), {**about, "report": report.as_dict()})


def plan(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Counts the blocks that a call visits, and its pairs."""
    with progress("planning"):
        found = plan_of_spec(
            spec, asked.seq_len, kv_seq_len(asked),
            block_q=asked.block_q, block_kv=asked.block_kv, num_heads=asked.heads,
            q_offset=asked.q_offset, exact=asked.exact, relayout=not asked.given_order,
        )  # fmt: skip
    with progress("counting pairs"):
        values = {"spec": repr(spec), **_plan_values(found)}
    pairs = f"decided at run time by {', '.join(found.operands)}"
    if not found.operands:
        area = asked.heads * asked.seq_len * kv_seq_len(asked)
        total = values["pairs"]
        pairs = f"{total:,} of {area:,} over all heads ({total / area:.2%})"
    return CommandResult(f"{'spec':<22}{spec!r}\n{found}\n{'pairs':<22}{pairs}", values)


def _plan_values(plan: Plan) -> dict[str, Any]:
    mask = plan.mask
    orders = (
        None if plan.layouts is None else [str(plan.layouts.q), str(plan.layouts.kv)]
    )
    pairs = None
    if not plan.operands:
        by_map = plan.pairs_of_maps
        pairs = sum(by_map[m] for m in np.asarray(mask.map_of_head).tolist())
    return {
        "q_seq_len": mask.q_seq_len,
        "kv_seq_len": mask.kv_seq_len,
        "block_q": mask.block_q,
        "block_kv": mask.block_kv,
        "heads": plan.num_heads,
        "distinct_maps": mask.num_maps,
        "full_blocks": plan.num_full,
        "partial_blocks": plan.num_partial,
        "empty_blocks": plan.num_empty,
        "runs": plan.num_runs,
        "bytes_of_runs": plan.nbytes,
        "orders": orders,
        "operands": plan.operands,
        "pairs": pairs,
    }


def properties(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Finds causality, coverage, hops, the decoding cache and growth of a spec."""
    with progress("finding properties"):
        found = properties_of(spec, asked.seq_len, asked.heads)
    cache, hops = found.cache, found.hops
    values = {
        "spec": repr(spec),
        "positions": found.n,
        "heads": found.num_heads,
        "causal": found.causal,
        "offence": found.offence,
        "queries_without_a_key": found.num_empty_rows,
        "keys_nobody_sees": found.num_unseen_keys,
        "pairs_of_some_head": found.num_pairs,
        "coverage": found.coverage,
        "hops": {"least": hops.least, "most": hops.most, "exact": hops.exact},
        "cache": cache
        and {
            "kind": cache.kind,
            "positions": cache.size,
            "pinned": cache.pinned,
            "slots": cache.slots,
        },
        "growth": found.growth,
        "exponent": found.exponent,
        "selection_leak": found.selection_leak,
    }
    return CommandResult(f"{'spec':<24}{spec!r}\n{found}", values)
