"""The specs of every layer of published models: tuples, one spec a layer.

``SparseAttention(spec=qwen3_next(), layer=i)`` takes the spec of its layer; the linear
layers of ``sadsl.layers`` add what surrounds a recurrence, and those of
``sadsl.layers.indexed_models`` what surrounds an indexer. Full layers are
``causal()``: norms of q and k, rotary positions and gates are the layer's.

Example:
  >>> from sadsl.catalog import models
  >>> for term in models.qwen3_next(4):
  ...     print(term)
  delta(decay='g')
  delta(decay='g')
  delta(decay='g')
  softmax(causal())
"""

from sadsl.catalog.models.delta_hybrids import bailing_hybrid as bailing_hybrid
from sadsl.catalog.models.delta_hybrids import kimi_linear as kimi_linear
from sadsl.catalog.models.delta_hybrids import olmo_hybrid as olmo_hybrid
from sadsl.catalog.models.delta_hybrids import qwen3_next as qwen3_next
from sadsl.catalog.models.indexed import deepseek_v4 as deepseek_v4
from sadsl.catalog.models.indexed import deepseek_v32 as deepseek_v32
from sadsl.catalog.models.indexed import glm_5 as glm_5
from sadsl.catalog.models.indexed import glm_5_next as glm_5_next
from sadsl.catalog.models.indexed import hy_v4 as hy_v4
from sadsl.catalog.models.indexed import minimax_m3 as minimax_m3
from sadsl.catalog.models.indexed import mistral_large_4 as mistral_large_4
from sadsl.catalog.models.indexed import qwen4_exp as qwen4_exp
from sadsl.catalog.models.linear_hybrids import minimax_01 as minimax_01
from sadsl.catalog.models.linear_hybrids import nemotron_h as nemotron_h
