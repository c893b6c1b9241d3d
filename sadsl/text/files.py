"""Saves specs as JSON files and plans as compressed NumPy archives, and loads them.

A file holds the version of its format and a hash of its content. Loading never runs
code from a file: specs are read by ``parse``, arrays without pickle.
"""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

from lowering import ir
from lowering.facts.plan_counts import Plan
from lowering.order.candidates import Layouts
from lowering.order.layout import Axis, Layout
from pallas_kernels.block_mask import BlockMask, check
from sadsl.terms.base import Spec
from sadsl.text.parsing import parse

# Increase a version whenever an older reader would misunderstand a file.
SPEC_FORMAT = 1
PLAN_FORMAT = 2

# The classes that occur in the fields of a plan, by name.
KINDS = {
    kind.__name__: kind
    for kind in (*get_args(ir.Expr), *get_args(ir.Pred), Axis, Layout, Layouts)
}
# The arrays of a plan. Only plans made at run time have ``test_of_map``.
ARRAYS = tuple(
    f.name
    for f in fields(BlockMask)
    if not f.metadata.get("static") and f.name != "test_of_map"
)
STATICS = tuple(f.name for f in fields(BlockMask) if f.metadata.get("static"))

# The errors of the readers for a file that is not an archive or is damaged. They raise
# RuntimeError if a flag says that it is encrypted or compressed in another way.
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, OSError,
    RuntimeError,
)  # fmt: skip


def to_json(spec: Spec | str) -> str:
    """The JSON text of a spec; ``from_json`` reads it back.

    Raises:
      ValueError: the spec holds a map of a class of the caller's, which has no text.

    Example:
      >>> import sadsl as sa
      >>> from_json(to_json(sa.causal() & sa.window(4)))
      causal() & window(4)
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    text = repr(spec)
    if not _is_text_of(text, spec):
        raise ValueError(
            f"spec={text} is not what parse reads from that text: only maps of this "
            "library have a text, so write a map of your own as where(lambda q, k: ...)"
        )
    content = {
        "format": SPEC_FORMAT,
        "sadsl": version("sadsl"),
        "spec": text,
        "sha256": _sha256(text.encode()),
    }
    return json.dumps(content, indent=2) + "\n"


def _is_text_of(text: str, spec: Spec) -> bool:
    try:
        return parse(text) == spec
    except ValueError:
        return False


def from_json(text: str, where: str = "the text") -> Spec:
    """The spec of a JSON text that ``to_json`` wrote; errors call the text ``where``.

    Raises:
      ValueError: the text is something else, of another format, or was changed.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        _not_ours(where, "a spec", "save", f"it is not JSON ({error})", error)
    _check_fields(content, where, "a spec", "save", {"spec": str, "sha256": str})
    _check_format(content["format"], SPEC_FORMAT, where, "save")
    _check_hash(_sha256(content["spec"].encode()), content["sha256"], where)
    return parse(content["spec"])


def save(spec: Spec | str, path: str | PathLike) -> None:
    """Writes a spec to a file, as JSON that people can read.

    Args:
      spec: a map, a term, or the text of one.
      path: the file, which is overwritten.

    Raises:
      ValueError: the spec holds a map of a class of the caller's, which has no text.

    Example:
      >>> import sadsl as sa, tempfile, pathlib
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "spec.json"
      ...     sa.save(sa.causal() & sa.window(512), path)
      ...     sa.load(path)
      causal() & window(512)
    """
    Path(path).write_text(to_json(spec), encoding="utf-8")


