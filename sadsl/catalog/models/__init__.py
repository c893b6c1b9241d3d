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
from sadsl.catalog.models.gemma import embedding_gemma as embedding_gemma
from sadsl.catalog.models.gemma import gemma_2 as gemma_2
from sadsl.catalog.models.gemma import gemma_3 as gemma_3
from sadsl.catalog.models.gemma import gemma_4 as gemma_4
from sadsl.catalog.models.indexed import deepseek_v4 as deepseek_v4
from sadsl.catalog.models.indexed import deepseek_v32 as deepseek_v32
from sadsl.catalog.models.indexed import glm_5 as glm_5
from sadsl.catalog.models.indexed import glm_5_next as glm_5_next
from sadsl.catalog.models.indexed import hy_v4 as hy_v4
from sadsl.catalog.models.indexed import minimax_m3 as minimax_m3
from sadsl.catalog.models.indexed import mistral_large_4 as mistral_large_4
from sadsl.catalog.models.indexed import qwen4_exp as qwen4_exp
from sadsl.catalog.models.inkling import inkling as inkling
from sadsl.catalog.models.inkling import inkling_2 as inkling_2
from sadsl.catalog.models.latents import longcat_flash as longcat_flash
from sadsl.catalog.models.latents import ministral_3 as ministral_3
from sadsl.catalog.models.latents import mistral_4 as mistral_4
from sadsl.catalog.models.linear_hybrids import minimax_01 as minimax_01
from sadsl.catalog.models.linear_hybrids import nemotron_h as nemotron_h
from sadsl.catalog.models.sinks import gpt_oss as gpt_oss
from sadsl.catalog.models.sinks import granite_swa as granite_swa
from sadsl.catalog.models.sinks import mimo_v2_flash as mimo_v2_flash
from sadsl.catalog.models.windows import afmoe as afmoe
from sadsl.catalog.models.windows import cohere_2 as cohere_2
from sadsl.catalog.models.windows import exaone_4 as exaone_4
from sadsl.catalog.models.windows import kolibri_1 as kolibri_1
from sadsl.catalog.models.windows import llama_4 as llama_4
from sadsl.catalog.models.windows import modernbert as modernbert
from sadsl.catalog.models.windows import muse_spark as muse_spark
from sadsl.catalog.models.windows import olmo_3 as olmo_3
from sadsl.catalog.models.windows import smollm_3 as smollm_3
