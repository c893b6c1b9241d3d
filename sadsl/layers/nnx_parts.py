"""Parts of the NNX layers: projections, learned arrays, what stays between calls."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sadsl.layers.learned import started, width
from sadsl.layers.linear_gates import Parameter
from sadsl.layers.transforms import HeadTransforms
from sadsl.terms.base import LayerSizes, Learned

Init: TypeAlias = Callable[..., Any]


def unannotated(init: Init) -> Init:
    """``init`` without sharding names, for kernels of another number of axes."""

    def start(*args: Any) -> Array:
        value = init(*args)
        return value.raw_value if isinstance(value, nnx.VariableMetadata) else value

    return start


class NnxLinear(NamedTuple):
    """How the linear maps of a layer are made."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike
    kernel_init: Init
    bias_init: Init
    rngs: nnx.Rngs

    def __call__(self, *sizes: Any, **options: Any) -> nnx.LinearGeneral:
        """A linear map between two sizes; ``options`` go first."""
        return nnx.LinearGeneral(*sizes, **{**self._asdict(), **options})

    def unannotated(self) -> "NnxLinear":
        """The same without sharding names."""
        kernel, bias = unannotated(self.kernel_init), unannotated(self.bias_init)
        return self._replace(kernel_init=kernel, bias_init=bias)


def projections(
    linear: NnxLinear,
    sizes: LayerSizes,
    features: tuple[int, int, int],
    transforms: HeadTransforms,
    biased: Collection[str],
    out_inits: tuple[Init, Init],
) -> tuple[Any, ...]:
    """The projections "query", "key", "value", "out" and "gate", or None.

    Args:
      linear: makes them.
      sizes: of the layer.
      features: of the inputs of queries and of keys, and of the output.
      transforms: they say whether there are values and a gate.
      biased: the names of those with a bias.
      out_inits: the initializers of "out".
    """
    heads, keys, dim, *_ = sizes
    query = linear(features[0], (heads, dim), use_bias="query" in biased)
    key = linear(features[1], (keys, dim), use_bias="key" in biased)
    value = gate = None
    if not transforms.share_kv:
        value = linear(features[1], (keys, dim), use_bias="value" in biased)
    out = linear(
        (heads, dim), features[2], axis=(-2, -1), use_bias="out" in biased,
        kernel_init=out_inits[0], bias_init=out_inits[1],
    )  # fmt: skip
    axes = transforms.gate_axes(sizes)
    if axes:
        make = linear if len(axes) > 1 else linear.unannotated()
        gate = make(features[0], axes, use_bias="gate" in biased)
    return query, key, nnx.data(value), out, nnx.data(gate)


def learned_variables(
    wanted: Mapping[str, Learned], linear: NnxLinear, features: int
) -> nnx.Dict | None:
    """Makes a projection for each ``per_query`` array, else a parameter."""
    linear = linear.unannotated()
    made: dict[str, Any] = {}
    for name, array in wanted.items():
        start = started(array)
        if array.per_query:
            made[name] = linear(features, width(array), bias_init=start)
        else:
            value = start(linear.rngs.params(), array.shape, linear.param_dtype)
            made[name] = nnx.Param(value)
    return nnx.Dict(made) if made else None


def parameter_group(
    arrays: Mapping[str, Parameter], dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Dict:
    """Makes the parameters of a group."""
    made = {
        name: nnx.Param(start(rngs.params(), shape, dtype))
        for name, (shape, start) in arrays.items()
    }
    return nnx.Dict(made)


class Centroids(nnx.Variable):
    """Centroids of a ``RoutingAttention``, and the moving sums behind them."""


class CommitmentLoss(nnx.Variable):
    """The commitment loss of the last step of a ``RoutingAttention``, f32."""


def commitment_loss(model: nnx.Module) -> Float[Array, ""]:
    """Sums the commitment losses of all routing layers in their last call.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from sadsl.layers.nnx import RoutingAttention, commitment_loss
      >>> from sadsl.layers.routing import Routing
      >>> def loss(x):
      ...     routing = Routing(num_clusters=2, window=4, local_window=4)
      ...     layer = RoutingAttention(2, 8, routing=routing, rngs=nnx.Rngs(0))
      ...     layer(x)
      ...     return commitment_loss(layer)
      >>> jax.eval_shape(loss, jax.ShapeDtypeStruct((1, 8, 8), "float32")).shape
      ()
    """
    losses = jax.tree.leaves(nnx.state(model, CommitmentLoss))
    return sum(losses, start=jnp.zeros((), jnp.float32))
