"""The kinds of attention that are compared, in models of one size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import sadsl as sa
from lm.comparison import check_equal_params
from lm.model import ROUTING, ModelConfig, Spec, count_params, matched, routing_for
from lm.training import TrainConfig
from sadsl import catalog
from sadsl.layers.routing import Routing


class Case(NamedTuple):
    """A kind of attention: its name, and code that makes its spec.

    ``chooses_ahead``: the published kind chooses keys by the whole text.
    """

    name: str
    code: str
    # None: ``code`` is a text for ``parse``, or the name of a layer.
    spec: Spec | None = None
    chooses_ahead: bool = False

    def made(self, seq_len: int) -> Spec:
        """The spec."""
        if self.spec is not None:
            return self.spec
        return routing_for(seq_len) if self.code == ROUTING else sa.parse(self.code)


PAST_BLOCKS = (
    "topk(2, block=64, block_q=1, eligible=where(lambda q, k: k // 64 < q // 64))"
)
CASES = (
    Case("dense", "causal()"),
    Case("window", "causal() & window(128)"),
    Case("dilated", "dilated(127, 0, 4)"),
    Case(
        "PowerAttention",
        "catalog.power_attention(32, local=4)",
        catalog.power_attention(32, local=4),
    ),
    Case("routing", ROUTING, chooses_ahead=True),
    Case("top-k blocks", f"causal() & (window(128) | {PAST_BLOCKS})"),
    Case("Combiner", "catalog.combiner_fixed(32)", catalog.combiner_fixed(32)),
    Case("linear", 'linear("elu1")'),
    Case("linear + window", 'gated(causal() & window(128), linear("elu1"))'),
    Case("delta", "delta()"),
    Case("gated delta", 'delta(decay="g")'),
)
NAMES = [case.name for case in CASES]


@dataclass(frozen=True)
class Preset:
    """Sizes of a comparison."""

    model: ModelConfig
    train: TrainConfig
    seeds: int


DEFAULT = Preset(
    ModelConfig(num_layers=2, num_heads=4, num_kv_heads=4, d_model=128, d_hidden=512),
    TrainConfig(
        steps=150, batch_size=2, seq_len=1024, learning_rate=4e-3, warmup_steps=15,
        weight_decay=0.1, clip_norm=1.0, seed=0, valid_batches=16, valid_every=50,
        checkpoint_every=150,
    ),
    seeds=3,
)  # fmt: skip
QUICK = Preset(
    ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2, d_model=64, d_hidden=96),
    replace(
        DEFAULT.train, steps=4, seq_len=64, warmup_steps=1, valid_batches=2,
        valid_every=2,
    ),
    seeds=2,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A kind of attention, and sizes at which its model is as large as any."""

    case: Case
    spec: Spec
    model: ModelConfig

    @property
    def code(self) -> str:
        """Code that makes the spec, without defaults."""
        if not isinstance(self.spec, Routing):
            return self.case.code
        sizes = f"{self.spec.num_clusters}, {self.spec.window}"
        return f"RoutingAttention: Routing(num_clusters, window = {sizes})"

    @property
    def name(self) -> str:
        """The name of the kind."""
        return self.case.name

    @property
    def file(self) -> str:
        """The name, usable as a file name."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower())


def entries(sizes: Preset, wanted: Sequence[str]) -> list[Entry]:
    """The kinds to compare, with models of one size.

    Raises:
      ValueError: the sizes differ all the same.
    """
    found = []
    params: dict[str, int] = {}
    for case in CASES:
        if case.name not in wanted:
            continue
        spec = case.made(sizes.train.seq_len)
        base = next(iter(params.values()), None)
        model = sizes.model if base is None else matched(sizes.model, spec, base)
        params[case.name] = count_params(model, spec)
        found.append(Entry(case, spec, model))
    check_equal_params(params)
    return found
