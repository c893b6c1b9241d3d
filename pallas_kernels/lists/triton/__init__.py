"""Attention by lists in Pallas Triton, for NVIDIA GPUs.

- ``forward`` and ``dq``: each program has one row of one unit. It gathers the keys of
  its list in chunks, with indexed loads. It tests the pairs first, and loads no key
  that no query of the row sees.
- ``dkv``: the lists are transposed by one sort (``transposed``). Each program has some
  consecutive keys and a part of the rows that list them, in a fixed order. A second
  kernel adds the parts, in order too. There are no atomics, so results repeat bit by
  bit.

The code compiles for NVIDIA GPUs, but none has run it: the tile sizes (``tiles``) come
from reasoning about registers and shared memory, not from a measurement.
"""

from pallas_kernels.lists.triton.derivatives import attend_lists as attend_lists
