"""Error and cost of DeltaLLM's temporal reuse, as reconstructed here.

    python benchmarks/delta_llm.py [--steps 120] > results/delta_llm.txt

Keys come from two sources: walks of normal steps with a given correlation from one
position to the next, and the layers of the byte-level model of ``examples/lm``, trained
here for some steps. Theta is a share of the standard deviation of the keys. For each:

- zero deltas: elements of keys that are not updated;
- skipped: products of queries and keys that a machine for sparse deltas skips, of all
  products of causal attention; those within the window are never skipped;
- error: norm of the difference from dense causal attention, relative to its norm.

The last table is the time of the approximation on this CPU, which skips nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import machine, medians, stopwatch, table

import sadsl as sa
from sadsl import catalog

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from lm import data
from lm.checkpoints import History
from lm.model import LanguageModel, ModelConfig, rotary
from lm.training import TrainConfig, compile_run, train

THETAS = (0.0, 0.1, 0.25, 0.5, 1.0)
CORRELATIONS = (0.0, 0.9, 0.99)
N, WINDOW, HEADS, HEAD_DIM = 1024, 128, 4, 32
LENGTHS = (2048, 8192)


class Heads(NamedTuple):
    """Queries, keys and values of attention, ``[batch, seq, heads, head_dim]``."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def walks(correlation: float, n: int = N) -> Heads:
    """Normal q and v; keys of variance 1 that follow their predecessors."""
    rng = np.random.default_rng(0)
    q, v, steps = rng.normal(size=(3, 1, n, HEADS, HEAD_DIM))
    k = steps.copy()
    for t in range(1, n):
        fresh = np.sqrt(1 - correlation**2) * steps[:, t]
        k[:, t] = correlation * k[:, t - 1] + fresh
    return Heads(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))


def trained(steps: int) -> tuple[Iterator[tuple[str, Heads]], float]:
    """The heads of each layer of a trained model on held-out text, and its loss."""
    sizes = ModelConfig(2, HEADS, HEADS, HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM)
    config = TrainConfig(
        steps=steps, batch_size=2, seq_len=N, learning_rate=4e-3, warmup_steps=10,
        weight_decay=0.1, clip_norm=1.0, seed=0, valid_batches=4, valid_every=steps,
        checkpoint_every=steps,
    )  # fmt: skip
    corpus, history = data.load(None, N), History()
    compiled = compile_run(sa.causal(), sizes, config)
    kept: list = []
    train(
        compiled, None, history, config, corpus,
        keep=lambda state, _: kept.append(jax.device_get(state)), tell=lambda _: None,
    )  # fmt: skip
    model = LanguageModel(sizes, sa.causal(), nnx.Rngs(0))
    nnx.update(model, kept[-1].params)
    text = next(data.valid_batches(corpus, num_batches=1, batch_size=2, seq_len=N))
    return layers(model, jnp.asarray(text[:, :-1], jnp.int32)), history.valid[-1][1]


def layers(model: LanguageModel, tokens: jax.Array) -> Iterator[tuple[str, Heads]]:
    """What the attention of each layer is called with."""
    x = model.embedded(tokens)
    for number, block in enumerate(model.blocks):
        layer, normed = block.attention, block.attention_norm(x)
        q, k, v = (f(normed) for f in (layer.query, layer.key, layer.value))
        yield f"model, layer {number}", Heads(*rotary(q, k), v)
        x = block(x)


def measured(name: str, heads: Heads) -> Iterator[list[str]]:
    """A row for each theta."""
    dense = sa.attention(*heads, sa.causal())
    spread = float(jnp.std(heads.k))
    n, distance = heads.k.shape[1], np.arange(heads.k.shape[1])
    # How many queries see a key by its delta: those further than the window.
    far = np.maximum(n - 1 - WINDOW - distance, 0)
    attend = jax.jit(partial(catalog.delta_llm, window=WINDOW))
    for share in THETAS:
        theta = share * spread
        out = attend(*heads, theta)
        updated = np.asarray(catalog.reference_keys(heads.k, theta).updated)
        same = 1 - updated.mean(axis=(0, 2, 3))
        skipped = (same * far).sum() / (n * (n + 1) / 2)
        error = float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense))
        yield [
            name,
            f"{share:g}",
            f"{same.mean():.1%}",
            f"{skipped:.1%}",
            f"{error:.1e}",
        ]


def times(rounds: int) -> list[list[str]]:
    """Milliseconds of the approximation and of dense causal attention."""
    rows = []
    for n in LENGTHS:
        heads = walks(0.9, n)
        dense = jax.jit(partial(sa.attention, spec=sa.causal()))
        approximate = jax.jit(partial(catalog.delta_llm, window=WINDOW))
        ms = medians(
            {
                "dense": stopwatch(dense, *heads),
                "delta_llm": stopwatch(approximate, *heads, 0.5),
            },
            rounds,
        )
        rows.append([f"{n:,}", *(f"{x:.1f}" for x in ms.values())])
    return rows


def main() -> None:
    """Trains, measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine("jax", "sadsl"))
    found, bits = trained(args.steps)
    print(
        f"n = {N:,}, {HEADS} heads of {HEAD_DIM}, window of {WINDOW} keys; the model: "
        f"{args.steps} steps, {bits:.2f} bits/byte\n"
    )
    sources = [(f"walk, correlation {c:g}", walks(c)) for c in CORRELATIONS]
    rows = [row for source in (*sources, *found) for row in measured(*source)]
    heads = ["Keys", "theta / std", "zero deltas", "skipped", "error"]
    print(table(heads, rows), end="\n\n")
    print(table(["Forward, ms", "dense", "delta_llm"], times(args.rounds)))


if __name__ == "__main__":
    main()
