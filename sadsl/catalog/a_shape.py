"""A-shape and tri-shape heads of MInference."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window


def a_shape(num_init: int = 1024, num_local: int = 4096) -> IndexMap:
    """The first ``num_init`` keys and the last ``num_local``, the own one included.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3; the defaults are the paper's (1k global,
    4k local). The code searches among smaller ones, such as 100 and 800.
    """
    return causal() & (sinks(num_init) | window(num_local - 1))


def tri_shape(
    num_init: int = 1024, num_local: int = 4096, num_last: int = 100
) -> IndexMap:
    """``a_shape``, and everything for the last ``num_last`` queries.

    Li et al., SCBench: a KV cache-centric analysis of long-context methods, 2024; in
    the code of MInference, whose 100 last queries these are. They are counted from the
    number of keys.
    """
    last = where(lambda q, k, h, n: q >= n - num_last)
    return causal() & (sinks(num_init) | window(num_local - 1) | last)
