"""The process that compiles for a chip which is not there.

``python -m lowering.targets.child FOLDER`` reads ``request.json`` and ``program`` in
the folder, and writes ``result.json`` and ``program.hlo``, or ``error.txt``. Compilers
read their flags once in a process, so each program has a process of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from lowering.targets.chips import find, gpu_config
from lowering.targets.clients import compile_bytes
from lowering.targets.compiling import tpu_device


def device_of(target: str) -> Any:
    """A device of a chip that is not there."""
    chip = find(target)
    if chip.platform == "tpu":
        return tpu_device(target)
    one = {"topology_name": "1x1x1", "topology": "1x1x1"}
    config = {"target_config": gpu_config(chip)}
    return topologies.get_topology_desc(platform="cuda", **one, **config).devices[0]


def main(folder: Path) -> None:
    """Compiles the program in a folder."""
    request = json.loads((folder / "request.json").read_text())
    try:
        program = (folder / "program").read_bytes()
        made = compile_bytes(program, device_of(request["target"]))
    except Exception as error:
        (folder / "error.txt").write_text(str(error))
        raise
    (folder / "program.hlo").write_text(made.hlo)
    (folder / "result.json").write_text(json.dumps(made.memory))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
