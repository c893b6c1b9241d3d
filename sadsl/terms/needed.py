"""Which run-time arrays a caller must give to a spec."""

from lowering import ir
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.linear import Linear
from sadsl.terms.scatter_mean import ScatterMean


def needed(spec: Spec) -> set[str]:
    """Names of the run-time arrays that a call with ``spec`` must be given."""
    if isinstance(spec, ScatterMean):
        return needed(spec.map)
    if isinstance(spec, Linear) and spec.named_features is not None:
        return {spec.named_features, *spec.operands}
    if isinstance(spec, Term):
        return set(spec.operands).union(*map(needed, spec.parts))
    chosen = selections_of(spec)
    read = {
        n for n in ir.operand_names(spec.node) if not any(s.owns(n) for s in chosen)
    }
    return read.union(*(s.operands for s in chosen))
