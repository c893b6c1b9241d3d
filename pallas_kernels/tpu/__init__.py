"""Block-sparse attention on TPUs: Pallas kernels that read runs by manual DMA."""

from pallas_kernels.tpu.backward import backward as backward
from pallas_kernels.tpu.forward import forward as forward
from pallas_kernels.tpu.plans import prepare as prepare
from pallas_kernels.tpu.tiles import default_tiles as default_tiles
