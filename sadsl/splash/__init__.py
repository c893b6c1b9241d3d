"""The interface of jax's splash attention, on TPU, GPU and CPU.

``masks`` and ``kernel`` stand for the modules ``splash_attention_mask`` and
``splash_attention_kernel`` of jax. Any map of sadsl is a mask: ``MapMask``.
"""

from sadsl.splash.arrays import make_causal_mask as make_causal_mask
from sadsl.splash.arrays import make_chunk_attention_mask as make_chunk_attention_mask
from sadsl.splash.arrays import make_local_attention_mask as make_local_attention_mask
from sadsl.splash.arrays import make_random_mask as make_random_mask
from sadsl.splash.kernel import BlockSizes as BlockSizes
from sadsl.splash.kernel import QKVLayout as QKVLayout
from sadsl.splash.kernel import SegmentIds as SegmentIds
from sadsl.splash.kernel import SplashAttentionKernel as SplashAttentionKernel
from sadsl.splash.kernel import make_splash_mha as make_splash_mha
from sadsl.splash.kernel import (
    make_splash_mha_single_device as make_splash_mha_single_device,
)
from sadsl.splash.kernel import make_splash_mqa as make_splash_mqa
from sadsl.splash.kernel import (
    make_splash_mqa_single_device as make_splash_mqa_single_device,
)
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
