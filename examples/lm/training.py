"""Trains one model: compiles a step, runs it, measures it, keeps checkpoints."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lm import data
from lm.checkpoints import History
from lm.finite import check_finite
from lm.mesh import ONE_DEVICE, Devices
from lm.model import LanguageModel, ModelConfig, Spec, bits_per_byte
from sadsl.layers.nnx import commitment_loss


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, batch size and learning rate.

    A step takes the ``accumulate`` parts of its batch one after the other, and needs
    the activations of one part at a time.
    """

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    seed: int
    valid_batches: int
    valid_every: int
    checkpoint_every: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "seq_len", "valid_batches")
        for name in (*counts, "valid_every", "checkpoint_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"--warmup_steps={self.warmup_steps} must be at least 0 and less than "
                f"--steps={self.steps}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate={self.accumulate} must divide --batch_size="
                f"{self.batch_size}: it is the number of equal parts of a batch"
            )
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be positive")
        if not math.isfinite(self.learning_rate):
            raise ValueError(f"--learning_rate={self.learning_rate} must be finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"--weight_decay={self.weight_decay} must be at least 0 and finite"
            )
        if self.seed < 0:
            raise ValueError(f"--seed={self.seed} must be at least 0")

    @property
    def tokens_per_step(self) -> int:
        """Bytes that a step learns to predict."""
        return self.batch_size * self.seq_len

    def schedule(self) -> optax.Schedule:
        """The learning rate by step: linear warm-up, then a cosine to a tenth."""
        return optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            self.warmup_steps,
            self.steps,
            self.learning_rate / 10,
        )

    def rates(self) -> np.ndarray:
        """The learning rates of all steps, ``[steps]``, float32."""
        return np.asarray(jax.vmap(self.schedule())(jnp.arange(self.steps)))

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind a clipped gradient."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(self.schedule(), b2=0.95, weight_decay=self.weight_decay),
        )


class State(NamedTuple):
    """Everything that a step changes."""

    params: Any
    optimizer: Any
    # Changed in a step without a gradient: centroids of routing layers, keys
    # and counters of dropout.
    others: Any


class Compiled(NamedTuple):
    """The compiled functions of a run, its first state, and the memory they need.

    Memory is that of one device. A step returns the new state and three numbers: the
    loss, the norm of the gradient, and the norm of the new parameters.
    """

    step: Callable[[State, Any], tuple[State, jax.Array]]
    valid: Callable[[Any, Any, Any], jax.Array]
    state: State
    num_params: int
    memory_bytes: int
    # Part of these bytes that is neither state nor batch.
    temp_bytes: int
    devices: Devices = ONE_DEVICE


@dataclass(frozen=True)
class Result:
    """A finished run, and its cost."""

    spec: str
    history: History
    num_params: int
    memory_bytes: int


def identity(
    spec: Spec,
    model: ModelConfig,
    config: TrainConfig,
    corpus: data.Corpus,
) -> dict[str, Any]:
    """Everything that the losses of a run depend on, by short names."""
    when = {"valid_every", "checkpoint_every"}
    settings = {name: x for name, x in asdict(config).items() if name not in when}
    size = len(corpus.train) + len(corpus.valid)
    read = {"data": f"{size:,} bytes of sha256 {corpus.fingerprint}"}
    return {"spec": repr(spec), **asdict(model), **settings, **read}


def first_state(
    spec: Spec,
    sizes: ModelConfig,
    config: TrainConfig,
    devices: Devices = ONE_DEVICE,
) -> tuple[nnx.GraphDef, State]:
    """The structure of the model, and its state before the first step.

    Weights depend on the seed alone; the structure is the same for every seed.
    """
    model = LanguageModel(sizes, spec, nnx.Rngs(config.seed), devices.axes)
    graph, params, others = nnx.split(model, nnx.Param, ...)
    return graph, State(params, config.optimizer().init(params), others)


def _parts(batch: jax.Array, config: TrainConfig, devices: Devices) -> jax.Array:
    """The batch as ``[accumulate, batch_size // accumulate, seq_len + 1]``."""
    parts = batch.reshape(config.accumulate, -1, batch.shape[-1])
    return devices.each_split(parts)


def accumulated(
    descend: Callable[[Any, Any, jax.Array], tuple[Any, tuple[jax.Array, Any]]],
    params: Any,
    others: Any,
    parts: jax.Array,
) -> tuple[Any, tuple[jax.Array, Any]]:
    """The mean gradient and the mean loss of parts that are run in turn.

    ``descend(params, others, part)`` returns ``gradient, (loss, others)``. Each part
    goes on with the ``others`` of the part before it: centroids move with each part.
    """
    if len(parts) == 1:
        return descend(params, others, parts[0])

    def add(total: Any, part: jax.Array) -> tuple[Any, None]:
        gradient, (loss, others) = total
        more, (cost, others) = descend(params, others, part)
        return (jax.tree.map(jnp.add, gradient, more), (loss + cost, others)), None

    start = jax.tree.map(jnp.zeros_like, params), (jnp.zeros(()), others)
    (gradient, (loss, others)), _ = jax.lax.scan(add, start, parts)
    mean = partial(jax.tree.map, lambda x: x / len(parts))
    return mean(gradient), (mean(loss), others)


