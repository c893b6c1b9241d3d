"""Layers for Flax: ``sadsl.layers.nnx``, ``sadsl.layers.linen`` and ``attention_fn``.

They need the extra ``flax``. Import the module of the API that you use: this package
imports neither.
"""

from sadsl.layers.drop_in import attention_fn as attention_fn
from sadsl.layers.shared_choices import choice_sources as choice_sources
from sadsl.layers.shared_choices import run_stack as run_stack
from sadsl.layers.stack import per_layer as per_layer
