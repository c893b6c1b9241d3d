"""Reads the bytes of files, splits them by file, and cuts them into batches.

Batches depend on nothing but their arguments.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The byte between files. Text never holds it; other data may.
SEPARATOR = b"\0"
VALID_SHARE = 0.05
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Corpus:
    """The bytes to train on and those to validate on, uint8, from different files."""

    name: str
    train: np.ndarray
    valid: np.ndarray

    @property
    def fingerprint(self) -> str:
        """A hash of the bytes: equal for equal bytes."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(len(self.train).to_bytes(8, "big"))
        digest.update(self.valid.tobytes())
        return digest.hexdigest()[:16]


def load(path: str | None, seq_len: int) -> Corpus:
    """Loads the bytes of a file, or of all files below a folder; any bytes will do.

    None stands for the source text of Python's standard library, which every machine
    that can run this has. Folders are split by file, a single file by its tail.

    Raises:
      ValueError: there is nothing there, or too little for one sequence.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path)
    if not root.exists():
        raise ValueError(f"--data={root}: there is no such file or folder")
    if root.is_file():
        corpus = _split_tail(root, seq_len)
    else:
        corpus = _split_files(root, _standard_library(root) if path is None else None)
    for part in ("train", "valid"):
        size = len(getattr(corpus, part))
        if size < seq_len + 1:
            raise ValueError(
                f"--data={root}: the {part} part has {size:,} bytes, and one sequence "
                f"needs seq_len + 1 = {seq_len + 1:,}: give more data, or a smaller "
                "--seq_len"
            )
    return corpus


def _standard_library(root: Path) -> list[Path]:
    files = root.rglob("*.py")
    return [
        file for file in files if not SKIPPED_FOLDERS & {*file.relative_to(root).parts}
    ]


def _visible_files(root: Path) -> list[Path]:
    return [
        file
        for file in root.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]


def _split_files(root: Path, files: list[Path] | None) -> Corpus:
    """Splits files into training and validation, by the hash of their path."""
    files = _visible_files(root) if files is None else files
    texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    texts = {name: text for name, text in sorted(texts.items()) if text}
    if not texts:
        raise ValueError(f"--data={root}: no file in this folder has a byte in it")
    if len(texts) == 1:
        (name,) = texts
        raise ValueError(
            f"--data={root}: its only file, {name!r}, cannot be split by file: name "
            "the file itself to split it by its tail"
        )
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = set(order[: max(1, round(VALID_SHARE * len(order)))])
    parts = ([], [])
    for name, text in texts.items():
        parts[name in held_out].append(text)
    train, valid = (np.frombuffer(SEPARATOR.join(p), np.uint8) for p in parts)
    return Corpus(f"{root} ({len(texts):,} files)", train, valid)


def _split_tail(file: Path, seq_len: int) -> Corpus:
    data = np.frombuffer(file.read_bytes(), np.uint8)
    if not len(data):
        raise ValueError(f"--data={file}: the file is empty")
    tail = max(round(VALID_SHARE * len(data)), seq_len + 1)
    return Corpus(str(file), data[: max(0, len(data) - tail)], data[-tail:])


def train_batch(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int
) -> np.ndarray:
    """Batch number ``step``, ``[batch_size, seq_len + 1]``.

    It depends on its arguments alone, so a killed run goes on with the same batches.
    """
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(corpus.train) - seq_len, batch_size)
    return _windows(corpus.train, starts, seq_len)


def valid_batches(
    corpus: Corpus, *, num_batches: int, batch_size: int, seq_len: int
) -> Iterator[np.ndarray]:
    """The same evenly spaced windows at each call, ``[batch_size, seq_len + 1]``."""
    last = len(corpus.valid) - seq_len - 1
    starts = np.linspace(0, last, num_batches * batch_size).astype(np.int64)
    for part in starts.reshape(num_batches, batch_size):
        yield _windows(corpus.valid, part, seq_len)


def _windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return data[starts[:, None] + np.arange(seq_len + 1)[None, :]]
