"""The TPU that code is traced for, and its sizes."""

import jax

# The bytes of vector memory of a core, by device kind.
_MIB = 1 << 20
VMEM_BYTES = {
    "TPU v4": 16 * _MIB,
    "TPU v5 lite": 128 * _MIB,
    "TPU v5e": 128 * _MIB,
    "TPU v5": 64 * _MIB,
    "TPU v5p": 64 * _MIB,
    "TPU v6 lite": 128 * _MIB,
    "TPU v6e": 128 * _MIB,
    "TPU7x": 64 * _MIB,
}


def device_kind() -> str | None:
    """The kind of the TPU that code is traced for; None if it is not known.

    It is that of the abstract mesh that is set (``sa.lower`` sets one), or that of the
    default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    if jax.default_backend() == "tpu":
        return jax.devices()[0].device_kind
    return None


def vmem_bytes() -> int:
    """The bytes of vector memory of the chip; the least of all if it is not known."""
    return VMEM_BYTES.get(device_kind() or "", min(VMEM_BYTES.values()))


def vmem_limit_bytes() -> int | None:
    """What a kernel may use: half of the vector memory, if that is more than usual.

    The compiler allows 16 or 32 MiB by default.
    """
    half = VMEM_BYTES.get(device_kind() or "", 0) // 2
    return half if half >= 32 * _MIB else None