def load(path: str | PathLike) -> Spec:
    """The spec that ``save`` wrote to a file; see there for an example.

    Raises:
      ValueError: the file is something else, of another format, or was changed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        _not_ours(f"{str(path)!r}", "a spec", "save", str(error), error)
    return from_json(text, f"{str(path)!r}")


def save_plan(plan: Plan, path: str | PathLike) -> None:
    """Writes a plan to a file: its runs, its sizes and its maps, compressed.

    Args:
      plan: the result of ``sadsl.plan``.
      path: the file, which is overwritten.

    Example:
      >>> import sadsl as sa, tempfile, pathlib
      >>> plan = sa.plan(sa.causal(), 64, block_q=16, block_kv=16)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "causal.npz"
      ...     sa.save_plan(plan, path)
      ...     sa.load_plan(path).num_full == plan.num_full
      True
    """
    meta = json.dumps(plan_meta(plan), separators=(",", ":")).encode()
    arrays = {name: np.asarray(getattr(plan.mask, name)) for name in ARRAYS}
    digest = _plan_hash(meta, arrays).encode()
    held: dict[str, Any] = {"meta": np.frombuffer(meta, np.uint8)}
    held |= {"sha256": np.frombuffer(digest, np.uint8), **arrays}
    found = io.BytesIO()
    np.savez_compressed(found, **held)
    Path(path).write_bytes(found.getvalue())


def load_plan(path: str | PathLike) -> Plan:
    """The plan that ``save_plan`` wrote to a file; see there for an example.

    Raises:
      ValueError: the file is something else, of another format, or was changed.
    """
    where, kind = f"{str(path)!r}", ("a plan", "save_plan")
    held = _archive(Path(path).read_bytes(), where)
    missing = [x for x in ("meta", "sha256", *ARRAYS) if x not in held]
    if missing:
        _not_ours(where, *kind, f"it lacks {', '.join(missing)}")
    text = {name: held[name].tobytes() for name in ("meta", "sha256")}
    arrays = {name: held[name] for name in ARRAYS}
    try:
        meta = json.loads(text["meta"])
    except (ValueError, RecursionError) as error:
        _not_ours(where, *kind, f"its sizes are not JSON ({error})", error)
    _check_fields(meta, where, *kind, {"num_heads": int, "mask": dict, "maps": list})
    # The format comes first, since the way to hash depends on it.
    _check_format(meta["format"], PLAN_FORMAT, where, "save_plan")
    actual = _plan_hash(text["meta"], arrays)
    _check_hash(actual, text["sha256"].decode("ascii", "replace"), where)
    try:
        return plan_from_meta(meta, arrays)
    except (KeyError, TypeError, ValueError) as error:
        _not_ours(where, *kind, f"its fields do not make a plan ({error})", error)


def plan_meta(plan: Plan) -> dict[str, Any]:
    """All of a plan except its arrays, as values for JSON."""
    return {
        "format": PLAN_FORMAT,
        "sadsl": version("sadsl"),
        "num_heads": plan.num_heads,
        "mask": {name: getattr(plan.mask, name) for name in STATICS},
        "maps": _encoded(plan.maps),
        "layouts": _encoded(plan.layouts),
        "given": _encoded(plan.given),
        "given_maps": _encoded(plan.given_maps),
    }


def plan_from_meta(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Plan:
    """The plan of what ``plan_meta`` returned and the arrays of its runs."""
    held: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
    held |= {name: meta["mask"][name] for name in STATICS}
    mask = BlockMask(**held)
    check(mask)
    names = ("layouts", "given", "given_maps")
    orders = {name: _decoded(meta[name]) for name in names}
    return Plan(_decoded(meta["maps"]), mask, meta["num_heads"], **orders)


def _encoded(value: Any) -> Any:
    """Encodes a node as ``[class name, field, ...]``, and a tuple as a list.

    The text of a map would not do: ``parse`` reads what a user may write, and the maps
    of a plan have been lowered since (an operand may be read at ``q - 3``).
    """
    if is_dataclass(value):
        held = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, tuple):
        held = list(value)
    else:
        return value
    named = [type(value).__name__] if type(value).__name__ in KINDS else []
    return [*named, *map(_encoded, held)]


def _decoded(value: Any) -> Any:
    """The inverse of ``_encoded``."""
    match value:
        case [str(kind), *held]:
            return KINDS[kind](*(_decoded(item) for item in held))
        case list():
            return tuple(_decoded(item) for item in value)
    return value


def _archive(data: bytes, where: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            torn = archive.testzip()
        if torn is not None:
            raise zipfile.BadZipFile(f"its part {torn!r} is damaged")
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return {name: np.asarray(found[name]) for name in found.files}
    except UNREADABLE as error:
        _not_ours(where, "a plan", "save_plan", str(error) or "it is torn", error)


def _sha256(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _plan_hash(meta: bytes, arrays: Mapping[str, np.ndarray]) -> str:
    # Names, dtypes and shapes separate the bytes of one array from those of the next.
    parts = [meta]
    for name in ARRAYS:
        x = arrays[name]
        parts += [f"{name} {x.dtype.str} {x.shape}".encode(), x.tobytes()]
    return _sha256(*parts)


def _check_fields(
    content: Any, where: str, what: str, writer: str, kinds: Mapping[str, type]
) -> None:
    if not isinstance(content, dict):
        _not_ours(where, what, writer, "it holds no named fields")
    for name, kind in {"format": int, **kinds}.items():
        if not isinstance(content.get(name), kind):
            found = f"{name}={content[name]!r}" if name in content else f"no {name!r}"
            _not_ours(where, what, writer, f"it has {found}")


def _check_format(found: int, known: int, where: str, writer: str) -> None:
    if found != known:
        raise ValueError(
            f"{where} has format {found}, and sadsl {version('sadsl')} reads format "
            f"{known}: read it with the version that wrote it, or write it again by "
            f"{writer}"
        )


def _check_hash(actual: str, stored: str, where: str) -> None:
    if actual != stored:
        raise ValueError(
            f"{where} has been changed or damaged: the sha256 of its content is "
            f"{actual[:12]}…, but it should be {stored[:12]}…: restore the file, or "
            "write it again"
        )


def _not_ours(
    where: str, what: str, writer: str, why: str, cause: Exception | None = None
) -> NoReturn:
    raise ValueError(
        f"{where} does not hold {what} as {writer} writes it: {why}"
    ) from cause
