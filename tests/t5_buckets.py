"""Relative positions in buckets, as T5's published code has them."""

import numpy as np


def bucket_of(distance, num_buckets, max_distance):
    """The bucket of a distance of 0 or more on one side, computed in float32."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    large = np.log(np.float32(distance) / exact) / np.log(max_distance / exact)
    return min(exact + int(large * (num_buckets - exact)), num_buckets - 1)
