"""One description of the linear layers, which both Flax APIs run.

A ``LinearLayer`` is a frozen value: the spec, the sizes, and the parts around the
recurrence. ``parameters`` lists the arrays that it learns, and calling it with them is
a pure function of arrays. ``sadsl.layers.nnx`` and ``sadsl.layers.linen`` only hold the
arrays. The functions of ``linear_models`` describe the published layers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.layers.linear_gates import (
    Gate,
    Parameter,
    Params,
    constant,
    kernel,
    maps,
    projected,
    through,
)
from sadsl.layers.parts import Activation, gated_rms_norm, short_convolution
from sadsl.run.linear_decoding import linear_state
from sadsl.run.linear_state import LinearState
from sadsl.sharding.call import attention_over
from sadsl.sharding.mesh_axes import MeshAxes
from sadsl.terms.features import FEATURES
from sadsl.terms.recurrent import Recurrent

# A convolution starts uniform within 1 / sqrt(width).
CONV_INIT = jax.nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0
)


class LinearLayerState(NamedTuple):
    """What a layer keeps of earlier tokens; its size does not grow with them.

    Attributes:
      conv: the last inputs of the convolution, ``[batch, width - 1, channels]``; None
        without one.
      inner: the state of the recurrence.
    """

    conv: Array | None
    inner: LinearState


class Running(NamedTuple):
    """How a layer is computed: its dtype, and what ``sadsl.attention`` takes.

    Attributes:
      dtype: of the computation; promoted from input and parameters if None.
      impl, interpret, config: as in ``sadsl.attention``.
      mesh_axes: as in ``SparseAttention``; of calls without a state.
    """

    dtype: DTypeLike | None = None
    impl: str | None = None
    interpret: Any = False
    config: KernelConfig | None = None
    mesh_axes: MeshAxes | None = None


@dataclass(frozen=True)
class OutputNorm:
    """An RMS norm of the outputs, and a gate that the layer's input opens.

    Attributes:
      gate: activation of the gate; None for no gate.
      rank: width of the two linear maps of the gate; one full map if None.
      eps: added to the mean square.
      over: whether channels of each "head" are normalised, or "all" together.
    """

    gate: Activation | None = None
    rank: int | None = None
    eps: float = 1e-5
    over: Literal["head", "all"] = "head"


@dataclass(frozen=True)
class LinearLayer:
    """A layer around a recurrent spec; see the functions of ``linear_models``.

    Attributes:
      spec: ``linear(...)`` or ``delta(...)``.
      features, out_features: of the input and of the result.
      num_heads, num_v_heads: heads of queries and keys, and of values.
      head_dim, head_dim_v: channels of a key, and of a value.
      conv: width of the short convolution over q, k and v; None for none.
      silu: which of "q", "k", "v" pass through SiLU, after the convolution.
      gates: what makes the operands of the spec.
      norm: what follows the recurrence; None for nothing.
    """

    spec: Recurrent
    features: int
    out_features: int
    num_heads: int
    num_v_heads: int
    head_dim: int
    head_dim_v: int
    conv: int | None = None
    silu: str = ""
    gates: tuple[Gate, ...] = ()
    norm: OutputNorm | None = None

    def __post_init__(self) -> None:
        for name in ("features", "out_features", "num_heads", "num_v_heads",
                     "head_dim", "head_dim_v"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_v_heads % self.num_heads:
            raise ValueError(
                f"num_v_heads={self.num_v_heads} must be a multiple of "
                f"num_heads={self.num_heads}: value heads share keys in groups"
            )
        if self.conv is not None and self.conv < 1:
            raise ValueError(
                f"conv={self.conv} must be at least 1: it counts the token itself; "
                "None is no convolution"
            )

    def parameters(self) -> dict[str, Parameter]:
        """The arrays that the layer learns, by name."""
        heads = self.num_heads, self.head_dim
        values = self.num_v_heads, self.head_dim_v
        found = {
            "query": kernel(self.features, *heads),
            "key": kernel(self.features, *heads),
            "value": kernel(self.features, *values),
        }
        if self.conv is not None:
            channels = sum(self._channels)
            found["conv"] = Parameter((channels, self.conv), CONV_INIT)
        for gate in self.gates:
            found |= gate.parameters(self)
        if self.norm is not None:
            width = values if self.norm.over == "all" else values[1:]
            found["norm"] = constant(1.0, *width)
            if self.norm.gate is not None:
                found |= maps("gate", self.features, self.norm.rank, values)
        found["out"] = kernel(*values, self.out_features, inputs=2)
        return found

    @property
    def _channels(self) -> tuple[int, int, int]:
        """The channels of q, k and v."""
        keys = self.num_heads * self.head_dim
        return keys, keys, self.num_v_heads * self.head_dim_v

    def __call__(
        self,
        params: Params,
        x: Float[Array, "batch seq features"],
        *,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        state: LinearLayerState | None = None,
        return_state: bool = False,
        running: Running | None = None,
    ) -> Any:
        """The outputs ``[batch, seq, out_features]``; also the state if asked for.

        Args:
          params: an array for each of ``parameters()``.
          x: the inputs.
          segment_ids: the document of each token, if the map has ``segments()``.
          state: the state of earlier tokens.
          return_state: whether to return also the state after the last token.
          running: the dtype and the backend.
        """
        running = Running() if running is None else running
        dtype = running.dtype
        if dtype is None:
            dtype = jnp.promote_types(x.dtype, params["query"].dtype)
        x = x.astype(dtype)
        q, k, v, conv = self._projected(params, x, segment_ids, state)
        operands: dict[str, Array] = {}
        for gate in self.gates:
            operands.update(gate.operands(params, x))
        stateful: dict[str, Any] = {}
        if state is not None or return_state:
            before = None if state is None else state.inner
            stateful = {"state0": before, "return_state": return_state}
        axes = None if stateful else running.mesh_axes
        found = attention_over(axes)(
            q, k, v, self.spec, operands=operands,
            q_segment_ids=segment_ids, kv_segment_ids=segment_ids, **stateful,
            impl=running.impl, interpret=running.interpret, config=running.config,
        )  # fmt: skip
        out, inner = found if return_state else (found, None)
        y = self._output(params, x, cast(Array, out))
        if return_state:
            return y, LinearLayerState(conv, cast(LinearState, inner))
        return y

    def _projected(
        self,
        params: Params,
        x: Array,
        segment_ids: Array | None,
        state: LinearLayerState | None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys and values, and the last inputs of the convolution."""
        found = [projected(x, params[name]) for name in ("query", "key", "value")]
        shapes, last = [y.shape for y in found], None
        if self.conv is not None:
            flat = jnp.concatenate([y.reshape(*y.shape[:2], -1) for y in found], -1)
            past = x.shape[0], self.conv - 1, flat.shape[-1]
            before = _before(state, segment_ids, past)
            flat, last = short_convolution(
                flat, params["conv"], before=before, segment_ids=segment_ids,
                activation=None,
            )  # fmt: skip
            q, k, _ = self._channels
            found = jnp.split(flat, [q, q + k], axis=-1)
        q, k, v = (
            (jax.nn.silu(y) if name in self.silu else y).reshape(shape)
            for name, y, shape in zip("qkv", found, shapes, strict=True)
        )
        return q, k, v, last

    def _output(self, params: Params, x: Array, out: Array) -> Array:
        """The norm, the gate and the last linear map."""
        norm, shape = self.norm, out.shape
        if norm is not None:
            # One row for each head, or for all of them.
            row = shape[2:] if norm.over == "head" else (-1,)
            gate = None
            if norm.gate is not None:
                gate = through("gate", params, x).reshape(*shape[:2], *row)
            out = gated_rms_norm(
                out.reshape(*shape[:2], *row), params["norm"].reshape(-1), gate,
                activation=norm.gate or "silu", eps=norm.eps,
            )  # fmt: skip
        weight = params["out"].astype(x.dtype)
        flat = out.astype(x.dtype).reshape(*x.shape[:2], -1)
        return jnp.matmul(flat, weight.reshape(-1, self.out_features))

    def init_state(
        self, batch: int, dtype: DTypeLike = jnp.float32
    ) -> LinearLayerState:
        """The state before the first token.

        Args:
          batch: number of batch entries.
          dtype: of the computation, for the inputs of the convolution.

        Raises:
          ValueError: the map is not causal.
        """
        inner = linear_state(
            self.spec, batch, self.num_v_heads, self._features, self.head_dim_v
        )
        conv = None
        if self.conv is not None:
            conv = jnp.zeros((batch, self.conv - 1, sum(self._channels)), dtype)
        return LinearLayerState(conv, inner)

    @property
    def _features(self) -> int:
        """The features of a key, after the feature map of the spec."""
        phi = getattr(self.spec, "feature_map", "identity")
        phi = FEATURES[phi] if isinstance(phi, str) else phi
        at = (jnp.zeros(1, jnp.int32),) if getattr(phi, "positional", False) else ()
        key = jax.ShapeDtypeStruct((1, 1, 1, self.head_dim), jnp.float32)
        return jax.eval_shape(lambda k: phi(k, *at), key).shape[-1]


def _before(
    state: LinearLayerState | None,
    segment_ids: Array | None,
    wanted: tuple[int, int, int],
) -> Array | None:
    """The inputs before the first token, zeros if they are of another document.

    Raises:
      ValueError: the state is that of another layer, or of another batch.
    """
    if state is None:
        return None
    conv = state.conv
    if conv is None or conv.shape != wanted:
        found = "no inputs" if conv is None else f"inputs of shape {conv.shape}"
        raise ValueError(
            f"the state holds {found} of a convolution: this layer has {wanted}; make "
            "a state with its init_state or return_state=True"
        )
    past = state.inner.documents
    if past is None or segment_ids is None:
        return conv
    goes_on = (past.ids[:, 0] == segment_ids[:, 0]) & (past.count > 0)
    return jnp.where(goes_on[:, None, None], conv, 0)
