"""A sparse-attention compiler for JAX: write a pattern, and it derives the kernels.

An index map such as ``causal() & (window(512) | sinks(4))`` says which keys a query
sees. ``attention(q, k, v, map)`` computes attention on CPU, TPU or GPU, with gradients.
``plan`` counts the blocks and pairs that it visits; ``lower`` shows every stage down to
the kernel. Import ``sadsl.layers`` (Flax layers), ``sadsl.plot`` (pictures) and
``sadsl.catalog`` (published mechanisms) by name: ``import sadsl`` does not load them.

>>> import sadsl as sa
>>> spec = sa.causal() & (sa.window(2) | sa.sinks(1))
>>> print(spec.picture(6))
#.....
##....
###...
####..
#.###.
#..###
>>> sa.plan(spec, 1024, block_q=128, block_kv=128).num_pairs
4090
"""

from importlib import metadata as _metadata

from lowering.facts.plan_counts import Plan as Plan
from pallas_kernels.config import KernelConfig as KernelConfig
from pallas_kernels.config import Tile as Tile
from sadsl.analysis.cache import Cache as Cache
from sadsl.analysis.cache import cache as cache
from sadsl.analysis.compiled import Compiled as Compiled
from sadsl.analysis.induced import induced as induced
from sadsl.analysis.lowered import Lowered as Lowered
from sadsl.analysis.lowered import lower as lower
from sadsl.analysis.properties import Properties as Properties
from sadsl.analysis.properties import properties as properties
from sadsl.decode.cache import DecodingCache as DecodingCache
from sadsl.decode.cache import init_cache as init_cache
from sadsl.decode.release import release as release
from sadsl.decode.step import prefill as prefill
from sadsl.decode.step import step as step
from sadsl.maps.base import IndexMap as IndexMap
from sadsl.maps.base import per_head as per_head
from sadsl.maps.dense import dense_map as dense_map
from sadsl.maps.grids import Grid as Grid
from sadsl.maps.named import blocks as blocks
from sadsl.maps.named import causal as causal
from sadsl.maps.named import dilated as dilated
from sadsl.maps.named import full as full
from sadsl.maps.named import keys as keys
from sadsl.maps.named import offsets as offsets
from sadsl.maps.named import prefix as prefix
from sadsl.maps.named import queries as queries
from sadsl.maps.named import segments as segments
from sadsl.maps.named import sinks as sinks
from sadsl.maps.named import strided as strided
from sadsl.maps.named import where as where
from sadsl.maps.named import window as window
from sadsl.maps.numbers import log as log
from sadsl.maps.numbers import weights as weights
from sadsl.maps.symbols import floor_log2 as floor_log2
from sadsl.maps.symbols import isin as isin
from sadsl.maps.symbols import maximum as maximum
from sadsl.maps.symbols import minimum as minimum
from sadsl.maps.symbols import operand as operand
from sadsl.maps.symbols import power_of_two as power_of_two
from sadsl.maps.symbols import table as table
from sadsl.run.agree import check_agreement as check_agreement
from sadsl.run.call import attention as attention
from sadsl.run.call import select as select
from sadsl.run.entries import entries as entries
from sadsl.run.jax_nn import dot_product_attention as dot_product_attention
from sadsl.run.key_mass import key_mass as key_mass
from sadsl.run.linear_decoding import linear_prefill as linear_prefill
from sadsl.run.linear_decoding import linear_state as linear_state
from sadsl.run.linear_decoding import linear_step as linear_step
from sadsl.run.linear_state import LinearState as LinearState
from sadsl.run.local_linear import local_linear_residual as local_linear_residual
from sadsl.run.plans import plan as plan
from sadsl.run.plans import plan_for as plan_for
from sadsl.selections import dot as dot
from sadsl.selections import kmeans as kmeans
from sadsl.selections import lsh as lsh
from sadsl.selections import mass as mass
from sadsl.selections import threshold as threshold
from sadsl.selections import topk as topk
from sadsl.sharding.call import sharded_attention as sharded_attention
from sadsl.sharding.mesh_axes import MeshAxes as MeshAxes
from sadsl.sharding.plan import ShardPlan as ShardPlan
from sadsl.sharding.plan import shard_plan as shard_plan
from sadsl.terms.biases import alibi as alibi
from sadsl.terms.biases import bias as bias
from sadsl.terms.biases import distance_bias as distance_bias
from sadsl.terms.biases import key_bias as key_bias
from sadsl.terms.biases import pair_bias as pair_bias
from sadsl.terms.biases import t5_bias as t5_bias
from sadsl.terms.channel import channel as channel
from sadsl.terms.cluster_regions import clusters as clusters
from sadsl.terms.compressed import compressed as compressed
from sadsl.terms.delta import delta as delta
from sadsl.terms.features import cosformer_features as cosformer_features
from sadsl.terms.grid_regions import columns as columns
from sadsl.terms.grid_regions import rowmajor as rowmajor
from sadsl.terms.grid_regions import rows as rows
from sadsl.terms.heads import heads as heads
from sadsl.terms.latent import latent as latent
from sadsl.terms.linear import linear as linear
from sadsl.terms.local_linear import local_linear as local_linear
from sadsl.terms.mixtures import average as average
from sadsl.terms.mixtures import gated as gated
from sadsl.terms.mixtures import joint as joint
from sadsl.terms.mixtures import weighted as weighted
from sadsl.terms.over import over as over
from sadsl.terms.own_regions import regions as regions
from sadsl.terms.query_biases import gate_bias as gate_bias
from sadsl.terms.query_biases import query_distance_bias as query_distance_bias
from sadsl.terms.regions import spans as spans
from sadsl.terms.regions import tower as tower
from sadsl.terms.scatter_mean import scatter_mean as scatter_mean
from sadsl.terms.softmax import Softmax as Softmax
from sadsl.terms.softmax import softmax as softmax
from sadsl.terms.summaries import summaries as summaries
from sadsl.text.files import load as load
from sadsl.text.files import load_plan as load_plan
from sadsl.text.files import save as save
from sadsl.text.files import save_plan as save_plan
from sadsl.text.head_plans import read_head_plan as read_head_plan
from sadsl.text.head_plans import write_head_plan as write_head_plan
from sadsl.text.parsing import parse as parse

