"""Finds the heads that copy from far back, and shows that they are the ones that do.

    python examples/retrieval_heads.py            # some minutes
    python examples/retrieval_heads.py --out out  # and writes the head plan

Wu et al., Retrieval head mechanistically explains long-context factuality, 2024. A
small model learns here to find a needle: in a text of words that follow each other, a
mark begins a few tokens in no order, and the same mark at the end asks for them. Then:

1. Each head is scored by how much of the needle it copies, at several lengths and
   depths, from its queries and keys at the answer alone.
2. Heads with a score of at least 0.1 are retrieval heads. They are taken away, as a map
   that sees nothing, and then as many of the other heads, the best-scored first.
3. The scores become a head plan: retrieval heads stay dense, all others become local.

The table says what share of the needle's tokens each model still gives.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lm.model import LanguageModel, ModelConfig, rotary
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import sadsl as sa
from sadsl.analysis.retrieval_heads import (
    LayerInputs,
    NeedleRun,
    retrieval_plan,
    retrieval_scores,
)
from sadsl.text.specs import any_term

# Tokens: words of the text, the needle's tokens, and the mark before a needle.
WORDS, NEEDLES, MARK = 20, range(100, 120), 200
# Small embeddings leave attention a greater share of what the layers add up.
EMBEDDING = 0.3
DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0
NOTHING = sa.where(lambda q, k: k < 0)
Plan = Sequence[sa.IndexMap]


@dataclass(frozen=True)
class Options:
    """Sizes of the task, of the model and of its training."""

    steps: int = 1000
    batch_size: int = 32
    seq_len: int = 64
    needle: int = 8
    num_layers: int = 2
    num_heads: int = 4
    d_model: int = 64
    learning_rate: float = 3e-3
    window: int = 8
    seed: int = 0
    prompts: int = 8
    threshold: float = 0.1
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "needle", "window", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        least = 4 * (self.needle + 1)
        if self.seq_len < least:
            raise ValueError(
                f"--seq_len={self.seq_len} must be at least {least}, four times the "
                f"needle of {self.needle} and its mark"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the test prompts with their answers."""
        return self.seq_len // 2, 3 * self.seq_len // 4, self.seq_len


