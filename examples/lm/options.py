"""The flags of ``train_lm.py`` that spell sizes, training and devices."""

import jax
from absl import flags

from lm import processes
from lm.mesh import BATCH, DATA_PARALLEL, ONE_DEVICE, Devices, devices_for, fitted
from lm.model import DTYPES, ModelConfig
from lm.training import TrainConfig

_SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "Bytes of context.")
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "Sequences in a step; None: 1, or 1 for each shard of a batch."
)
_STEPS = flags.DEFINE_integer("steps", 260, "Steps.")
_LAYERS = flags.DEFINE_integer("num_layers", 2, "Layers.")
_HEADS = flags.DEFINE_integer("num_heads", 8, "Heads of the queries.")
_KV_HEADS = flags.DEFINE_integer("num_kv_heads", None, "Of keys; None: num_heads.")
_WIDTH = flags.DEFINE_integer("d_model", 128, "Features of a position.")
_HIDDEN = flags.DEFINE_integer("d_hidden", None, "Of the MLP; None: 4 * d_model.")
_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak of the schedule.")
_WARMUP = flags.DEFINE_integer("warmup_steps", None, "None: a tenth of the steps.")
_DECAY = flags.DEFINE_float("weight_decay", 0.1, "Of AdamW.")
_CLIP = flags.DEFINE_float("clip_norm", 1.0, "Largest norm of a gradient.")
_ACCUMULATE = flags.DEFINE_integer(
    "accumulate", 1, "Parts of a batch that run in turn, to need less memory."
)
_DROPOUT = flags.DEFINE_float("dropout_rate", 0.0, "Of the attention weights.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", DTYPES, "Of activations; the rest is float32."
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides on weights, batches, dropout.")
_VALID = flags.DEFINE_integer("valid_every", 26, "Steps between validations.")
_VALID_BATCHES = flags.DEFINE_integer("valid_batches", 8, "Batches of a validation.")
_KEEP = flags.DEFINE_integer("checkpoint_every", 26, "Steps between checkpoints.")
_MESH = flags.DEFINE_string(
    "mesh", None,
    "Devices by axis, such as batch=2,sequence=4; -1 is what is left. None: one "
    "device, or batch=-1 with several processes.",
)  # fmt: skip
_DEVICES = flags.DEFINE_integer(
    "devices", None, "Virtual CPU devices of this process, to try out a mesh.",
    lower_bound=1,
)  # fmt: skip


def start() -> None:
    """Makes the devices that ``--devices`` asks for, and joins other processes.

    It comes before anything that asks jax for its devices.
    """
    if _DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    processes.join()


def mesh_text() -> str | None:
    """What ``--mesh`` says; several processes always share the work."""
    several = jax.process_count() > 1
    return DATA_PARALLEL if _MESH.value is None and several else _MESH.value


def batch_size() -> int:
    """What ``--batch_size`` says, or the smallest that the mesh can share."""
    if _BATCH.value is not None:
        return _BATCH.value
    text = mesh_text()
    return _ACCUMULATE.value * (fitted(text, jax.device_count())[BATCH] if text else 1)


def settings() -> tuple[ModelConfig, TrainConfig]:
    """The sizes that the flags spell.

    Raises:
      ValueError: they do not fit each other, or the mesh does not fit the devices.
    """
    model = ModelConfig(
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
        num_kv_heads=_HEADS.value if _KV_HEADS.value is None else _KV_HEADS.value,
        d_model=_WIDTH.value,
        d_hidden=4 * _WIDTH.value if _HIDDEN.value is None else _HIDDEN.value,
        dropout_rate=_DROPOUT.value,
        dtype=_DTYPE.value,
    )
    warmup = _STEPS.value // 10 if _WARMUP.value is None else _WARMUP.value
    config = TrainConfig(
        steps=_STEPS.value,
        batch_size=batch_size(),
        seq_len=_SEQ_LEN.value,
        learning_rate=_RATE.value,
        warmup_steps=warmup,
        weight_decay=_DECAY.value,
        clip_norm=_CLIP.value,
        seed=_SEED.value,
        valid_batches=_VALID_BATCHES.value,
        valid_every=_VALID.value,
        checkpoint_every=_KEEP.value,
        accumulate=_ACCUMULATE.value,
    )
    return model, config


def devices_of(config: TrainConfig) -> Devices:
    """The devices that ``--mesh`` asks for.

    Raises:
      ValueError: the mesh does not fit the devices or the sizes.
    """
    text = mesh_text()
    if text is None:
        return ONE_DEVICE
    return devices_for(text, config.batch_size, config.accumulate, config.seq_len)
