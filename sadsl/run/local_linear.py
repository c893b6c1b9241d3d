"""Runs local linear attention: a small linear system for each query."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dense
from pallas_kernels.call import Inputs
from pallas_kernels.config import KernelConfig
from pallas_kernels.precision import wide, widened
from pallas_kernels.solve import Accuracy
from pallas_kernels.xla import local_linear
from sadsl.run import checks
from sadsl.run.attend import attend, choose
from sadsl.run.backends import choose_impl
from sadsl.run.content import with_parts
from sadsl.run.kernels import choose_tiles, kernel_call, prepare
from sadsl.run.operands import call_arrays
from sadsl.run.options import Options, options_of, traced_scale
from sadsl.run.softmax import allowed_pairs
from sadsl.run.symbolic_batch import entry_by_entry, is_symbolic
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import TRACED_SCALE, Spec, read_by
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term


@attend.register
def _(
    term: LocalLinear, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """The outputs, and the lse of the weights before the regression.

    Raises:
      FloatingPointError: an eager call whose systems miss the tolerance.
      ValueError: the ridge is missing, or is not positive, or has another shape.
      NotImplementedError: the call has dropout, or the backend has no such kernel.
    """
    out, lse, residual = _fitted(term, inputs, given, setting)
    _check(term, residual)
    return Outcome(out, lse)


@choose.register
def _(
    term: LocalLinear, inputs: tuple[Array, Array], given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:  # fmt: skip
    """The choices of the selections in the map."""
    return choose(Softmax(term.map), inputs, read_by(term.map, given), setting)


def local_linear_residual(
    spec: Spec | str,
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    *,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | Array | None = None,
    q_offset: int = 0,
    impl: str | None = None,
    config: KernelConfig | None = None,
) -> Float[Array, "batch num_q_heads q_seq"]:
    """How far the systems of a ``local_linear`` term are from being solved.

    It is ``|q - m - (C + ridge I) x| / |q - m|``, as ``local_linear`` explains, and 0
    for a query that sees no key. Where it is above the tolerance of the term, or NaN,
    an eager call of ``attention`` is refused, and a traced one yields NaN.

    Args:
      spec: a ``local_linear`` term, or its text.
      q, k: as in ``attention``.
      operands: the run-time arrays of the call; segment ids are among them, as
        "q_segment_ids" and "kv_segment_ids".
      sm_scale, q_offset, impl, config: as in ``attention``.

    Raises:
      TypeError: the spec is another term.
      ValueError: the arrays and the spec do not fit together.
      NotImplementedError: this backend cannot do it.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 1.0]]).reshape(1, 3, 1, 2)
      >>> term = sa.local_linear(sa.causal(), 0.1)
      >>> residual = sa.local_linear_residual(term, x, x, impl="reference")
      >>> residual.shape, bool(residual.max() < 1e-5)
      ((1, 1, 3), True)
    """
    term = any_term(spec)
    if not isinstance(term, LocalLinear):
        raise TypeError(
            f"local_linear_residual takes a local_linear(...) term, not {term!r}: only "
            "its queries have linear systems; for a mixture, give the part"
        )
    problem = checks.problem(q, k, k, q_offset)
    scale = checks.scale(sm_scale, q.shape[-1])
    impl = choose_impl(impl, False, q, k)
    checks.precision(q.dtype, impl)
    setting = Setting(scale, problem.q_offset, impl, config=config or KernelConfig())
    # Residuals do not depend on the values.
    return _fitted(term, (q, k, k[..., :1]), operands or {}, setting)[2]


def _fitted(
    term: LocalLinear, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> tuple[Array, Array, Array]:
    """Output, lse and residual of a call, after its checks."""
    if setting.dropout_rate:
        raise NotImplementedError(
            f"{term!r} with dropout_rate={setting.dropout_rate}: a regression without "
            "some of its keys is another regression; leave it 0"
        )
    if setting.impl not in ("xla", "reference"):
        raise NotImplementedError(
            f"{term!r} has no kernel for impl={setting.impl!r}: pass impl='xla', which "
            "runs on every device, or impl='reference'"
        )
    options = options_of(inputs, Softmax(term.map), setting)
    operands = {name: x for name, x in given.items() if name != term.ridge}
    arrays = call_arrays(options, operands, inputs[0].shape[0]) | traced_scale(setting)
    accuracy = Accuracy(term.tolerance, term.iterations)
    ridge = _ridge(term, given, inputs[0])
    return _traced(*inputs, ridge, arrays, options=options, accuracy=accuracy)


def _ridge(
    term: LocalLinear, given: Mapping[str, Any], q: Array
) -> Float[Array, "batch_or_1 heads"]:
    """The ridge of every head.

    Raises:
      ValueError: the operand was not given, is not positive, or has another shape.
    """
    batch, _, heads, _ = q.shape
    if not isinstance(term.ridge, str):
        return jnp.full((1, heads), term.ridge, wide(q.dtype))
    if term.ridge not in given:
        raise ValueError(
            f"{term!r} reads its ridge from {term.ridge!r}, which was not given: pass "
            f"operands={{{term.ridge!r}: array}} with a positive float for each of "
            f"{heads} heads"
        )
    ridge = jnp.asarray(given[term.ridge])
    if ridge.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"operand {term.ridge!r} has shape {ridge.shape}: the ridge of {term!r} "
            f"must have shape ({heads},), one number for each head, or "
            f"{(batch, heads)}"
        )
    least = jax.lax.stop_gradient(jnp.min(ridge))
    if _known(~(least > 0)):
        raise ValueError(
            f"operand {term.ridge!r} has the entry {float(least)}: the ridge "
            f"of {term!r} must be positive, such as jnp.exp of what is learned"
        )
    return ridge.reshape(-1, heads).astype(wide(q.dtype))


def _check(term: LocalLinear, residual: Array) -> None:
    """Refuses an eager call whose systems miss the tolerance.

    Raises:
      FloatingPointError: a residual is above the tolerance, or NaN.
    """
    worst = jax.lax.stop_gradient(jnp.max(residual))
    if _known(~(worst <= term.tolerance)):
        raise FloatingPointError(
            f"{term!r}: the residual of a system is {float(worst):.1e}, above the "
            f"tolerance {term.tolerance:.1e}: raise the ridge or the tolerance, or "
            "allow more iterations; NaN comes from arrays that are not finite, or from "
            "a ridge that is lost in rounding beside the covariance of the keys"
        )


def _known(truth: Array) -> bool:
    """Whether ``truth`` is true, as far as its value is known: False if traced."""
    try:
        return bool(truth)
    except jax.errors.ConcretizationTypeError:
        return False


@partial(jax.jit, static_argnames=("options", "accuracy"))
def _traced(
    q: Array, k: Array, v: Array, ridge: Array, arrays: Mapping[str, Array], *,
    options: Options, accuracy: Accuracy,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Output, lse and residual of checked arrays."""
    run = partial(_run, options=options, accuracy=accuracy)
    if is_symbolic(q):
        return entry_by_entry(run, q, k, v, ridge, arrays)
    return run(q, k, v, ridge, arrays)


