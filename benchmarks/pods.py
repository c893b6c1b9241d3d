"""Bytes on the wire and memory of each chip of a pod, beside a ring and an all-gather.

    python benchmarks/pods.py > results/pods.txt
    python benchmarks/pods.py --chips 8 256 --maps window linear

A call over 1,048,576 tokens, 4 heads of 128 channels in bf16, its sequence dealt over
all chips. libtpu compiles it for pods that are not there, forward and gradient, each in
a process of its own. What a chip receives is read from the collectives of the optimised
program, and memory is what its compiler says. Nothing runs, and nothing is timed.

Ring attention and an all-gather move the same bytes: all keys and values but those that
the chip has, and with the gradient as much again for the derivatives (a ring that keeps
nothing moves the keys and values a second time too). A ring keeps two shards of keys
and values, an all-gather all of them.

Where a program takes longer to compile than ``--timeout`` seconds (0: none is
compiled), the bytes of the forward pass are those of ``sadsl.shard_plan``, and the row
says so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from timing import machine, table

import sadsl as sa
from lowering.targets.clients import memory_of
from lowering.targets.collectives import collectives
from lowering.targets.compiling import tpu_devices
from sadsl import catalog

N, SIDE = 1 << 20, 1 << 10
HEADS, DIM, ITEM = 4, 128, 2
OF_A_KEY = 2 * HEADS * DIM * ITEM  # bytes of its key and its value
TOPOLOGIES = {
    8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16", 512: "v5p:8x8x8"
}  # fmt: skip
C = sa.causal()
MAPS: dict[str, Any] = {
    "causal": C,
    "window": C & sa.window(1024),
    "window, sinks": C & (sa.window(1024) | sa.sinks(4)),
    "strided": C & (sa.window(127) | sa.strided(1024)),
    "neighbourhood": sa.Grid(row=SIDE, column=SIDE).neighborhood((13, 13)),
    "documents": C & sa.segments(),
    "documents, window": C & sa.segments() & sa.window(4095),
    "Combiner-Fixed": catalog.combiner_fixed(1024),
    "linear": sa.linear("elu1"),
}
IDS = "q_segment_ids", "kv_segment_ids"
MIB = 1 << 20
CHILD = "--compile"
# jaxlib cannot print all programs of libtpu, which writes the text itself.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false "
    "--xla_jf_dump_only_matching_hlo=true --xla_jf_dump_to_filter=TLP"
)


def compiled(name: str, chips: int, gradient: bool) -> jax.stages.Compiled:
    """The program of a map for a pod."""
    spec, devices = MAPS[name], np.array(tpu_devices(TOPOLOGIES[chips]))
    mesh = Mesh(devices, ("seq",), axis_types=(AxisType.Auto,))
    dealt = NamedSharding(mesh, PartitionSpec(None, "seq"))
    shape = partial(jax.ShapeDtypeStruct, sharding=dealt)
    x = shape((1, N, HEADS, DIM), jnp.bfloat16)
    has_ids = "documents" in name
    ids = {each: shape((1, N), jnp.int32) for each in IDS if has_ids}

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        where: dict[str, Any] = {"mesh": mesh, "sequence": "seq", "impl": "tpu"}
        return sa.sharded_attention(q, k, v, spec, **where, **ids)

    def loss(*args: Any) -> jax.Array:
        return jnp.sum(run(*args).astype(jnp.float32))

    fn = jax.grad(loss, (0, 1, 2)) if gradient else run
    traced = jax.jit(fn).trace(x, x, x, ids)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def child(dump: str, request: str) -> None:
    """Compiles one program and writes what it sends and keeps."""
    found = compiled(**json.loads(request))
    (text,) = (path.read_text() for path in Path(dump).glob("*-TLP-hlo.txt"))
    sent: dict[str, int] = {}
    for each in collectives(text):
        sent[each.kind] = sent.get(each.kind, 0) + each.received
    memory = memory_of(found.memory_analysis())
    print(json.dumps({"sent": sent, "memory": memory}))


def outside(timeout: float, **request: Any) -> dict[str, Any] | str:
    """What ``child`` finds in another process, or why it finds nothing."""
    if not timeout:
        return "not compiled"
    with TemporaryDirectory(prefix="pods-") as dump:
        return in_process(dump, timeout, json.dumps(request))


def in_process(dump: str, timeout: float, request: str) -> dict[str, Any] | str:
    """Runs ``child`` until it ends or its time is over."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet["LIBTPU_INIT_ARGS"] = FLAGS.format(dump)
    process = subprocess.Popen(
        [sys.executable, __file__, CHILD, dump, request],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **quiet},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"over {timeout:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        print(error[-4000:], file=sys.stderr)
        return "refused"
    return json.loads(said.splitlines()[-1])


def counted(name: str, chips: int) -> int:
    """Bytes that a chip receives forward by the plan; segment ids are left out."""
    sizes = {"num_heads": HEADS, "head_dim": DIM}
    return sa.shard_plan(MAPS[name], N, chips, **sizes).received


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """The lines of the table."""
    for count in args.chips:
        everything = N * OF_A_KEY * (count - 1) // count
        for name in args.maps:
            both = [
                outside(args.timeout, name=name, chips=count, gradient=gradient)
                for gradient in ((False,) if args.forward else (False, True))
            ]
            yield row(name, count, everything, both)


def row(name: str, count: int, everything: int, both: list[Any]) -> list[str]:
    """One line: what a chip receives and keeps, forward and with the gradient."""
    sent, kept, how = [], [], "HLO"
    for found in both:
        if isinstance(found, str):
            sent.append("-" if sent else mib(counted(name, count)))
            kept.append("-")
            how = f"plan ({found})"
        else:
            sent.append(mib(sum(found["sent"].values())))
            kept.append(mib(found["memory"]["temporaries"]))
    sent, kept = ([*x, "-"][:2] for x in (sent, kept))
    kinds = "" if isinstance(both[0], str) else ", ".join(sorted(both[0]["sent"]))
    ratio = f"{100 * float(sent[0].replace(',', '')) * MIB / everything:.2f}"
    return [name, str(count), *sent, ratio, *kept, how, kinds]


def mib(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / MIB:,.1f}"


HEAD = [
    "map", "chips", "forward MiB", "gradient MiB", "% of ring", "temporaries MiB",
    "with gradient", "from", "collectives",
]  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", type=int, nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--maps", nargs="+", default=list(MAPS), choices=list(MAPS))
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument(CHILD, nargs=2, help="(what it passes to its own processes)")
    args = parser.parse_args()
    if args.compile:
        child(*args.compile)
        return
    print(machine("jax", "libtpu"))
    peers = [
        [str(c), TOPOLOGIES[c], mib(3 * N // c * OF_A_KEY // 2),
         mib(N * OF_A_KEY * (c - 1) // c), mib(2 * N * OF_A_KEY * (c - 1) // c),
         mib(2 * N // c * OF_A_KEY), mib(N * OF_A_KEY)]
        for c in args.chips
    ]  # fmt: skip
    head = ["chips", "topology", "q, k, v MiB", "ring, gather forward MiB",
            "gradient MiB", "ring keeps MiB", "gather keeps MiB"]  # fmt: skip
    print(table(head, peers), end="\n\n")
    print(table(HEAD, list(rows(args))))


if __name__ == "__main__":
    main()
