"""The plans of the two TPU kernels of a call."""

from typing import NamedTuple

from pallas_kernels.call import Call, Inputs, Masks
from pallas_kernels.tpu import runs, segments
from pallas_kernels.tpu.runs import TpuPlan
from pallas_kernels.tpu.segments import BackwardPlan


class TpuLists(NamedTuple):
    """The plans of the forward and of the backward kernel."""

    forward: TpuPlan
    backward: BackwardPlan


def prepare(masks: Masks, call: Call, inputs: Inputs) -> TpuLists:
    """The plans of a call. A traced plan has the form of a table.

    One kernel computes dq, dk and dv: it has the blocks of ``masks.dkv``.

    Raises:
      ValueError: a block size that the chip does not support, or no ``max_runs``.
      NotImplementedError: the runs of one row do not fit scalar memory.
    """
    used = {"forward": masks.forward, "dkv": masks.dkv}
    if call.interpret is False:
        for name, mask in used.items():
            runs.check_blocks(name, mask)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    backward = segments.plan_of(masks.dkv, group, inputs.q.shape[3])
    return TpuLists(runs.plan(masks.forward), backward)