def options(arguments: Sequence[str]) -> Options:
    """Reads the command line; exits with a message where it makes no sense.

    Raises:
      ValueError: a number is out of its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options()
    for name in ("steps", "batch_size", "seq_len", "needle", "num_layers", "num_heads",
                 "d_model", "window", "seed", "prompts"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    for name in ("learning_rate", "threshold"):
        parser.add_argument(f"--{name}", type=float, default=getattr(default, name))
    parser.add_argument("--out", type=Path, help="folder for the head plan")
    return Options(**vars(parser.parse_args(arguments)))


# --- the task ---


class Prompts(NamedTuple):
    """Texts ``[batch, seq]``, and where needles and answers begin.

    An answer is the needle once more. What is after it is never seen: models are
    causal.
    """

    tokens: np.ndarray
    needles: np.ndarray
    answers: np.ndarray

    def spans(self, needle: int) -> np.ndarray:
        """The positions of the answers, ``[batch, needle]``."""
        return self.answers[:, None] + np.arange(needle)


def prompts(
    rng: np.random.Generator, asked: Options, lengths: np.ndarray, depths: np.ndarray
) -> Prompts:
    """A text of each length with a needle at each depth, from 0 to 1.

    A word is followed by one of two others, so that a text has something to learn at
    hand. The tokens of a needle are in no order and do not repeat.
    """
    # The words that may follow each word, the same in all texts.
    following = np.random.default_rng(0).integers(0, WORDS, (WORDS, 2))
    count, needle = len(lengths), asked.needle
    tokens = np.empty((count, asked.seq_len), np.int32)
    tokens[:, 0] = rng.integers(0, WORDS, count)
    for at in range(1, asked.seq_len):
        tokens[:, at] = following[tokens[:, at - 1], rng.integers(0, 2, count)]
    answers = lengths - needle
    # Between the first token and the mark that asks: a mark and the needle.
    starts = 1 + np.floor(depths * (answers - needle - 2)).astype(int)
    for row, start, answer in zip(tokens, starts, answers, strict=True):
        hidden = rng.choice(NEEDLES, needle, replace=False)
        row[start - 1] = row[answer - 1] = MARK
        row[start : start + needle] = row[answer : answer + needle] = hidden
    return Prompts(tokens, starts, answers)


# --- the model ---


def build(asked: Options) -> LanguageModel:
    """An untrained model with dense causal attention in every layer."""
    sizes = ModelConfig(
        asked.num_layers, asked.num_heads, asked.num_heads, asked.d_model,
        2 * asked.d_model,
    )  # fmt: skip
    model = LanguageModel(sizes, sa.causal(), nnx.Rngs(asked.seed))
    for table in (model.embed, model.embed_before):
        table.embedding[...] = EMBEDDING * table.embedding[...]
    return model


def with_plan(model: LanguageModel, plan: Plan) -> LanguageModel:
    """The same weights, with the map of each layer from a plan."""
    planned = nnx.clone(model)
    for block, spec in zip(planned.blocks, plan, strict=True):
        block.attention.term = any_term(spec)
    return planned


def loss(model: LanguageModel, tokens: jax.Array, spans: jax.Array) -> jax.Array:
    """The mean cost of all tokens, and that of the answers, which counts as much."""
    costs = optax.softmax_cross_entropy_with_integer_labels(
        model(tokens[:, :-1]), tokens[:, 1:]
    )
    return costs.mean() + jnp.take_along_axis(costs, spans - 1, axis=1).mean()


def train(asked: Options, tell: Callable[[int, float], None]) -> LanguageModel:
    """A model that finds needles; ``tell`` hears of each step and its loss."""
    graph, params, rest = nnx.split(build(asked), nnx.Param, ...)
    warm = max(1, asked.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, asked.learning_rate, warm, max(asked.steps, warm + 1)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
    )

    @jax.jit
    def step(params: Any, moments: Any, *batch: jax.Array) -> Any:
        cost = lambda p: loss(nnx.merge(graph, p, rest), *batch)
        value, gradient = jax.value_and_grad(cost)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    rng, moments = np.random.default_rng(asked.seed), optimizer.init(params)
    for number in range(asked.steps):
        size = asked.batch_size
        lengths = rng.integers(asked.lengths[0], asked.seq_len + 1, size)
        batch = prompts(rng, asked, lengths, rng.random(size))
        spans = batch.spans(asked.needle)
        params, moments, value = step(params, moments, batch.tokens, spans)
        tell(number + 1, float(value))
    return nnx.merge(graph, params, rest)


def answered(model: LanguageModel, given: Prompts, needle: int) -> np.ndarray:
    """The texts with the model's own answers, token by token, the likeliest each."""
    # A function of its own for each model, whose maps are part of the program.
    following = nnx.jit(lambda model, tokens: model(tokens).argmax(axis=-1))
    tokens = given.tokens.copy()
    spans, rows = given.spans(needle), np.arange(len(tokens))
    np.put_along_axis(tokens, spans, 0, axis=1)
    for at in spans.T:
        found = np.asarray(following(model, jnp.asarray(tokens)))
        tokens[rows, at] = found[rows, at - 1]
    return tokens


def inputs_of(model: LanguageModel, tokens: jax.Array) -> list[LayerInputs]:
    """What the attention of each layer is called with."""
    x, found = model.embedded(tokens), []
    for block in model.blocks:
        layer, normed = block.attention, block.attention_norm(x)
        q, k = rotary(layer.query(normed), layer.key(normed))
        found.append(LayerInputs(q, k, layer.term))
        x = block(x)
    return found


# --- the claim ---


def tests_of(asked: Options) -> Prompts:
    """Prompts at all lengths and depths."""
    pairs = [
        (n, d) for n in asked.lengths for d in DEPTHS for _ in range(asked.prompts)
    ]
    lengths, depths = (np.array(x) for x in zip(*pairs, strict=True))
    return prompts(np.random.default_rng([asked.seed, 1]), asked, lengths, depths)


