"""Block-sparse attention in plain JAX (scans, gathers, products), for CPUs."""

from pallas_kernels.xla.backward import backward as backward
from pallas_kernels.xla.forward import forward as forward
from pallas_kernels.xla.tiles import default_tiles as default_tiles
from pallas_kernels.xla.walks import lists_of as lists_of
from pallas_kernels.xla.walks import prepare as prepare
