"""``SoftmaxPart``: one softmax of a lowered call, with its stages and plans."""

from dataclasses import dataclass
from functools import cached_property

from lowering import pipeline
from lowering.facts.plan_counts import Plan
from lowering.targets.compiling import traced_for
from pallas_kernels.call import Masks
from pallas_kernels.config import Tiles
from sadsl.run.kernels import choose_tiles
from sadsl.run.options import Options
from sadsl.run.plans import plan_of


@dataclass(frozen=True)
class SoftmaxPart:
    """One softmax over the pairs of a map in a lowered call; ``print`` shows its plan.

    Attributes:
      options: the static part of the softmax call.
      target: the name of the chip, or "cpu".
      arguments: q, k and v as its kernels get them, as ShapeDtypeStructs.
    """

    options: Options
    target: str
    arguments: tuple

    @property
    def stages(self) -> pipeline.Stages:
        """The stages of the map, one after each pass."""
        return self.options.arranged(self.tiles)

    @cached_property
    def tiles(self) -> Tiles:
        """The block sizes of the forward, dq and dkv kernels."""
        q, _, v = self.arguments
        # Defaults depend on the chip.
        with traced_for(self.target):
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

    @property
    def tile_flops(self) -> dict[str, float]:
        """FLOPs of the products of one tile, by the name of the kernel.

        In units of 16-bit products: on a TPU a product of float32 is six of them.
        """
        q, _, v = self.arguments
        d, dv = q.shape[-1], v.shape[-1]
        passes = 2 * (6 if q.dtype.itemsize == 4 else 1)
        each = self.tiles.forward, self.tiles.dq, self.tiles.dkv
        forward, dq, dkv = (passes * t.block_q * t.block_kv for t in each)
        return {
            "forward": forward * (d + dv),
            "dq": dq * (2 * d + dv),
            "dkv": dkv * 2 * (d + dv),
            # One kernel for dq, dk and dv.
            "backward": dkv * (3 * d + 2 * dv),
        }

    def __str__(self) -> str:
        shapes = shapes_text(self.arguments)
        return "\n\n".join(
            [
                f"-- spec\n{self.options.term!r}\n{shapes}, target {self.target}",
                str(self.stages),
                f"-- plan\n{self.plan}",
                f"-- kernel\nimpl {self.options.setting.impl}, "
                f"{_tiles_text(self.tiles, self.options.setting.impl)}",
            ]
        )


def shapes_text(arguments: tuple) -> str:
    """The dtypes and shapes of q, k and v."""
    named = zip("qkv", arguments[:3], strict=True)
    return ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in named)


def _tiles_text(tiles: Tiles, impl: str | None) -> str:
    names = {"forward": tiles.forward, "dq": tiles.dq, "dkv": tiles.dkv}
    if impl == "tpu":
        names = {"forward": tiles.forward, "backward": tiles.dkv}
    return ", ".join(f"{n} {t.block_q} x {t.block_kv}" for n, t in names.items())
