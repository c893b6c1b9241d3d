"""Published static patterns, one mechanism a file, each a spec of a few lines.

Every function returns an index map; its docstring names the source, and its defaults
are those that were published.
"""

from sadsl.catalog.a_shape import a_shape as a_shape
from sadsl.catalog.a_shape import tri_shape as tri_shape
from sadsl.catalog.axial import axial as axial
from sadsl.catalog.big_bird import big_bird as big_bird
from sadsl.catalog.davit_window import davit_window as davit_window
from sadsl.catalog.dilated import dilated_window as dilated_window
from sadsl.catalog.log_sparse import log_sparse as log_sparse
from sadsl.catalog.longformer import longformer as longformer
from sadsl.catalog.mminference_grid import mminference_grid as mminference_grid
from sadsl.catalog.mminference_grid import residue_major as residue_major
from sadsl.catalog.moa import moa as moa
from sadsl.catalog.modality_mutual import modality_mutual as modality_mutual
from sadsl.catalog.neighborhood import neighborhood as neighborhood
from sadsl.catalog.pine import pine as pine
from sadsl.catalog.power_attention import power_attention as power_attention
from sadsl.catalog.prefix_lm import prefix_lm as prefix_lm
from sadsl.catalog.radial import radial as radial
from sadsl.catalog.s2 import s2_attention as s2_attention
from sadsl.catalog.s2 import s2_bidirectional as s2_bidirectional
from sadsl.catalog.sparse_transformer import (
    sparse_transformer_fixed as sparse_transformer_fixed,
)
from sadsl.catalog.sparse_transformer import (
    sparse_transformer_strided as sparse_transformer_strided,
)
from sadsl.catalog.streaming import streaming as streaming
from sadsl.catalog.swapped_window import swapped_window as swapped_window
