"""Checkpoints of one run: written atomically, checked when read."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

State = TypeVar("State")


@dataclass
class History:
    """The record of a run so far; kept with its checkpoints, so that curves are whole.

    ``train`` and ``seconds`` have one entry for each step, ``valid`` has ``[step,
    bits]``.
    """

    train: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    valid: list[list[float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self.train)


class Checkpoints:
    """The checkpoints in ``folder`` of a run that ``identity`` describes.

    ``identity`` holds, under short names, everything that the losses depend on. Use it
    as a context manager.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder.resolve()
        self.identity = {name: str(value) for name, value in identity.items()}
        # Written before save() returns: a kill at any moment leaves the last one whole,
        # and a folder half written has another name, and is swept up here.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.manager.close()

    def save(self, state: Any, history: History) -> None:
        """Keeps the state after ``history.step`` steps, unless that is kept already."""
        if self.manager.latest_step() == history.step:
            return
        arrays = _named_arrays(state)
        run = {
            "identity": self.identity,
            "history": asdict(history),
            "digest": _digest(arrays),
        }
        self.manager.save(
            history.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave(run)
            ),
        )

    def check(self) -> None:
        """Makes sure that the newest checkpoint, if any, is of this run.

        Raises:
          ValueError: its record is damaged, or of another run.
        """
        step = self.manager.latest_step()
        if step is not None:
            self._record(step)

    def restore(self, like: State) -> tuple[State, History] | None:
        """The newest state, in the form of ``like``, and its history; None if none.

        Raises:
          ValueError: it is damaged, or it is of another run.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        history, digest = self._record(step)
        wanted = {
            name: np.zeros(x.shape, x.dtype) for name, x in _named_arrays(like).items()
        }
        arrays = self._read(step, "state", ocp.args.StandardRestore(wanted))
        if history.step != step or _digest(arrays) != digest:
            self._damaged(step, "its contents are not those that were written")
        treedef = jax.tree.structure(like)
        return jax.tree.unflatten(treedef, [arrays[name] for name in wanted]), history

    def _record(self, step: int) -> tuple[History, str]:
        run = self._read(step, "run", ocp.args.JsonRestore())
        try:
            identity, digest = dict(run["identity"]), str(run["digest"])
            history = History(**run["history"])
        except (KeyError, TypeError, ValueError) as error:
            self._damaged(
                step, f"its record lacks what it should hold: {error!r}", error
            )
        self._check_identity(identity)
        return history, digest

    def _read(self, step: int, name: str, args: Any) -> Any:
        try:
            found = self.manager.restore(step, args=ocp.args.Composite(**{name: args}))
        # Any error of the reader means that a file is not as it was written.
        except Exception as error:
            self._damaged(step, f"{type(error).__name__}: {error}", error)
        return found[name]

    def _check_identity(self, identity: dict[str, str]) -> None:
        mine = self.identity
        differing = [
            f"  {name}: {identity.get(name)} there, {mine.get(name)} here"
            for name in sorted({*identity, *mine})
            if identity.get(name) != mine.get(name)
        ]
        if differing:
            raise ValueError(
                f"the checkpoints in {self.folder} are of another run:\n"
                + "\n".join(differing)
                + "\nsay the same to go on with it, name another --out, or pass "
                "--fresh to delete them and start over"
            )

    def _damaged(
        self, step: int, what: str, cause: Exception | None = None
    ) -> NoReturn:
        raise ValueError(
            f"the checkpoint in {self.folder / str(step)} is damaged ({what[:300]}): "
            "delete that folder to go back to the one before it, or pass --fresh to "
            "start over"
        ) from cause


def forget(folder: Path) -> None:
    """Deletes the checkpoints of a run."""
    if folder.exists():
        shutil.rmtree(folder)


def _named_arrays(state: Any) -> dict[str, np.ndarray]:
    """The leaves by their path, so that a checkpoint explains itself."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