def _run(
    q: Array, k: Array, v: Array, ridge: Array, arrays: Mapping[str, Array], *,
    options: Options, accuracy: Accuracy,
) -> tuple[Array, Array, Array]:  # fmt: skip
    chosen = with_parts(q, k, arrays, options)
    scale, dtype = options.setting.sm_scale, q.dtype
    q, k, v = map(widened, (q, k, v))
    factor = None if scale is not None else arrays[TRACED_SCALE].astype(q.dtype)
    if scale is None:
        options = options.with_scale(1.0)

    def points(inputs: Inputs) -> local_linear.Points:
        at = inputs.q
        scored = at if factor is None else at * factor
        ridges = jnp.broadcast_to(ridge[..., None], at.shape[:3])
        return local_linear.Points(inputs._replace(q=scored), at, ridges)

    if options.setting.impl == "reference":
        pairs = allowed_pairs(chosen, options)
        given = points(Inputs(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))))
        scale = options.setting.sm_scale
        o, lse, residual = dense.local_linear(*given, pairs, scale, accuracy)
        return jnp.swapaxes(o, 1, 2).astype(dtype), lse, residual
    tiles = choose_tiles(options, q.shape[-1], v.shape[-1], q.dtype)
    ready = prepare(chosen, options, tiles, q.dtype)
    call = kernel_call(options, ready.stages, tiles, q.dtype)
    given = points(ready.to_slots(q, k, v))
    args = given, ready.vectors, ready.masks, call, accuracy
    found, lse, residual = local_linear.attend(*args)
    o, lse = ready.to_positions(found, lse)
    return o.astype(dtype), lse, ready.to_positions(found, residual)[1]
