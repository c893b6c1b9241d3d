"""The interface of jax's splash attention, on TPU, GPU and CPU.

``masks`` and ``kernel`` stand for the modules ``splash_attention_mask`` and
``splash_attention_kernel`` of jax. Any map of sadsl is a mask: ``MapMask``.
"""

from sadsl.splash.masks import CausalMask as CausalMask
from sadsl.splash.masks import ChunkedCausalMask as ChunkedCausalMask
from sadsl.splash.masks import ComputableMask as ComputableMask
from sadsl.splash.masks import FullMask as FullMask
from sadsl.splash.masks import LocalMask as LocalMask
from sadsl.splash.masks import LogicalAnd as LogicalAnd
from sadsl.splash.masks import LogicalOr as LogicalOr
from sadsl.splash.masks import MapMask as MapMask
from sadsl.splash.masks import Mask as Mask
from sadsl.splash.masks import MultiHeadMask as MultiHeadMask
from sadsl.splash.masks import NumpyMask as NumpyMask
from sadsl.splash.masks import make_causal_mask as make_causal_mask
from sadsl.splash.masks import make_chunk_attention_mask as make_chunk_attention_mask
from sadsl.splash.masks import make_local_attention_mask as make_local_attention_mask
from sadsl.splash.masks import make_random_mask as make_random_mask
