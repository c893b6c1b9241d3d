"""Hash buckets and chunks of them, vector by vector in float64."""

import numpy as np


def gray(bits):
    """The reflected Gray code: neighbouring words differ in one bit."""
    if bits == 1:
        return [0, 1]
    half = gray(bits - 1)
    return half + [w + 2 ** (bits - 1) for w in reversed(half)]


def bucket(x, directions, kind):
    """The bucket of one vector, in float64; None if it is not finite."""
    if not np.isfinite(x).all():
        return None
    products = x.astype(np.float64) @ directions.astype(np.float64)
    if kind == "angular":
        return int(np.argmax([*products, *-products]))
    return gray(len(products)).index(sum(2**b for b, y in enumerate(products) if y > 0))


def chunks_of(buckets, size):
    """The chunk of each token in the order by bucket and position.

    None for a token without a bucket.
    """
    order = sorted((b, i) for i, b in enumerate(buckets) if b is not None)
    place = {i: at // size for at, (_, i) in enumerate(order)}
    return [place.get(i) for i in range(len(buckets))]
