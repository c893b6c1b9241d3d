"""Interactions of users with items: a CSV file or a generator, split and batched.

Items are numbered from 1 to ``num_items``; 0 is padding and ``num_items + 1`` the mask.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMNS = ("user", "item", "timestamp")
# A user needs an item to test on, one to validate on, and one to learn from.
LEAST = 3
PADDING = 0


@dataclass(frozen=True, eq=False)
class Interactions:
    """The items of each user in the order of time, as integers from 1."""

    name: str
    histories: tuple[np.ndarray, ...]
    num_items: int

    @property
    def mask(self) -> int:
        """The token that stands for an item to predict."""
        return self.num_items + 1

    @property
    def num_tokens(self) -> int:
        """Items, padding and the mask."""
        return self.num_items + 2

    def known(self, held_out: int) -> list[np.ndarray]:
        """All items of each user but the last ``held_out``."""
        return [items[: len(items) - held_out] for items in self.histories]

    def popularity(self) -> np.ndarray:
        """How often each token is interacted with in the training part."""
        items = np.concatenate(self.known(2))
        return np.bincount(items, minlength=self.num_tokens)


@dataclass(frozen=True)
class Made:
    """What the generator makes: users who follow a few series at a time.

    Each item belongs to a series, and has a place in it. A user goes on with one of
    ``active`` series, chosen at random each time; a finished series is replaced by a
    new one. With probability ``noise`` the user picks any item instead.
    """

    num_users: int = 2000
    num_series: int = 30
    length: int = 10
    active: int = 2
    noise: float = 0.1
    fewest: int = 10
    most: int = 60

    def draw(self, seed: int = 0) -> Interactions:
        """The interactions of all users."""
        rng = np.random.default_rng(seed)
        num_items = self.num_series * self.length
        histories = []
        for _ in range(self.num_users):
            size = int(rng.integers(self.fewest, self.most + 1))
            histories.append(self._history(rng, size))
        return Interactions("generated users", tuple(histories), num_items)

    def _history(self, rng: np.random.Generator, size: int) -> np.ndarray:
        # The series that a user follows, and how far.
        series = rng.choice(self.num_series, self.active, replace=False)
        place = rng.integers(0, self.length, self.active)
        items = np.empty(size, np.int32)
        for at in range(size):
            if rng.random() < self.noise:
                items[at] = 1 + rng.integers(self.num_series * self.length)
                continue
            which = rng.integers(self.active)
            items[at] = 1 + series[which] * self.length + place[which]
            place[which] += 1
            if place[which] == self.length:
                others = np.setdiff1d(np.arange(self.num_series), series)
                series[which], place[which] = rng.choice(others), 0
        return items


def load(path: str) -> Interactions:
    """Reads a CSV file with the columns user, item and timestamp, in any order.

    Users and items may be any text; timestamps are numbers. Interactions of one user
    at one time keep the order of the file. Users with fewer than three are left out.

    Raises:
      ValueError: there is no such file, a column is missing, a timestamp is no number,
        or no user has three interactions.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--data={path}: there is no such file")
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        missing = [x for x in COLUMNS if x not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"--data={path}: the first line has no column {missing[0]!r}: name the "
                f"columns {', '.join(COLUMNS)}"
            )
        for row in reader:
            rows[row["user"]].append((_time(path, reader.line_num, row), row["item"]))
    whole = {user: x for user, x in rows.items() if len(x) >= LEAST}
    if not whole:
        raise ValueError(
            f"--data={path}: no user has {LEAST} interactions: one is to test on, one "
            "to validate on, and one to learn from"
        )
    number: dict[str, int] = {}
    histories = []
    for found in whole.values():
        ordered = [item for _, item in sorted(found, key=lambda x: x[0])]
        for item in ordered:
            number.setdefault(item, 1 + len(number))
        histories.append(np.array([number[x] for x in ordered], np.int32))
    return Interactions(f"{path}", tuple(histories), len(number))


