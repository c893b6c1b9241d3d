"""Block-sparse attention in Pallas Triton, for NVIDIA GPUs."""

from pallas_kernels.triton.backward import backward as backward
from pallas_kernels.triton.forward import forward as forward
from pallas_kernels.triton.runs import prepare as prepare
from pallas_kernels.triton.tiles import default_tiles as default_tiles
