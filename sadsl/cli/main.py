"""``main``: finds the command in the first word, runs it, and prints what it found.

Bad input gives one line on stderr and the exit code 2, a tool that is missing or that
fails one line and 1.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from absl import flags

from sadsl.cli import commands
from sadsl.cli.bench import bench
from sadsl.cli.call import read_spec
from sadsl.cli.command import Command, CommandFlag
from sadsl.cli.doctor import doctor
from sadsl.cli.show import show

DTYPES = "float32", "bfloat16", "float16"
WINDOW = '"causal() & (window(512) | sinks(4))"'


def _lengths(seq_len: int) -> tuple[CommandFlag, ...]:
    return (
        CommandFlag("seq_len", "queries", default=seq_len),
        CommandFlag("kv_seq_len", "keys; as many as queries if not given"),
    )


def _sizes(seq_len: int, heads: int, dtype: str) -> tuple[CommandFlag, ...]:
    """The flags for q, k, v and block sizes."""
    return (
        *_lengths(seq_len),
        CommandFlag("heads", "heads of queries", default=heads),
        CommandFlag("kv_heads", "heads of keys; as many as of queries if not given"),
        CommandFlag("head_dim", "numbers of a head", default=64),
        CommandFlag("batch", "sequences", default=1),
        CommandFlag("dtype", ", ".join(DTYPES), "choice", dtype, choices=DTYPES),
        CommandFlag("block_q", "queries of a block; the compiler chooses if not given"),
        CommandFlag("block_kv", "keys of a block; the compiler chooses if not given"),
    )


Q_OFFSET = CommandFlag("q_offset", "position of the first query", default=0, least=0)
TARGET = (
    CommandFlag(
        "target",
        "a chip that `sadsl doctor` lists; this machine's if not given",
        "text",
        shown="CHIP",
    ),
    CommandFlag(
        "array",
        "a run-time array of the spec, as scores=float32[8,64]; repeatable",
        "texts",
        shown="ARRAY",
    ),
)
HEADS = CommandFlag("heads", "heads", default=1)

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "explain",
            "Counts blocks, FLOPs and bytes, and predicts the time on each chip.",
            commands.explain,
            f"{WINDOW} --target tpu-v6e",
            (*_sizes(4096, 8, "bfloat16"), Q_OFFSET, *TARGET),
        ),
        Command(
            "show",
            "Draws which keys each query sees.",
            show,
            '"causal() & (window(4) | sinks(2))" --png pattern.png',
            (
                *_lengths(24),
                HEADS,
                CommandFlag("head", "which of the heads", default=0, least=0),
                CommandFlag("png", "also write a picture to this file", "text",
                            shown="FILE"),
            ),
        ),
        Command(
            "asm",
            "Prints the lowest-level code that the kernels are compiled to.",
            commands.asm,
            f"{WINDOW} --target h100",
            (
                *_sizes(4096, 8, "bfloat16"),
                Q_OFFSET,
                *TARGET,
                CommandFlag("gradient", "compile the gradients", "switch"),
                CommandFlag("report", "print the compiler's figures instead",
                            "switch"),
            ),
        ),
        Command(
            "properties",
            "Finds causality, coverage, hops, the decoding cache and growth.",
            commands.properties,
            WINDOW,
            (CommandFlag("seq_len", "positions", default=4096), HEADS),
        ),
        Command(
            "plan",
            "Counts the blocks that kernels visit, and the pairs.",
            commands.plan,
            f"{WINDOW} --seq_len 1000000",
            (
                *_lengths(4096),
                HEADS,
                CommandFlag("block_q", "queries of a block", default=128),
                CommandFlag("block_kv", "keys of a block", default=128),
                Q_OFFSET,
                CommandFlag("exact", "decide every block, whatever it costs", "switch"),
                CommandFlag("given_order", "keep the order of positions", "switch"),
            ),
        ),
        Command(
            "bench",
            "Times a call on this machine beside jax.nn.dot_product_attention.",
            bench,
            f"{WINDOW} --seq_len 4096",
            (
                *_sizes(2048, 4, "float32"),
                CommandFlag("rounds", "rounds in which the two take turns", default=5),
            ),
        ),
        Command(
            "doctor",
            "Lists versions, tools, devices and targets, and what is missing.",
            doctor,
            "",
            takes_spec=False,
        ),
    )
}  # fmt: skip
HELP = {"--help", "-h"}
# As shells have it: 128, and 2 for the signal.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, without the name of the program; returns the exit code."""
    args = sys.argv[1:] if argv is None else list(argv)
    name = args[0] if args and args[0] in COMMANDS else ""
    try:
        print(_output(args), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (flags.Error, ValueError, NotImplementedError, OSError) as error:
        return _failed(name, error, 2)
    except RuntimeError as error:
        return _failed(name, error, 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _failed(name: str, error: Exception, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"{f'sadsl {name}'.strip()}: {line}", file=sys.stderr)
    return code


def _output(args: list[str]) -> str:
    """What a command line prints."""
    known = ", ".join(COMMANDS)
    if not args:
        raise ValueError(f"no command: write one of {known}, or --help")
    word, *rest = args
    if word in HELP:
        return _help()
    if word == "--version":
        return version("sadsl")
    if word not in COMMANDS:
        raise ValueError(f"unknown command {word!r}: write one of {known}, or --help")
    command = COMMANDS[word]
    if HELP & set(rest):
        return command.help
    asked, words = command.parse(rest)
    found = command.run(asked, *_specs(command, words))
    if asked.json:
        return json.dumps(found.values, indent=2)
    return found.text


def _specs(command: Command, words: list[str]) -> list[Any]:
    """The spec in a list, or nothing for a command without one."""
    wanted = int(command.takes_spec)
    if len(words) == wanted:
        return [read_spec(word) for word in words]
    if len(words) < wanted:
        raise ValueError("no SPEC: write one, such as 'causal() & window(512)'")
    raise ValueError(
        f"unexpected {words[wanted]!r}: "
        + ("write the SPEC in quotes" if wanted else "this command takes flags only")
    )


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "Usage: sadsl COMMAND [SPEC] [flags]",
        "",
        "A sparse-attention compiler: what a spec means, costs and compiles to.",
        "",
        *(f"  {c.name:<{width}}  {c.summary}" for c in COMMANDS.values()),
        "",
        "`sadsl COMMAND --help` lists the flags of a command.",
    ]
    return "\n".join(lines)
