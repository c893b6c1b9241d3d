"""``lower``: compiles a call for a chip and keeps every stage for inspection."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from lowering import pipeline
from lowering.targets import compiling, triton_ir
from lowering.facts.plan_counts import Plan
from pallas_kernels.call import Masks
from pallas_kernels.config import KernelConfig, Tiles
from sadsl.analysis.explain import Explanation, explain
from sadsl.run import checks, merging
from sadsl.run.backends import PLATFORMS, choose_impl
from sadsl.run.kernels import choose_tiles
from sadsl.run.operands import check_given, operand_ranks
from sadsl.run.options import Options, check_kernel_term
from sadsl.run.plans import plan_of
from sadsl.run.softmax import sinks_of, traced
from sadsl.run.types import Setting
from sadsl.terms.base import Spec
from sadsl.text.specs import as_term

IMPL_OF_PLATFORM = {"cpu": "xla", "tpu": "tpu", "cuda": "triton"}


@dataclass(frozen=True)
class Lowered:
    """A lowered attention call; ``print`` shows every stage by name.

    Attributes:
      options: the static part of the call.
      target: the name of the chip, or "cpu".
      arguments: q, k, v and a dict of operands, as ShapeDtypeStructs.
      gradient: whether the gradients are lowered instead of the output.
    """

    options: Options
    target: str
    arguments: tuple
    gradient: bool = False

    @property
    def stages(self) -> pipeline.Stages:
        """The stages of the map, one after each pass."""
        return self.options.arranged(self.tiles)

    @cached_property
    def tiles(self) -> Tiles:
        """The block sizes of the forward, dq and dkv kernels."""
        q, _, v, _ = self.arguments
        return choose_tiles(self.options, q.shape[-1], v.shape[-1], q.dtype)

    @cached_property
    def masks(self) -> Masks:
        """The plans of the forward, dq and dkv kernels."""
        return pipeline.masks(self.stages, self.tiles)

    @cached_property
    def plan(self) -> Plan:
        """The forward plan with its counts."""
        forward = self.tiles.forward
        blocks = forward.block_q, forward.block_kv
        return plan_of(self.stages, self.options.stages, *blocks)

    def run(self, q: Any, k: Any, v: Any, operands: Mapping[str, Any]) -> Any:
        """The lowered computation: ``(out, lse)``, or the gradients of ``out``."""

        term = self.options.term
        arrays = {name: x for name, x in operands.items() if name != term.sink}

        def forward(q: Any, k: Any, v: Any) -> Any:
            out, lse = traced(q, k, v, arrays, options=self.options)
            if term.sink is None:
                return out, lse
            found = merging.with_sink(out, lse, sinks_of(term, operands, q))
            return found.out, found.lse

        if not self.gradient:
            return forward(q, k, v)
        (out, lse), pull = jax.vjp(forward, q, k, v)
        return pull((jnp.ones_like(out), jnp.zeros_like(lse)))

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
        """The lowered module: StableHLO for CPUs and TPUs, Triton IR for GPUs."""
        lowered = self._jax_lowered()
        if self._platform == "cuda":
            return triton_ir.triton_ir(lowered)
        return lowered.as_text()

    def explain(self) -> Explanation:
        """Counts, FLOPs, bytes and predicted times, compared with dense attention."""
        return explain(self)

    def compile(self) -> "Compiled":
        """Compiles the call for the target, which need not be present.

        Raises:
          RuntimeError: a TPU is the target and libtpu is not installed.
        """
        if self._platform == "cuda":
            return Compiled(self, None)
        if self._platform == "cpu":
            return Compiled(self, self._jax_lowered().compile())
        compiled = compiling.compile_for(self.run, self.arguments, self.target)
        return Compiled(self, compiled)

    @property
    def _platform(self) -> str:
        return "cpu" if self.target == "cpu" else targets.find(self.target).platform

    def _jax_lowered(self) -> jax.stages.Lowered:
        if self.target == "cpu":
            return jax.jit(self.run).lower(*self.arguments)
        return compiling.lower_for(self.run, self.arguments, self.target)

    def __str__(self) -> str:
        q, k, v, _ = self.arguments
        shapes = ", ".join(
            f"{name} {x.dtype}{list(x.shape)}"
            for name, x in zip("qkv", (q, k, v), strict=True)
        )
        parts = [
            f"-- spec\n{self.options.term!r}\n{shapes}, target {self.target}",
            str(self.stages),
            f"-- plan\n{self.plan}",
            f"-- kernel\nimpl {self.options.setting.impl}, {_tiles_text(self.tiles)}",
            f"-- jaxpr\n{_head(self.jaxpr, 40)}",
        ]
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Compiled:
    """A compiled call: its code and the figures of the compiler.

    Attributes:
      lowered: the call.
      executable: the compiled program; None for GPUs, where only Triton IR is made.
    """

    lowered: Lowered
    executable: Any

    def asm(self) -> str:
        """The lowest-level code: optimised HLO (CPU, TPU) or Triton IR (GPU)."""
        if self.executable is None:
            return self.lowered.module
        return self.executable.as_text()

    def memory(self) -> dict[str, int]:
        """Bytes of arguments, outputs, temporaries and code; empty for GPUs."""
        if self.executable is None:
            return {}
        found = self.executable.memory_analysis()
        return {
            "arguments": found.argument_size_in_bytes,
            "outputs": found.output_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
        }

    def report(self) -> str:
        """The figures of the compiler, as aligned text."""
        rows = [("target", self.lowered.target)]
        rows += [(f"{name} (bytes)", f"{n:,}") for name, n in self.memory().items()]
        if self.executable is None:
            rows.append(("lowered to", "Triton IR; machine code needs CUDA's tools"))
        return "\n".join(f"{name:<22}{value}" for name, value in rows)


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
      q, k, v: arrays or ShapeDtypeStructs ``[batch, seq, heads, head_dim]``.
      target: "cpu", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x", "a100", "h100", "h200",
        "b200"; None is the default device.
      impl: the backend; that of the target's platform if None.
      operands: run-time arrays or their ShapeDtypeStructs; segment ids are among them,
        as "q_segment_ids" and "kv_segment_ids".
      sm_scale, q_offset, config: as in ``attention``.
      gradient: lower the gradients of ``sum(out)`` instead of ``(out, lse)``.

    Raises:
      ValueError: the target is unknown, the backend cannot run on it, or the arrays do
        not fit the spec.
      NotImplementedError: the spec is more than one softmax, or has ``scale=`` or
        ``values=``, which are applied before the kernel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sadsl as sa
      >>> x = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.bfloat16)
      >>> low = sa.lower(sa.causal() & sa.window(256), x, x, x, target="h100")
      >>> print(low.stages["simplify"])
      (k - q <= 0) & (q - k <= 256)
      >>> low.tiles.forward.block_q, low.plan.num_pairs
      (128, 230272)
    """
    target = target or _default_target()
    platform = "cpu" if target == "cpu" else _platform(target)
    problem = checks.problem(q, k, v, q_offset)
    setting = Setting(
        sm_scale=float(checks.scale(sm_scale, q.shape[-1])),
        q_offset=problem.q_offset,
        impl=_impl_for(impl or IMPL_OF_PLATFORM[platform], target, platform),
        config=config or KernelConfig(),
    )
    options = Options(check_kernel_term(as_term(spec), "lower"), problem, setting)
    fitted = _operand_shapes(options, operands or {}, q)
    arrays = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    return Lowered(options, target, (*arrays, fitted), gradient)


