"""Block-sparse attention and linear attention kernels; imported by sadsl.

No stability promise. This package does not know index maps. A softmax call consists of
arrays, a ``BlockMask`` (runs of blocks) and an elementwise predicate for the blocks
that only part of the pairs fill.
"""