def runs_of(model: LanguageModel, tests: Prompts, needle: int) -> Iterator[NeedleRun]:
    """Every prompt with the model's answer and the inputs of its layers."""
    said = answered(model, tests, needle)
    layers = inputs_of(model, jnp.asarray(said))
    places = zip(tests.needles.tolist(), tests.answers.tolist(), strict=True)
    for row, (start, answer) in enumerate(places):
        stop = answer + needle
        mine = [
            x._replace(q=x.q[row : row + 1, :stop], k=x.k[row : row + 1, :stop])
            for x in layers
        ]
        yield NeedleRun(said[row, :stop], (start, start + needle), answer, mine)


def copied(model: LanguageModel, tests: Prompts, needle: int) -> float:
    """The share of the needles' tokens that a model gives, each in its place."""
    right = answered(model, tests, needle) == tests.tokens
    return float(np.take_along_axis(right, tests.spans(needle), axis=1).mean())


def without(asked: Options, taken: Sequence[tuple[int, int]]) -> Plan:
    """A plan whose given heads, as (layer, head), see nothing: their output is 0."""
    return [
        sa.per_head(
            *(
                NOTHING if (i, h) in taken else sa.causal()
                for h in range(asked.num_heads)
            )
        )
        for i in range(asked.num_layers)
    ]


class Found(NamedTuple):
    """The scores, the plan, and the rows of the table: name, heads, share copied."""

    scores: np.ndarray
    plan: tuple[sa.IndexMap, ...]
    rows: list[tuple[str, int, float]]


def experiment(
    model: LanguageModel, asked: Options, tell: Callable[[str], None]
) -> Found:
    """Scores the heads, takes some away, and uses the plan.

    Raises:
      ValueError: the model does not find needles, or no head copies.
    """
    tests = tests_of(asked)
    tell("scores")
    scores = retrieval_scores(runs_of(model, tests, asked.needle))
    order = sorted(np.ndindex(scores.shape), key=lambda at: -scores[at])
    chosen = [at for at in order if scores[at] >= asked.threshold]
    others = [at for at in order if scores[at] < asked.threshold][: len(chosen)]
    if not chosen or not others:
        raise ValueError(
            f"--threshold={asked.threshold}: {len(chosen)} of {scores.size} heads "
            "reach it, so there are none to take away or to compare with: train "
            "longer, or change it"
        )
    local = sa.causal() & (sa.window(asked.window) | sa.sinks(1))
    plan = retrieval_plan(scores, local, threshold=asked.threshold)
    all_local = [local] * asked.num_layers
    plans = {
        "all heads dense": (without(asked, ()), 0),
        "without retrieval heads": (without(asked, chosen), len(chosen)),
        "without other heads": (without(asked, others), len(others)),
        "plan: others local": (plan, scores.size - len(chosen)),
        "all heads local": (all_local, scores.size),
    }
    rows = []
    for name, (of_layers, changed) in plans.items():
        tell(name)
        share = copied(with_plan(model, of_layers), tests, asked.needle)
        rows.append((name, changed, share))
    return Found(scores, plan, rows)


def tables(found: Found) -> str:
    """The scores by head, and what each model copies; aligned."""
    heads = "".join(f"{f'head {h}':>8}" for h in range(found.scores.shape[1]))
    lines = [f"{'score':<9}{heads}"]
    for number, row in enumerate(found.scores):
        lines.append(f"{f'layer {number}':<9}" + "".join(f"{x:>8.2f}" for x in row))
    width = max(len(name) for name, *_ in found.rows)
    lines += ["", f"{'':<{width}}  changed heads  needle copied"]
    lines += [f"{n:<{width}}  {c:>13}  {x:>13.1%}" for n, c, x in found.rows]
    return "\n".join(lines)


def run(asked: Options, console: Console) -> Found:
    """Trains, measures, prints the tables, and writes the plan if asked.

    Raises:
      ValueError: the model did not learn enough to be asked.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=asked.steps, now="compiling")
        model = train(
            asked,
            lambda done, value: progress.update(
                task, completed=done, now=f"loss {value:.3f}"
            ),
        )
        task = progress.add_task("measuring", total=6, now="")
        found = experiment(
            model, asked, lambda now: progress.update(task, advance=1, now=now)
        )
    console.print(tables(found), highlight=False, markup=False, soft_wrap=True)
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / "retrieval_heads.json"
        path.write_text(sa.write_head_plan(found.plan))
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs everything; a mistake of the caller is printed without a trace."""
    console = Console()
    try:
        run(options(arguments), console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing is kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
