"""Block-sparse attention in plain XLA: scans, gathers and matrix products; for CPUs."""

from pallas_kernels.xla.backward import backward as backward
from pallas_kernels.xla.defaults import default_tiles as default_tiles
from pallas_kernels.xla.forward import forward as forward
from pallas_kernels.xla.plan import prepare as prepare
