"""``check_agreement``: processes of one computation compare specs before they start.

Under ``jax.distributed`` every process runs the same program. Processes that mean
different specs compile different programs. These wait for each other for ever or,
worse, exchange numbers that do not belong together.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sadsl.terms.base import Spec
from sadsl.text.specs import any_term

# As ``object.__repr__`` writes it: another number in each process.
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Of longer texts as many characters are shown.
MOST_SHOWN = 300


def check_agreement(
    spec: Spec | str | None, options: Mapping[str, Any] | None = None
) -> str:
    """Makes sure that all processes have the same spec and options.

    Every process calls it with its own, after ``jax.distributed.initialize``, and
    before the first call that the others take part in. Hashes are compared over all
    devices, and only if they differ the texts. With one process there is nothing to
    compare.

    Args:
      spec: a map, a term, or text; None if there are only options.
      options: what else must agree, such as sizes, a seed or a mesh: values with a
        ``repr`` that is the same in each process, and arrays, by name.

    Returns:
      The SHA-256 of spec and options, hexadecimal: equal for equal ones.

    Raises:
      ValueError: in every process, if processes differ: the message says which process
        has which value. In this process, if a text holds the address of an object.
      TypeError: ``spec`` is no spec.

    Example:
      >>> import sadsl as sa
      >>> mine = sa.check_agreement(sa.causal() & sa.window(8), {"seed": 0})
      >>> mine == sa.check_agreement("causal() & window(8)", {"seed": 0})
      True
    """
    said = {} if spec is None else {"spec": _text("spec", any_term(spec))}
    for name, value in (options or {}).items():
        if name in said:
            raise ValueError(
                f"options={name!r} is the name of the spec itself: give it another one"
            )
        said[name] = _text(name, value)
    record = json.dumps(said, sort_keys=True).encode()
    digest = hashlib.sha256(record).digest()
    if jax.process_count() > 1:
        hashes = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
        if (hashes != hashes[0]).any():
            raise ValueError(disagreement(_records(record)))
    return digest.hex()


def _text(name: str, value: Any) -> str:
    """What a value is, in a text that is the same in each process."""
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        content = hashlib.sha256(array.tobytes()).hexdigest()
        return f"{array.dtype}{list(array.shape)} of sha256 {content}"
    text = repr(value)
    if ADDRESS.search(text):
        raise ValueError(
            f"{name}={text} holds the address of an object, which differs from "
            "process to process: give its class a __repr__, or leave it out"
        )
    return text


def _records(record: bytes) -> list[dict[str, str]]:
    """The spec and options of each process, as texts by name."""
    sizes = multihost_utils.process_allgather(np.int32(len(record)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(record)] = np.frombuffer(record, np.uint8)
    found = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[:size]))
        for row, size in zip(found, sizes.tolist(), strict=True)
    ]


def disagreement(records: Sequence[Mapping[str, str]]) -> str:
    """Says which names have different values, and which process has which value."""
    lines = []
    for name in sorted({name for record in records for name in record}):
        ranks: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            ranks.setdefault(record.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            shown = zip(_shown([*ranks]), ranks.values(), strict=True)
            values = "; ".join(f"{value} in {_processes(of)}" for value, of in shown)
            lines.append(f"  {name}: {values}")
    return (
        "the processes of this computation disagree:\n"
        + "\n".join(lines)
        + "\nstart every process with the same spec and the same options"
    )


def _shown(values: Sequence[str]) -> list[str]:
    """The values, of long ones the part where they begin to differ."""
    if max(map(len, values)) <= MOST_SHOWN:
        return [*values]
    # Values are different, so columns of equal characters come to an end.
    columns = zip_longest(*values)
    equal = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    start = max(0, equal - MOST_SHOWN // 3)
    parts = [value[start : start + MOST_SHOWN] for value in values]
    return [
        ("... " if start else "")
        + part
        + (" ..." if start + len(part) < len(value) else "")
        for part, value in zip(parts, values, strict=True)
    ]


def _processes(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
