"""Layers for Flax: ``sadsl.layers.nnx``, ``sadsl.layers.linen`` and ``attention_fn``.

[extra: flax] Import the module of the API you use; this package imports neither.
"""

from sadsl.layers.drop_in import attention_fn as attention_fn
from sadsl.layers.stack import per_layer as per_layer
