"""The compiler: turns an index map into a block plan and what kernels need.

Imported by ``sadsl``; no stability promise.
"""