__version__ = _metadata.version("sadsl")

# Each name is the object that its module defines. `dir(sadsl)` shows no modules.
__all__ = [
    "Cache",
    "Compiled",
    "DecodingCache",
    "Grid",
    "IndexMap",
    "KernelConfig",
    "LinearState",
    "Lowered",
    "MeshAxes",
    "Plan",
    "Properties",
    "ShardPlan",
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
    "check_agreement",
    "clusters",
    "columns",
    "compressed",
    "cosformer_features",
    "delta",
    "dense_map",
    "dilated",
    "distance_bias",
    "dot",
    "dot_product_attention",
    "entries",
    "floor_log2",
    "full",
    "gate_bias",
    "gated",
    "heads",
    "induced",
    "init_cache",
    "isin",
    "joint",
    "key_bias",
    "key_mass",
    "keys",
    "kmeans",
    "latent",
    "linear",
    "linear_prefill",
    "linear_state",
    "linear_step",
    "load",
    "load_plan",
    "local_linear",
    "local_linear_residual",
    "log",
    "lower",
    "lsh",
    "mass",
    "maximum",
    "minimum",
    "offsets",
    "operand",
    "over",
    "pair_bias",
    "parse",
    "per_head",
    "plan",
    "plan_for",
    "power_of_two",
    "prefill",
    "prefix",
    "properties",
    "queries",
    "query_distance_bias",
    "read_head_plan",
    "regions",
    "release",
    "rowmajor",
    "rows",
    "save",
    "save_plan",
    "scatter_mean",
    "segments",
    "select",
    "shard_plan",
    "sharded_attention",
    "sinks",
    "softmax",
    "spans",
    "step",
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