def _time(path: str, line: int, row: dict[str, str]) -> float:
    """The timestamp of a row.

    Raises:
      ValueError: a cell is missing, or the timestamp is no finite number.
    """
    if any(row[x] is None for x in COLUMNS):
        raise ValueError(f"--data={path}, line {line}: a cell is missing")
    try:
        time = float(row["timestamp"])
    except ValueError:
        time = np.nan
    if not np.isfinite(time):
        raise ValueError(
            f"--data={path}, line {line}: timestamp {row['timestamp']!r} is no number"
        )
    return time


# --- batches ---


class Batch(NamedTuple):
    """Tokens ``[batch, length]``, where items are to be predicted, and which they are.

    ``places`` and ``targets`` are ``[batch, most]``; a target is 0 where there is none.
    """

    tokens: np.ndarray
    places: np.ndarray
    targets: np.ndarray


def cloze_batch(
    data: Interactions, *, seed: int, step: int, batch_size: int, length: int,
    mask_rate: float, last_rate: float,
) -> Batch:  # fmt: skip
    """Random users of the training part, with items masked.

    Each item is masked with probability ``mask_rate``: at least one of each user, and
    at most twice as many as that makes on average. With probability ``last_rate`` only
    the last one is, as when an item is recommended. The same arguments give the same
    batch.
    """
    rng = np.random.default_rng([seed, step])
    known = data.known(2)
    users = rng.integers(0, len(known), batch_size)
    items = np.stack([padded(_window(rng, known[u], length), length) for u in users])
    real = items != PADDING
    masked = real & (rng.random(items.shape) < mask_rate)
    last = np.zeros_like(masked)
    last[:, -1] = True
    none = ~masked.any(axis=1)
    only_last = none | (rng.random(batch_size) < last_rate)
    masked = np.where(only_last[:, None], last, masked)
    most = max(1, min(length, round(2 * mask_rate * length)))
    # Masked places first, in a random order; those beyond the most stay visible.
    order = np.argsort(np.where(masked, rng.random(items.shape), 2), axis=1)
    places = order[:, :most]
    hidden = np.take_along_axis(masked, places, axis=1)
    targets = np.where(hidden, np.take_along_axis(items, places, axis=1), PADDING)
    tokens = items.copy()
    rows, columns = np.nonzero(hidden)
    tokens[rows, places[rows, columns]] = data.mask
    return Batch(*(x.astype(np.int32) for x in (tokens, places, targets)))


def _window(rng: np.random.Generator, items: np.ndarray, length: int) -> np.ndarray:
    """Up to ``length`` items in a row, from a random place of a longer history."""
    start = int(rng.integers(0, max(1, len(items) - length + 1)))
    return items[start : start + length]


def padded(items: np.ndarray, length: int) -> np.ndarray:
    """The last ``length`` items, with padding before them."""
    items = items[-length:]
    return np.concatenate([np.full(length - len(items), PADDING, np.int32), items])


class Questions(NamedTuple):
    """What to recommend: tokens that end in a mask, the item, and those seen before."""

    tokens: np.ndarray
    wanted: np.ndarray
    seen: list[np.ndarray]


def questions(
    data: Interactions, *, held_out: int, batch_size: int, length: int
) -> Iterator[Questions]:
    """The leave-one-out questions of all users: the last item for ``held_out=1``.

    For 2, the item before the last one is to be found from those before it.
    """
    known = data.known(held_out)
    for start in range(0, len(known), batch_size):
        part = slice(start, start + batch_size)
        rows = [np.append(items, data.mask) for items in known[part]]
        tokens = np.stack([padded(row, length) for row in rows]).astype(np.int32)
        wanted = np.array([items[-held_out] for items in data.histories[part]])
        yield Questions(tokens, wanted, known[part])


def ranks(scores: np.ndarray, asked: Questions, num_items: int) -> np.ndarray:
    """The rank from 0 of each wanted item among all items that are new to the user.

    ``scores`` is ``[batch, tokens]``. An item that scores the same goes before the
    wanted one, so that constant scores are no success.
    """
    scores = np.array(scores, np.float64)
    scores[:, PADDING] = scores[:, num_items + 1 :] = -np.inf
    rows = np.arange(len(scores))
    wanted = scores[rows, asked.wanted]
    for row, items in enumerate(asked.seen):
        scores[row, items] = -np.inf
    scores[rows, asked.wanted] = -np.inf
    return (scores >= wanted[:, None]).sum(axis=1)
