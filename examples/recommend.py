"""Recommends the next item of a user: BERT4Rec with full and with sparse attention.

    python examples/recommend.py                     # generated users; some minutes
    python examples/recommend.py --data ratings.csv  # columns user, item, timestamp
    python examples/recommend.py --spec "window(8, 8)" --spec "linear(map=full())"

Sun et al., BERT4Rec: sequential recommendation with bidirectional encoder
representations from transformer, 2019: a Cloze task hides items of a history, and a
bidirectional model finds them from both sides. The first model has full attention, and
each ``--spec`` is trained beside it, from the same weights on the same batches.

Leave one out: the last item of each user is the test, the one before it the validation,
and neither is trained on. An item is ranked among *all* items that are new to the user
(not among sampled ones). HR@10 is the share of users whose item is among the first ten,
NDCG@10 the mean of ``1 / log2(rank + 1)`` where it is, both on the last step's weights.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from rec import data
from rec.data import Interactions
from rec.model import Recommender, Sizes, cloze_loss, without_padding
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import sadsl as sa
from sadsl.terms.base import Spec

FULL = "full()"
SPECS = ("window(4, 4)", "linear(map=full())")
TOP = 10
QUICK_DATA = data.Made(num_users=60, num_series=6, length=4, active=2, most=16)


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: str | None
    spec: tuple[str, ...]
    sizes: Sizes
    steps: int
    batch_size: int
    learning_rate: float
    mask_rate: float
    seed: int
    quick: bool

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate={self.learning_rate} must be above 0")
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"--mask_rate={self.mask_rate} must be in (0, 1]")


def options(arguments: Sequence[str]) -> Options:
    """Reads the command line; exits with a message where it makes no sense.

    Raises:
      ValueError: a number is out of its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Sizes()
    add("--data", help="a CSV file: user, item, timestamp; generated if not given")
    add("--spec", action="append", help=f"beside {FULL}; if never given, {SPECS}")
    add("--steps", type=int, default=800)
    add("--batch_size", type=int, default=64, help="users in a step")
    add("--learning_rate", type=float, default=3e-3, help="peak of the schedule")
    add("--mask_rate", type=float, default=0.2, help="share of items to hide")
    add("--seed", type=int, default=0)
    for name in ("num_layers", "num_heads", "d_model", "length"):
        add(f"--{name}", type=int, default=getattr(default, name))
    add("--dropout", type=float, default=default.dropout)
    add("--quick", action="store_true", help="few users, tiny sizes, four steps")
    given = vars(parser.parse_args(arguments))
    names = "num_layers", "num_heads", "d_model", "length", "dropout"
    sizes = {name: given.pop(name) for name in names}
    if given["quick"]:
        # The dense backend compiles in a fraction of the time.
        sizes |= {"num_layers": 1, "d_model": 8, "length": 12, "impl": "reference"}
        given |= {"steps": 4, "batch_size": 8}
    given["spec"] = tuple(given["spec"] or SPECS)
    return Options(sizes=Sizes(**sizes), **given)


class Score(NamedTuple):
    """Hit rate and NDCG at ten over all users, and the hit rate's standard error."""

    hit_rate: float
    ndcg: float
    error: float


def score(ranks: np.ndarray) -> Score:
    """The measures, from ranks that count from 0."""
    hits = ranks < TOP
    gain = np.where(hits, 1 / np.log2(ranks + 2.0), 0.0)
    rate = float(hits.mean())
    return Score(
        rate, float(gain.mean()), float(np.sqrt(rate * (1 - rate) / len(hits)))
    )


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    valid: Score
    test: Score
    loss: float | None = None
    step_ms: float | None = None


class Trained(NamedTuple):
    """A trained model, as a function of tokens, with its last loss and speed."""

    last_logits: Callable[[np.ndarray], jax.Array]
    loss: float
    step_ms: float


