"""A sparse-attention compiler for JAX: patterns are expressions, kernels are derived.

``causal() & (window(512) | sinks(4))`` is an index map; ``attention(q, k, v, map)``
runs it on CPU, TPU or GPU with gradients; ``plan`` counts what it visits and ``lower``
shows every stage down to the kernel. Layers are in ``sadsl.layers``, pictures in
``sadsl.plot``, published mechanisms in ``sadsl.catalog``: import them by name, they are
not loaded with this module.
"""

from lowering.counts import Plan as Plan
from pallas_kernels.config import KernelConfig as KernelConfig
from pallas_kernels.config import Tile as Tile
from sadsl.attention import attention as attention
from sadsl.attention import plan as plan
from sadsl.attention import select as select
from sadsl.bias import alibi as alibi
from sadsl.bias import bias as bias
from sadsl.bias import distance_bias as distance_bias
from sadsl.bias import key_bias as key_bias
from sadsl.bias import pair_bias as pair_bias
from sadsl.bias import t5_bias as t5_bias
from sadsl.channels import channel as channel
from sadsl.compression import compressed as compressed
from sadsl.content_plan import plan_for as plan_for
from sadsl.decode import Cache as Cache
from sadsl.decode import cache as cache
from sadsl.grids import Grid as Grid
from sadsl.head_plans import read_head_plan as read_head_plan
from sadsl.head_plans import write_head_plan as write_head_plan
from sadsl.induced import induced as induced
from sadsl.linear import linear as linear
from sadsl.linear_state import LinearState as LinearState
from sadsl.linear_state import linear_prefill as linear_prefill
from sadsl.linear_state import linear_state as linear_state
from sadsl.linear_state import linear_step as linear_step
from sadsl.lowered import Compiled as Compiled
from sadsl.lowered import Lowered as Lowered
from sadsl.lowered import lower as lower
from sadsl.maps import IndexMap as IndexMap
from sadsl.maps import per_head as per_head
from sadsl.mixtures import average as average
from sadsl.mixtures import gated as gated
from sadsl.mixtures import joint as joint
from sadsl.mixtures import weighted as weighted
from sadsl.named import blocks as blocks
from sadsl.named import causal as causal
from sadsl.named import dilated as dilated
from sadsl.named import full as full
from sadsl.named import keys as keys
from sadsl.named import offsets as offsets
from sadsl.named import prefix as prefix
from sadsl.named import queries as queries
from sadsl.named import segments as segments
from sadsl.named import sinks as sinks
from sadsl.named import strided as strided
from sadsl.named import where as where
from sadsl.named import window as window
from sadsl.properties import Properties as Properties
from sadsl.properties import properties as properties
from sadsl.reals import weights as weights
from sadsl.selections import kmeans as kmeans
from sadsl.selections import lsh as lsh
from sadsl.selections import mass as mass
from sadsl.selections import threshold as threshold
from sadsl.selections import topk as topk
from sadsl.storage import load as load
from sadsl.storage import load_plan as load_plan
from sadsl.storage import save as save
from sadsl.storage import save_plan as save_plan
from sadsl.summaries import clusters as clusters
from sadsl.summaries import columns as columns
from sadsl.summaries import regions as regions
from sadsl.summaries import rowmajor as rowmajor
from sadsl.summaries import rows as rows
from sadsl.summaries import spans as spans
from sadsl.summaries import summaries as summaries
from sadsl.summaries import tower as tower
from sadsl.symbols import floor_log2 as floor_log2
from sadsl.symbols import isin as isin
from sadsl.symbols import maximum as maximum
from sadsl.symbols import minimum as minimum
from sadsl.symbols import operand as operand
from sadsl.symbols import power_of_two as power_of_two
from sadsl.symbols import table as table
from sadsl.terms import Softmax as Softmax
from sadsl.terms import heads as heads
from sadsl.terms import scatter_mean as scatter_mean
from sadsl.terms import softmax as softmax
from sadsl.text import parse as parse

__version__ = "0.1.0"

# Each name is the object that its module defines; `dir` shows no modules.
__all__ = [
    "Cache",
    "Compiled",
    "Grid",
    "IndexMap",
    "KernelConfig",
    "LinearState",
    "Lowered",
    "Plan",
    "Properties",
    "Softmax",
    "Tile",
    "alibi",
    "attention",
    "average",
    "bias",
    "blocks",
    "cache",
    "causal",
    "channel",
    "clusters",
    "columns",
    "compressed",
    "dilated",
    "distance_bias",
    "floor_log2",
    "full",
    "gated",
    "heads",
    "induced",
    "isin",
    "joint",
    "key_bias",
    "keys",
    "kmeans",
    "linear",
    "linear_prefill",
    "linear_state",
    "linear_step",
    "load",
    "load_plan",
    "lower",
    "lsh",
    "mass",
    "maximum",
    "minimum",
    "offsets",
    "operand",
    "pair_bias",
    "parse",
    "per_head",
    "plan",
    "plan_for",
    "power_of_two",
    "prefix",
    "properties",
    "queries",
    "read_head_plan",
    "regions",
    "rowmajor",
    "rows",
    "save",
    "save_plan",
    "scatter_mean",
    "segments",
    "select",
    "sinks",
    "softmax",
    "spans",
    "strided",
    "summaries",
    "t5_bias",
    "table",
    "threshold",
    "topk",
    "tower",
    "weighted",
    "weights",
    "where",
    "window",
    "write_head_plan",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
