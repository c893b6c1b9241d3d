"""A sparse-attention compiler for JAX: patterns are expressions, kernels are derived.

``causal() & (window(512) | sinks(4))`` is an index map; ``attention(q, k, v, map)``
runs it on CPU, TPU or GPU with gradients; ``plan`` counts what it visits and ``lower``
shows every stage down to the kernel. Layers are in ``sadsl.layers``, pictures in
``sadsl.plot``.
"""

from lowering.counts import Plan as Plan
from pallas_kernels.config import KernelConfig as KernelConfig
from pallas_kernels.config import Tile as Tile
from sadsl.attention import attention as attention
from sadsl.attention import plan as plan
from sadsl.attention import select as select
from sadsl.content_plan import plan_for as plan_for
from sadsl.decode import Cache as Cache
from sadsl.decode import cache as cache
from sadsl.grids import Grid as Grid
from sadsl.lowered import Compiled as Compiled
from sadsl.lowered import Lowered as Lowered
from sadsl.lowered import lower as lower
from sadsl.maps import IndexMap as IndexMap
from sadsl.maps import per_head as per_head
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
from sadsl.selections import kmeans as kmeans
from sadsl.selections import lsh as lsh
from sadsl.selections import mass as mass
from sadsl.selections import threshold as threshold
from sadsl.selections import topk as topk
from sadsl.storage import load as load
from sadsl.storage import load_plan as load_plan
from sadsl.storage import save as save
from sadsl.storage import save_plan as save_plan
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
