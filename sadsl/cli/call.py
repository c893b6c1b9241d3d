"""The spec, the arrays and the lowered call that the words and flags describe."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from pallas_kernels.config import KernelConfig
from sadsl.analysis.lowered import Lowered, lower
from sadsl.terms.base import Spec
from sadsl.text.files import from_json
from sadsl.text.parsing import CALLS, parse
from sadsl.text.specs import any_term

SEGMENT_IDS = "q_segment_ids", "kv_segment_ids"
ARRAY = re.compile(r"(?P<name>.+)=(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d, ]*)\]")
UNKNOWN = re.compile(r"(?P<what>.* unknown name '(?P<name>\w+)'); known are ")


def read_spec(word: str) -> Spec:
    """The spec of a word of the command line: text, or ``@`` and the name of a file.

    Raises:
      ValueError: the text is no spec, or the file cannot be read.
    """
    text = _content(Path(word[1:])) if word.startswith("@") else word
    try:
        return from_json(text, word) if text.lstrip().startswith("{") else parse(text)
    except ValueError as error:
        # The other lines repeat the text, which the user has just written.
        raise ValueError(_with_near_name(str(error).splitlines()[0])) from error


def _with_near_name(line: str) -> str:
    """``line``, with the nearest known name instead of the list of all names."""
    match = UNKNOWN.match(line)
    if match is None:
        return line
    near = get_close_matches(match["name"], CALLS, n=1)
    return f"{match['what']}" + (f": did you mean {near[0]!r}?" if near else "")


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {str(path)!r} cannot be read: {error}") from error


def kv_seq_len(asked: flags.FlagValues) -> int:
    """The number of keys: as many as queries, unless a flag says another."""
    return asked.kv_seq_len or asked.seq_len


def arrays(asked: flags.FlagValues) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of q, k and v."""
    kv_heads = asked.kv_heads or asked.heads
    q = asked.batch, asked.seq_len, asked.heads, asked.head_dim
    kv = asked.batch, kv_seq_len(asked), kv_heads, asked.head_dim
    return tuple(jax.ShapeDtypeStruct(x, jnp.dtype(asked.dtype)) for x in (q, kv, kv))


def config(asked: flags.FlagValues) -> KernelConfig:
    """The block sizes that the flags name."""
    return KernelConfig(block_q=asked.block_q, block_kv=asked.block_kv)


def segment_lengths(spec: Spec, asked: flags.FlagValues) -> dict[str, int]:
    """The lengths of the segment ids that the spec reads, by name."""
    lengths = dict(zip(SEGMENT_IDS, (asked.seq_len, kv_seq_len(asked)), strict=True))
    term = any_term(spec)
    return {name: n for name, n in lengths.items() if term.reads(name)}


def lowered(spec: Spec, asked: flags.FlagValues, *, gradient: bool = False) -> Lowered:
    """The call lowered for the target that is asked for.

    Raises:
      ValueError, NotImplementedError: as ``sadsl.lower``.
    """
    if asked.target and not os.environ.get("JAX_PLATFORMS"):
        # Nothing runs, and starting a TPU that is not there prints warnings.
        jax.config.update("jax_platforms", "cpu")
    q, k, v = arrays(asked)
    operands: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((asked.batch, n), jnp.int32)
        for name, n in segment_lengths(spec, asked).items()
    }
    operands |= dict(map(_described, asked.array or ()))
    return lower(
        spec, q, k, v,
        target=asked.target, operands=operands, q_offset=asked.q_offset,
        config=config(asked), gradient=gradient,
    )  # fmt: skip


def _described(text: str) -> tuple[str, jax.ShapeDtypeStruct]:
    """The name and the shape of a run-time array, from ``name=float32[8, 64]``."""
    match = ARRAY.fullmatch(text)
    if match is None:
        raise ValueError(f"--array={text}: must look like scores=float32[8,64]")
    try:
        dtype = jnp.dtype(match["dtype"])
    except TypeError as error:
        raise ValueError(f"--array={text}: {error}") from error
    shape = tuple(int(n) for n in match["shape"].split(",") if n.strip())
    return match["name"], jax.ShapeDtypeStruct(shape, dtype)
