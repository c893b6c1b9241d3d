"""Chunked linear recurrences: one algebra on values, three backends."""

from pallas_kernels.linear.algebra import Rule as Rule
from pallas_kernels.linear.algebra import State as State
from pallas_kernels.linear.algebra import scalar as scalar
from pallas_kernels.linear.call import Call as Call
from pallas_kernels.linear.call import Inputs as Inputs
from pallas_kernels.linear.call import Outputs as Outputs
from pallas_kernels.linear.dispatch import attend as attend
from pallas_kernels.linear.dispatch import final_state as final_state
from pallas_kernels.linear.marks import STRONGEST as STRONGEST
from pallas_kernels.linear.tiles import default_call as default_call