def train(
    spec: Spec, asked: Options, users: Interactions, tell: Callable[[int, float], None]
) -> Trained:
    """Trains one model; ``tell`` hears of each step and its loss."""
    model = Recommender(asked.sizes, spec, users.num_tokens, nnx.Rngs(asked.seed))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    warm = max(1, asked.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, asked.learning_rate, warm, max(asked.steps, warm + 1)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )

    def cost(params: Any, batch: data.Batch, key: jax.Array) -> jax.Array:
        return cloze_loss(nnx.merge(graph, params, rest), batch, key)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, batch: data.Batch, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(cost)(params, batch, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    moments, losses, seconds = optimizer.init(params), [], []
    for number in range(asked.steps):
        batch = data.cloze_batch(
            users, seed=asked.seed, step=number, batch_size=asked.batch_size,
            length=asked.sizes.length, mask_rate=asked.mask_rate, last_rate=0.1,
        )  # fmt: skip
        key = jax.random.fold_in(jax.random.key(asked.seed), number)
        begin = time.perf_counter()
        params, moments, loss = step(params, moments, batch, key)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
        tell(number + 1, losses[-1])

    @jax.jit
    def last_logits(tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest)
        return model.logits(model.encoded(tokens)[:, -1])

    recent = float(np.mean(losses[-max(1, asked.steps // 20) :]))
    return Trained(last_logits, recent, 1e3 * float(np.median(seconds)))


def evaluate(
    scores_of: Callable[[np.ndarray], Any],
    users: Interactions,
    asked: Options,
    held_out: int,
) -> Score:
    """Ranks the held-out item of every user by the scores of a model."""
    found = [
        data.ranks(np.asarray(scores_of(part.tokens)), part, users.num_items)
        for part in data.questions(
            users, held_out=held_out, batch_size=256, length=asked.sizes.length
        )
    ]
    return score(np.concatenate(found))


def row_of(
    name: str,
    scores_of: Callable[[np.ndarray], Any],
    users: Interactions,
    asked: Options,
    **more: float,
) -> Row:
    """The line of a model."""
    valid, test = (evaluate(scores_of, users, asked, x) for x in (2, 1))
    return Row(name, valid, test, **more)


def table(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    head = ("", "HR@10", "NDCG@10", "valid HR@10", "loss", "step, ms")
    lines = [head, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [x.rjust(w) for x, w in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]])

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([text(head), rule, *(text(line) for line in lines[1:])])


def _cells(row: Row) -> tuple[str, ...]:
    optional = (row.loss, "{:.3f}"), (row.step_ms, "{:,.0f}")
    return (
        row.name,
        f"{row.test.hit_rate:.3f} ± {1.96 * row.test.error:.3f}",
        f"{row.test.ndcg:.3f}",
        f"{row.valid.hit_rate:.3f}",
        *("" if x is None else form.format(x) for x, form in optional),
    )


def recommend(asked: Options, console: Console) -> list[Row]:
    """Trains all models, prints the table and returns its rows.

    Raises:
      ValueError: the file or a spec does not fit.
    """
    specs = {text: sa.parse(text) for text in (FULL, *asked.spec)}
    for spec in specs.values():
        without_padding(spec)
    made = QUICK_DATA if asked.quick else data.Made()
    users = data.load(asked.data) if asked.data else made.draw(asked.seed)
    total = sum(len(x) for x in users.histories)
    console.print(
        f"{users.name}: {len(users.histories):,} users, {users.num_items:,} items, "
        f"{total:,} interactions",
        highlight=False, markup=False,
    )  # fmt: skip
    popular = users.popularity()
    popularity = lambda tokens: np.broadcast_to(popular, (len(tokens), len(popular)))
    rows = [row_of("popularity", popularity, users, asked)]
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(),
        MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        for text, spec in specs.items():
            task = progress.add_task(text, total=asked.steps, now="compiling")
            tell = lambda done, loss, task=task: progress.update(
                task, completed=done, now=f"loss {loss:.3f}"
            )
            found = train(spec, asked, users, tell)
            more = {"loss": found.loss, "step_ms": found.step_ms}
            rows.append(row_of(text, found.last_logits, users, asked, **more))
            progress.remove_task(task)
    sizes = asked.sizes
    console.print(
        f"\n{table(rows)}\n\n"
        f"{sizes.num_layers} layers, {sizes.num_heads} heads, width {sizes.d_model}, "
        f"the last {sizes.length} items; {asked.steps:,} steps of {asked.batch_size} "
        f"users. Ranked among all new items; ± half of a 95% interval over users.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return rows


def main(arguments: Sequence[str]) -> int:
    """Trains and prints; a mistake of the caller is printed without a trace."""
    console = Console()
    try:
        recommend(options(arguments), console)
    except (ValueError, NotImplementedError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing is kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
