"""Continues a prompt by a model that ``train_lm.py`` trained, byte by byte.

    python examples/generate.py --checkpoint=out/checkpoints/sparse
    python examples/generate.py --prompt="def main(" --count=400 --temperature=0.8

The text is written as it is made; the speed is on the last line. The caches follow
from the spec of the model: with a window they do not grow. ``--temperature=0`` takes
the most likely byte; with a higher one, ``--seed`` decides what is drawn.
"""

import codecs
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging
from flax import nnx
from lm.checkpoints import load_model
from lm.generation import Sampling, generate
from lm.model import LanguageModel, text_of
from rich.console import Console

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "out/checkpoints/sparse", "The folder of a run of train_lm.py."
)
_PROMPT = flags.DEFINE_string("prompt", "import ", "The text to continue.")
_FILE = flags.DEFINE_string("prompt_file", None, "A file to continue, instead of it.")
_COUNT = flags.DEFINE_integer("count", 200, "Bytes to write.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely byte.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from so many bytes only.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides what is drawn.")


def read_prompt() -> bytes:
    """The bytes of the prompt.

    Raises:
      ValueError: the text has a character that is no Unicode.
    """
    if _FILE.value is not None:
        return Path(_FILE.value).read_bytes()
    try:
        return _PROMPT.value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"--prompt={_PROMPT.value!r} cannot be written in UTF-8: pass raw bytes by "
            "--prompt_file"
        ) from error


def load(folder: str) -> tuple[LanguageModel, str]:
    """The model of the newest checkpoint, and the text of its spec."""
    spec, config, state = load_model(Path(folder))
    model = LanguageModel(config, spec, nnx.Rngs(0))
    nnx.update(model, state)
    model.eval()
    return model, text_of(spec)


def stream(made: Iterable[int]) -> Iterator[str]:
    """The text of bytes, each character as soon as it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in made:
        yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)


def run(console: Console) -> None:
    """Continues the prompt of the flags.

    Raises:
      ValueError, OSError: the flags, the prompt or the checkpoint do not fit.
      NotImplementedError: the spec of the model has no cache.
    """
    how = Sampling(_TEMPERATURE.value, _TOP_K.value, _SEED.value)
    prompt = read_prompt()
    model, spec = load(_CHECKPOINT.value)
    sys.stdout.write(prompt.decode(errors="replace"))
    times = []
    for text in stream(_timed(generate(model, prompt, _COUNT.value, how), times)):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    # The first byte waits for a program for the prompt, the second for one for a token.
    ready = times[1:]
    some = len(ready) > 1
    speed = f"{(len(ready) - 1) / (ready[-1] - ready[0]):,.0f}" if some else "-"
    console.print(
        f"{len(prompt):,} bytes of prompt, {len(times):,} written, {speed} tokens/s "
        f"once compiled: {spec}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _timed(made: Iterable[int], times: list[float]) -> Iterator[int]:
    """The same bytes; ``times`` gets the time of each."""
    for byte in made:
        times.append(time.perf_counter())
        yield byte


def main(argv: Sequence[str]) -> int:
    """Continues a prompt; prints a mistake of the caller without a trace."""
    logging.set_verbosity(logging.WARNING)
    console = Console(stderr=True)
    if len(argv) > 1:
        console.print(f"unknown arguments {argv[1:]}: every option is a --flag")
        return 2
    try:
        run(console)
    except (ValueError, OSError, NotImplementedError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    app.run(main)
