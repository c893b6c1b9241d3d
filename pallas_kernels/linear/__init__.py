"""Linear attention as a chunked recurrence: one algebra, three backends."""

from pallas_kernels.linear.call import LinearCall as LinearCall
from pallas_kernels.linear.call import LinearInputs as LinearInputs
from pallas_kernels.linear.call import LinearOutputs as LinearOutputs
from pallas_kernels.linear.chunk import Recurrence as Recurrence
from pallas_kernels.linear.chunk import State as State
from pallas_kernels.linear.dispatch import attend as attend
from pallas_kernels.linear.dispatch import final_state as final_state
from pallas_kernels.linear.marks import STRONGEST as STRONGEST
from pallas_kernels.linear.tiles import LinearSizes as LinearSizes
from pallas_kernels.linear.tiles import default_call as default_call
