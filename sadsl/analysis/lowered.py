"""``lower``: compiles a call for a chip and keeps every stage for inspection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from lowering import pipeline
from lowering.facts.plan_counts import Plan
from lowering.targets import chips, clients, compiling, gpu, outside, triton_ir
from pallas_kernels.call import Masks
from pallas_kernels.config import KernelConfig, Tiles
from sadsl.analysis.compiled import Compiled
from sadsl.analysis.explain import Explanation, explain, explain_parts
from sadsl.analysis.parts import SoftmaxPart, shapes_text
from sadsl.run import checks
from sadsl.run.attend import attend
from sadsl.run.backends import PLATFORMS, choose_impl
from sadsl.run.call import check_read
from sadsl.run.observed import softmax_calls
from sadsl.run.options import Options
from sadsl.run.types import Setting
from sadsl.terms.base import Spec, Term
from sadsl.text.specs import any_term

IMPL_OF_PLATFORM = {"cpu": "xla", "tpu": "tpu", "cuda": "triton"}


@dataclass(frozen=True)
class Lowered:
    """A lowered attention call; ``print`` shows every stage by name.

    ``options``, ``stages``, ``tiles``, ``masks`` and ``plan`` are those of the only
    softmax of the call. A term with several, or with none, has ``parts``.

    Attributes:
      term: what is computed.
      setting: the options of the call.
      target: the name of the chip, or "cpu".
      arguments: q, k, v and a dict of operands, as ShapeDtypeStructs.
      functions: the operands that are functions, by name.
      gradient: whether the gradients are lowered instead of the output.
    """

    term: Term
    setting: Setting
    target: str
    arguments: tuple
    functions: Mapping[str, Callable[..., Any]]
    gradient: bool = False

    @cached_property
    def parts(self) -> tuple[SoftmaxPart, ...]:
        """The softmax calls of the term in the order in which they run.

        >>> import jax, jax.numpy as jnp, sadsl as sa
        >>> x = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.bfloat16)
        >>> low = sa.lower(sa.average(sa.window(64), sa.strided(8)), x, x, x)
        >>> [part.plan.num_pairs for part in low.parts]
        [64480, 131072]
        """
        calls = softmax_calls(self._forward, *self.arguments)
        return tuple(
            SoftmaxPart(call.options, self.target, call.shapes) for call in calls
        )

    @property
    def part(self) -> SoftmaxPart:
        """The only softmax of the call.

        Raises:
          NotImplementedError: there are several, or none.
        """
        if len(self.parts) == 1:
            return self.parts[0]
        way = (
            f"ask one of its {len(self.parts)} parts: low.parts[0].plan"
            if self.parts
            else "it has no plan; low.compile().report() shows its code"
        )
        raise NotImplementedError(
            f"spec={self.term!r} is not one softmax over a map, so it has no stages, "
            f"blocks and plan of its own: {way}"
        )

    @property
    def options(self) -> Options:
        """The static part of the only softmax."""
        return self.part.options

    @property
    def stages(self) -> pipeline.Stages:
        """The stages of the map, one after each pass."""
        return self.part.stages

    @property
    def tiles(self) -> Tiles:
        """The block sizes of the forward, dq and dkv kernels."""
        return self.part.tiles

    @property
    def masks(self) -> Masks:
        """The plans of the forward, dq and dkv kernels."""
        return self.part.masks

    @property
    def plan(self) -> Plan:
        """The forward plan with its counts."""
        return self.part.plan

    def _forward(self, q: Any, k: Any, v: Any, operands: Mapping[str, Any]) -> Any:
        given = {**self.functions, **operands}
        out, lse, _ = attend(self.term, (q, k, v), given, self.setting)
        return out if lse is None else (out, lse)

    def run(self, q: Any, k: Any, v: Any, operands: Mapping[str, Any]) -> Any:
        """The lowered computation: ``(out, lse)``, or the gradients of ``out``.

        A term without a single normaliser returns ``out`` alone.
        """
        if not self.gradient:
            return self._forward(q, k, v, operands)

        def output(q: Any, k: Any, v: Any) -> Any:
            found = self._forward(q, k, v, operands)
            return found[0] if isinstance(found, tuple) else found

        out, pull = jax.vjp(output, q, k, v)
        return pull(jnp.ones_like(out))

    @cached_property
    def jaxpr(self) -> str:
        """The jaxpr of the call, with its kernels."""
        if self.target == "cpu":
            return self._jaxpr()
        with compiling.abstract_mesh(self.target):
            return self._jaxpr()

    def _jaxpr(self) -> str:
        found = jax.make_jaxpr(self.run)(*self.arguments)
        # Without this, notebooks would show the escape codes of colours.
        return found.pretty_print(use_color=False)

    @cached_property
    def module(self) -> str:
        """The lowered module: StableHLO, or the Triton IR of the kernels for GPUs."""
        lowered = self.jax_lowered()
        found = triton_ir.triton_ir(lowered) if self._platform == "cuda" else ""
        return found or lowered.as_text()

    def explain(self) -> Explanation:
        """Counts, FLOPs, bytes and predicted times, compared with dense attention.

        Of a term with several softmaxes, or with none: a line for each part.
        """
        if len(self.parts) == 1:
            return explain(self.part)
        return explain_parts(self.term, self.target, self.arguments, self.parts)

    def compile(self, *, timeout: float | None = None) -> Compiled:
        """Compiles the call for the target, which need not be present.

        For TPUs and GPUs a process of its own compiles. What it made is kept, by
        content, in a folder of at most 256 MB (``$SADSL_CACHE_DIR``, else "sadsl" in
        the user's cache; "off" keeps nothing). A GPU needs jax's CUDA plugin, ptxas and
        nvdisasm; without them there is Triton IR, and the report says what is missing.

        Args:
          timeout: seconds after which the compiler is stopped; 300 if None.

        Raises:
          RuntimeError: the compiler refuses the call, takes too long, or is missing.
        """
        if self._platform == "cpu":
            made = self.jax_lowered().compile()
            memory = clients.memory_of(made.memory_analysis())
            return Compiled(self, clients.CompiledProgram(made.as_text() or "", memory))
        if self._platform == "cuda" and not gpu.has_plugin():
            return Compiled(self, None)
        made = outside.compile_outside(self.jax_lowered(), self.target, timeout=timeout)
        return Compiled(self, made)

    @property
    def _platform(self) -> str:
        return "cpu" if self.target == "cpu" else chips.find(self.target).platform

    def jax_lowered(self) -> jax.stages.Lowered:
        """The call as jax lowers it."""
        if self.target == "cpu":
            return jax.jit(self.run).lower(*self.arguments)
        return compiling.lower_for(self.run, self.arguments, self.target)

    def __str__(self) -> str:
        jaxpr = f"-- jaxpr\n{_head(self.jaxpr, 40)}"
        if len(self.parts) == 1:
            return f"{self.part}\n\n{jaxpr}"
        shapes = shapes_text(self.arguments)
        found = [f"-- spec\n{self.term!r}\n{shapes}, target {self.target}"]
        for at, part in enumerate(self.parts):
            found.append(f"==== part {at + 1} of {len(self.parts)}\n{part}")
        return "\n\n".join([*found, jaxpr])


def lower(
    spec: Spec | str,
    q: Any,
    k: Any,
    v: Any,
    *,
    target: str | None = None,
    impl: str | None = None,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    q_offset: int = 0,
    config: KernelConfig | None = None,
    gradient: bool = False,
) -> Lowered:
    """Lowers ``attention(q, k, v, spec)`` for a chip, which need not be present.

    Args:
      spec: an index map, a term, or text.
      q, k, v: arrays or ShapeDtypeStructs, as in ``attention``.
      target: "cpu", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x", "a100", "h100",
        "h200", "b200"; None is the default device.
      impl: the backend; that of the target's platform if None.
      operands: run-time arrays or their ShapeDtypeStructs, and functions; segment ids
        are among them, as "q_segment_ids" and "kv_segment_ids".
      sm_scale, q_offset, config: as in ``attention``.
      gradient: lower the gradients of ``sum(out)`` instead of ``(out, lse)``.

    Raises:
      ValueError: the target is unknown, the backend cannot run on it, or the arrays do
        not fit the spec.
      NotImplementedError: the backend cannot do it.

    Example:
      >>> import jax, jax.numpy as jnp, sadsl as sa
      >>> x = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.bfloat16)
      >>> low = sa.lower(sa.causal() & sa.window(256), x, x, x, target="h100")
      >>> print(low.stages["simplify"])
      (k - q <= 0) & (q - k <= 256)
      >>> low.tiles.forward.block_q, low.plan.num_pairs
      (128, 230272)
    """
    target = target or _default_target()
    platform = "cpu" if target == "cpu" else _platform(target)
    term = any_term(spec)
    problem = checks.problem(q, k, v, q_offset, term)
    setting = Setting(
        sm_scale=float(checks.scale(sm_scale, q.shape[-1])),
        q_offset=problem.q_offset,
        impl=_impl_for(impl or IMPL_OF_PLATFORM[platform], target, platform),
        config=config or KernelConfig(),
    )
    checks.precision(q.dtype, setting.impl)
    check_read(term, operands or {})
    arrays, functions = _split(operands or {})
    arguments = (*map(_shape, (q, k, v)), arrays)
    lowered = Lowered(term, setting, target, arguments, functions, gradient)
    # Every error of the call is one of this function.
    _ = lowered.parts
    return lowered


def _split(operands: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The operands that are arrays, as ShapeDtypeStructs, and the functions."""
    arrays = {name: _shape(x) for name, x in operands.items() if hasattr(x, "dtype")}
    return arrays, {name: x for name, x in operands.items() if name not in arrays}


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _impl_for(impl: str, target: str, platform: str) -> str:
    """``impl``, if it has kernels that the target can run."""
    impl = choose_impl(impl, True)
    if impl not in PLATFORMS:
        raise ValueError(
            f"impl={impl!r} has no kernel to lower: leave impl out, or name one of "
            f"{', '.join(PLATFORMS)}"
        )
    if {"cuda": "gpu"}.get(platform, platform) not in PLATFORMS[impl]:
        raise ValueError(
            f"impl={impl!r} runs on {', '.join(PLATFORMS[impl])}, not on "
            f"target={target!r}: leave impl out, or name a target of that platform"
        )
    return impl


def _platform(target: str) -> str:
    """The platform of a target.

    Raises:
      ValueError: the target is unknown.
    """
    if target not in chips.NAMES:
        known = ", ".join(chips.NAMES)
        raise ValueError(f"target={target!r}: must be None or one of {known}")
    return chips.find(target).platform


def _default_target() -> str:
    """The target of the default device.

    Raises:
      ValueError: it is not a known chip.
    """
    if jax.default_backend() == "cpu":
        return "cpu"
    kind = jax.devices()[0].device_kind
    for name, target in chips.TARGETS.items():
        if target.device_kind == kind:
            return name
    raise ValueError(
        f"the default device is a {kind!r}, which is not a known target: pass target=, "
        f"one of {', '.join(chips.TARGETS)}"
    )


def _head(text: str, lines: int) -> str:
    found = text.splitlines()
    rest = len(found) - lines
    return "\n".join(found[:lines]) + (f"\n... ({rest} more lines)" if rest > 0 else "")
