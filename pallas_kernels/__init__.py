"""Block-sparse attention kernels over a BlockMask; imported by sadsl.

No stability promise. This package has never heard of an index map: it sees arrays,
runs of blocks, and an elementwise predicate for the blocks that are partly filled.
"""
