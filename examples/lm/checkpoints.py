"""Checkpoints of one run: written atomically, checked when read.

``load_model`` reads a trained model back.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lm.finite import check_finite
from lm.model import LanguageModel, ModelConfig, Spec, spec_of

State = TypeVar("State")


@dataclass
class History:
    """The record of a run so far; kept with its checkpoints, so that curves are whole.

    ``train``, ``seconds`` and ``grad_norm`` have one entry for each step, ``valid`` has
    ``[step, bits]``.
    """

    train: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    valid: list[list[float]] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self.train)


class ModelState(NamedTuple):
    """The parts of ``lm.training.State`` that a model holds, by the same names."""

    params: Any
    others: Any


class Record(NamedTuple):
    """What a checkpoint holds beside its arrays."""

    identity: dict[str, str]
    history: History
    digest: str


class Checkpoints:
    """The checkpoints in ``folder`` of a run that ``identity`` describes.

    ``identity`` holds, under short names, everything that the losses depend on. None
    stands for any run, whose checkpoints can be read and not written. Use it as a
    context manager.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None) -> None:
        self.folder = folder.resolve()
        if identity is None:
            self.identity = None
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            self.identity = {name: str(value) for name, value in identity.items()}
            # Written before save() returns: a kill at any moment leaves the last one
            # whole, and a folder half written has another name, and is swept up here.
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

    @property
    def newest(self) -> Path | None:
        """The folder of the newest checkpoint; None if none."""
        step = self.manager.latest_step()
        return None if step is None else self.folder / str(step)

    def save(self, state: Any, history: History) -> None:
        """Keeps the state after ``history.step`` steps, unless that is kept already.

        Raises:
          NotFinite: an array of the state holds an infinite number or NaN.
        """
        if self.manager.latest_step() == history.step:
            return
        arrays = _named_arrays(state)
        for name, x in arrays.items():
            check_finite(history.step, f"the state {name}", x)
        run = {
            "identity": self.identity,
            "history": asdict(history),
            "digest": _digest(arrays),
        }
        self.manager.save(
            history.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named_numbers(state)),
                run=ocp.args.JsonSave(run),
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
        record = self._record(step)
        arrays = self._arrays(step, record, _named_numbers(like))
        return _filled(like, arrays), record.history

    def read(self) -> tuple[dict[str, str], dict[str, np.ndarray]] | None:
        """The identity and the arrays, by name, of the newest checkpoint; None if none.

        Raises:
          ValueError: it is damaged, or it is of another run.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        record = self._record(step)
        try:
            kept = self.manager.item_metadata(step)["state"]
        except Exception as error:
            self._damaged(step, f"{type(error).__name__}: {error}", error)
        if kept is None:
            self._damaged(step, "nothing says which arrays it holds")
        return record.identity, self._arrays(step, record, kept)

    def _record(self, step: int) -> Record:
        run = self._read(step, "run", ocp.args.JsonRestore())
        try:
            record = Record(
                dict(run["identity"]), History(**run["history"]), str(run["digest"])
            )
        except (KeyError, TypeError, ValueError) as error:
            self._damaged(
                step, f"its record lacks what it should hold: {error!r}", error
            )
        self._check_identity(record.identity)
        return record

    def _arrays(
        self, step: int, record: Record, like: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """The arrays of the shapes and dtypes of ``like``, read by this process.

        The devices that wrote them need not be there.
        """
        wanted = {name: np.zeros(x.shape, x.dtype) for name, x in like.items()}
        found = self._read(step, "state", ocp.args.StandardRestore(wanted))
        arrays = {name: np.asarray(x) for name, x in found.items()}
        if record.history.step != step or _digest(arrays) != record.digest:
            self._damaged(step, "its contents are not those that were written")
        return arrays

    def _read(self, step: int, name: str, args: Any) -> Any:
        try:
            found = self.manager.restore(step, args=ocp.args.Composite(**{name: args}))
        # Any error of the reader means that a file is not as it was written.
        except Exception as error:
            self._damaged(step, f"{type(error).__name__}: {error}", error)
        return found[name]

    def _check_identity(self, identity: dict[str, str]) -> None:
        mine = identity if self.identity is None else self.identity
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


def load_model(folder: Path) -> tuple[Spec, ModelConfig, nnx.State]:
    """Reads the model of the newest checkpoint in the folder of a run.

    The folder is, for example, ``out/checkpoints/sparse``. Nothing in it is changed, so
    its run may still go on. The state has the parameters, and the centroids of routing
    layers. It goes into a model by::

        model = LanguageModel(config, spec, nnx.Rngs(0))
        nnx.update(model, state)
        model.eval()

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    found = None
    if folder.is_dir():
        with Checkpoints(folder, None) as checkpoints:
            found = checkpoints.read()
    if found is None:
        raise ValueError(
            f"there is no checkpoint in {folder}: name the folder of a run, such as "
            "out/checkpoints/sparse"
        )
    identity, arrays = found
    sizes = {x.name: x.type(identity[x.name]) for x in fields(ModelConfig)}
    config = ModelConfig(**sizes)
    spec = spec_of(identity["spec"], int(identity["seq_len"]))
    model = nnx.eval_shape(lambda: LanguageModel(config, spec, nnx.Rngs(0)))
    params, others = nnx.state(model, nnx.Param, ...)
    like = ModelState(params, others)
    return spec, config, nnx.merge_state(*_filled(like, arrays))


def forget(folder: Path) -> None:
    """Deletes the checkpoints of a run."""
    if folder.exists():
        shutil.rmtree(folder)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state: Any) -> dict[str, Any]:
    """The leaves by their path, so that a checkpoint explains itself."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _named_numbers(state: Any) -> dict[str, Any]:
    """The numbers of each leaf by its path; those of a random key are its data."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in _named(state).items()
    }


def _named_arrays(state: Any) -> dict[str, np.ndarray]:
    """The same as arrays of this process."""
    return {name: np.asarray(x) for name, x in _named_numbers(state).items()}


def _filled(like: State, arrays: Mapping[str, np.ndarray]) -> State:
    """A state in the form of ``like`` with the numbers of ``arrays``."""
    leaves = [
        jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
        for name, leaf in _named(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
