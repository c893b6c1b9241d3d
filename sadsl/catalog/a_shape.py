"""The A-shape and tri-shape heads of MInference."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, sinks, where, window


def a_shape(num_init: int = 1024, num_local: int = 4096) -> IndexMap:
    """Each query sees the first ``num_init`` keys and its last ``num_local`` keys.

    Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention, 2024, section 3. The defaults are the paper's (1k global,
    4k local). Its code searches among smaller sizes, such as 100 and 800.

    Args:
      num_init: keys at the start of the sequence that every later query sees.
      num_local: nearest keys up to the query; the query's own position counts.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.a_shape(1, 2).dense(6)[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 0 1 1 0 0]
       [1 0 0 1 1 0]
       [1 0 0 0 1 1]]
    """
    return causal() & (sinks(num_init) | window(num_local - 1))


def tri_shape(
    num_init: int = 1024, num_local: int = 4096, num_last: int = 100
) -> IndexMap:
    """An ``a_shape`` whose last ``num_last`` queries see every earlier key.

    Li et al., SCBench: a KV cache-centric analysis of long-context methods, 2024. The
    default of 100 last queries is that of MInference's code.

    Args:
      num_init: keys at the start of the sequence that every later query sees.
      num_local: nearest keys up to the query; the query's own position counts.
      num_last: queries at the end that are plainly causal, counted back from the number
        of keys.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.tri_shape(1, 2, num_last=2).dense(6)[0].astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 0 1 1 0 0]
       [1 1 1 1 1 0]
       [1 1 1 1 1 1]]
    """
    last = where(lambda q, k, h, n: q >= n - num_last)
    return causal() & (sinks(num_init) | window(num_local - 1) | last)