def _operand_shapes(
    options: Options, operands: Mapping[str, Any], q: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """The operands of a call as checked ShapeDtypeStructs with a batch axis.

    Raises:
      ValueError: an operand is missing, unknown, or has the wrong shape.
    """
    sink = {} if options.term.sink is None else {options.term.sink: 1}
    asked = options.asked | sink
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype if name in asked else jnp.int32)
        for name, x in operands.items()
    }
    ranks = operand_ranks(options, shapes) | sink
    fitted = {
        name: x
        if len(x.shape) > ranks[name]
        else jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        for name, x in shapes.items()
    }
    if sink:
        jax.eval_shape(lambda given: sinks_of(options.term, given, q), fitted)
    check_given({name: x for name, x in fitted.items() if name not in sink}, options)
    return fitted


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
    if target not in targets.TARGETS:
        known = ", ".join(("cpu", *targets.TARGETS))
        raise ValueError(f"target={target!r}: must be None or one of {known}")
    return targets.find(target).platform


def _default_target() -> str:
    """The target of the default device.

    Raises:
      ValueError: it is not a known chip.
    """
    if jax.default_backend() == "cpu":
        return "cpu"
    kind = jax.devices()[0].device_kind
    for name, target in targets.TARGETS.items():
        if target.device_kind == kind:
            return name
    raise ValueError(
        f"the default device is a {kind!r}, which is not a known target: pass target=, "
        f"one of {', '.join(targets.TARGETS)}"
    )


def _tiles_text(tiles: Tiles) -> str:
    names = {"forward": tiles.forward, "dq": tiles.dq, "dkv": tiles.dkv}
    return ", ".join(f"{n} {t.block_q} x {t.block_kv}" for n, t in names.items())


def _head(text: str, lines: int) -> str:
    found = text.splitlines()
    rest = len(found) - lines
    return "\n".join(found[:lines]) + (f"\n... ({rest} more lines)" if rest > 0 else "")