def compile_run(
    spec: Spec,
    sizes: ModelConfig,
    config: TrainConfig,
    devices: Devices = ONE_DEVICE,
) -> Compiled:
    """Makes the model and compiles its steps, for use with every seed.

    On several devices, attention sends what its spec asks for, and XLA divides the rest
    of the program: losses and gradients are the same up to rounding.
    """
    graph, state = first_state(spec, sizes, config, devices)
    optimizer = config.optimizer()
    bits_of = partial(bits_per_byte, spread=devices.spread)

    def cost(params: Any, others: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        # A copy: routing layers write to their variables, at this level of the trace.
        model = nnx.merge(graph, params, others, copy=True)
        bits = bits_of(model, batch)
        _, _, moved = nnx.split(model, nnx.Param, ...)
        return bits + commitment_loss(model), (bits, moved)

    def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        descend = jax.grad(cost, has_aux=True)
        gradient, (bits, others) = accumulated(
            descend, state.params, state.others, _parts(batch, config, devices)
        )
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = optax.tree.norm(gradient), optax.tree.norm(params)
        numbers = jnp.stack([bits, *norms])
        return State(params, moments, others), numbers

    def valid(params: Any, others: Any, batch: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, others, copy=True)
        model.eval()  # centroids stay where they are, and nothing is dropped
        parts = _parts(batch, config, devices)
        if len(parts) == 1:
            return bits_of(model, parts[0])
        return jax.lax.map(partial(bits_of, model), parts).mean()

    state = devices.copied(state)
    batch = jax.ShapeDtypeStruct(
        (config.batch_size, config.seq_len + 1), np.uint8, sharding=devices.by_batch
    )
    jit = partial(jax.jit, out_shardings=devices.everywhere)
    compiled_step = jit(step, donate_argnums=0).lower(state, batch).compile()
    lowered_valid = jit(valid).lower(state.params, state.others, batch)
    memory = compiled_step.memory_analysis()
    return Compiled(
        compiled_step,
        lowered_valid.compile(),
        state,
        num_params=sum(x.size for x in jax.tree.leaves(state.params)),
        memory_bytes=memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        devices=devices,
    )


def train(
    compiled: Compiled,
    state: State | None,
    history: History,
    config: TrainConfig,
    corpus: data.Corpus,
    keep: Callable[[State, History], None],
    tell: Callable[[History], None],
    around: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Continues from ``state``, or from the first one if None, and adds to ``history``.

    It calls ``tell`` after each step, and ``keep`` after each step with a checkpoint.
    ``around(step)`` surrounds each step.

    Raises:
      NotFinite: a loss, or the norm of the gradient or of the new parameters, is not
        finite. ``keep`` does not get that state.
    """
    devices = compiled.devices
    state = compiled.state if state is None else devices.copied(state)
    for step in range(history.step, config.steps):
        batch = data.train_batch(
            corpus, seed=config.seed, step=step,
            batch_size=config.batch_size, seq_len=config.seq_len,
        )  # fmt: skip
        done = step + 1
        with around(done):
            start = time.perf_counter()
            state, numbers = compiled.step(state, devices.split(batch))
            bits, norm, size = np.asarray(numbers).tolist()
            seconds = time.perf_counter() - start
        check_finite(done, "the loss", bits)
        check_finite(done, "the gradient norm", norm)
        check_finite(done, "the parameter norm", size)
        history.train.append(bits)
        history.grad_norm.append(norm)
        history.seconds.append(seconds)
        if done % config.valid_every == 0 or done == config.steps:
            bits = validate(compiled, state, config, corpus)
            check_finite(done, "the validation loss", bits)
            history.valid.append([done, bits])
        if done % config.checkpoint_every == 0 or done == config.steps:
            keep(state, history)
        tell(history)


def validate(
    compiled: Compiled, state: State, config: TrainConfig, corpus: data.Corpus
) -> float:
    """Mean bits per byte over the windows of the validation part."""
    batches = data.valid_batches(
        corpus, num_batches=config.valid_batches,
        batch_size=config.batch_size, seq_len=config.seq_len,
    )  # fmt: skip
    model = state.params, state.others
    split = compiled.devices.split
    bits = [np.asarray(compiled.valid(*model, split(batch))) for batch in batches]
    return float(np.mean(bits))
