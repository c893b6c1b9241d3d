"""Published attention mechanisms: one file each, a spec of a few lines.

Every function returns an index map, or a term where one map is not enough. Its
docstring names the paper. Its defaults are the published ones.

Example:
  >>> import sadsl as sa
  >>> from sadsl import catalog
  >>> spec = catalog.streaming(num_sinks=1, num_recent=2)
  >>> spec
  causal() & (sinks(1) | window(1))
  >>> print(spec.dense(5)[0].astype(int))
  [[1 0 0 0 0]
   [1 1 0 0 0]
   [1 1 1 0 0]
   [1 0 1 1 0]
   [1 0 0 1 1]]
  >>> sa.plan(spec, 4096, 4096).num_pairs
  12285
"""

from sadsl.catalog.a_shape import a_shape as a_shape
from sadsl.catalog.a_shape import tri_shape as tri_shape
from sadsl.catalog.anchor_attention import anchor_attention as anchor_attention
from sadsl.catalog.axial import axial as axial
from sadsl.catalog.biformer import biformer as biformer
from sadsl.catalog.big_bird import big_bird as big_bird
from sadsl.catalog.block_sparse import block_sparse as block_sparse
from sadsl.catalog.combiner import (
    combiner_axial_horizontal as combiner_axial_horizontal,
)
from sadsl.catalog.combiner import combiner_axial_rowmajor as combiner_axial_rowmajor
from sadsl.catalog.combiner import combiner_axial_vertical as combiner_axial_vertical
from sadsl.catalog.combiner import combiner_fixed as combiner_fixed
from sadsl.catalog.combiner import combiner_logsparse as combiner_logsparse
from sadsl.catalog.combiner import combiner_mixture as combiner_mixture
from sadsl.catalog.combiner import routing_combiner as routing_combiner
from sadsl.catalog.davit_channel import davit_channel as davit_channel
from sadsl.catalog.davit_window import davit_window as davit_window
from sadsl.catalog.delta_llm import delta_llm as delta_llm
from sadsl.catalog.delta_llm import reference_keys as reference_keys
from sadsl.catalog.delta_rules import comba as comba
from sadsl.catalog.delta_rules import delta_net as delta_net
from sadsl.catalog.delta_rules import gated_delta_net as gated_delta_net
from sadsl.catalog.delta_rules import gated_delta_product as gated_delta_product
from sadsl.catalog.delta_rules import kimi_delta as kimi_delta
from sadsl.catalog.delta_rules import precond_kda as precond_kda
from sadsl.catalog.delta_rules import preconditioned_keys as preconditioned_keys
from sadsl.catalog.delta_rules import rwkv7 as rwkv7
from sadsl.catalog.dhsa import dhsa as dhsa
from sadsl.catalog.dilated import dilated_window as dilated_window
from sadsl.catalog.dynamic_mask import dynamic_mask as dynamic_mask
from sadsl.catalog.dynamic_mask import dynamic_mask_attention as dynamic_mask_attention
from sadsl.catalog.dynamic_mask import value_bias as value_bias
from sadsl.catalog.fixed_decays import minimax_lightning as minimax_lightning
from sadsl.catalog.fixed_decays import ret_net as ret_net
from sadsl.catalog.flex_prefill import flex_prefill as flex_prefill
from sadsl.catalog.gated_linear import gla as gla
from sadsl.catalog.gated_linear import hgrn2 as hgrn2
from sadsl.catalog.gated_linear import mamba2 as mamba2
from sadsl.catalog.gated_linear import rwkv6 as rwkv6
from sadsl.catalog.hebbian import hebbian as hebbian
from sadsl.catalog.hip import hip as hip
from sadsl.catalog.hybrids import linear_and_window as linear_and_window
from sadsl.catalog.hyper_attention import Hyper as Hyper
from sadsl.catalog.hyper_attention import draw_hyper as draw_hyper
from sadsl.catalog.hyper_attention import hyper_attention as hyper_attention
from sadsl.catalog.kinetics import kinetics as kinetics
from sadsl.catalog.light_net import light_net as light_net
from sadsl.catalog.log_sparse import log_sparse as log_sparse
from sadsl.catalog.longformer import longformer as longformer
from sadsl.catalog.minference import minference as minference
from sadsl.catalog.minference import minference_candidates as minference_candidates
from sadsl.catalog.mminference import mminference_2d_boundary as mminference_2d_boundary
from sadsl.catalog.mminference import mminference_candidates as mminference_candidates
from sadsl.catalog.mminference import mminference_q_boundary as mminference_q_boundary
from sadsl.catalog.mminference_grid import mminference_grid as mminference_grid
from sadsl.catalog.mminference_grid import residue_major as residue_major
from sadsl.catalog.moba import moba as moba
from sadsl.catalog.modality_mutual import modality_mutual as modality_mutual
from sadsl.catalog.neighborhood import neighborhood as neighborhood
from sadsl.catalog.nsa import native_sparse_attention as native_sparse_attention
from sadsl.catalog.nsa import nsa_importance as nsa_importance
from sadsl.catalog.nsa_topk import nsa_topk as nsa_topk
from sadsl.catalog.performer import FavorFeatures as FavorFeatures
from sadsl.catalog.performer import favor_features as favor_features
from sadsl.catalog.performer import performer as performer
from sadsl.catalog.pine import pine as pine
from sadsl.catalog.power_attention import power_attention as power_attention
from sadsl.catalog.prefix_lm import prefix_lm as prefix_lm
from sadsl.catalog.quest import quest as quest
from sadsl.catalog.radial import radial as radial
from sadsl.catalog.reformer import reformer as reformer
from sadsl.catalog.routing_transformer import routing_transformer as routing_transformer
from sadsl.catalog.s2 import s2_attention as s2_attention
from sadsl.catalog.s2 import s2_bidirectional as s2_bidirectional
from sadsl.catalog.seer_attention import seer_attention as seer_attention
from sadsl.catalog.snapkv import snapkv as snapkv
from sadsl.catalog.sparse_transformer import (
    sparse_transformer_fixed as sparse_transformer_fixed,
)
from sadsl.catalog.sparse_transformer import (
    sparse_transformer_strided as sparse_transformer_strided,
)
from sadsl.catalog.sparsed import sparsed as sparsed
from sadsl.catalog.sparsifiner import sparsifiner as sparsifiner
from sadsl.catalog.sparsifiner import sparsifiner_loss as sparsifiner_loss
from sadsl.catalog.sqa import sqa as sqa
from sadsl.catalog.streaming import streaming as streaming
from sadsl.catalog.swapped_window import swapped_window as swapped_window
from sadsl.catalog.vmoba import vmoba as vmoba
from sadsl.maps.growing_spans import moa as moa
