"""Counts what the kernels really do, by calls to the host from inside them.

While kernels are traced, the functions that make up a tile are replaced by ones that
also report to the host each time they run. Nothing is read from the plan. Each ``run``
has counts of its own.
"""

from collections import Counter
from contextlib import ExitStack
from importlib import import_module
from threading import Lock
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from lowering import pipeline
from lowering.expr.kernel_test import KernelPredicate
from lowering.run_time.vectors import vectors_of
from pallas_kernels import dispatch, softmax
from pallas_kernels.call import Call, Inputs, Vectors

# Module and function of each Pallas kernel, by the kernel's name.
BODIES = {
    "tpu": {
        "forward": ("forward", "_kernel"),
        "dq": ("backward", "_dq_kernel"),
        "dkv": ("backward", "_dkv_kernel"),
    },
    "triton": {
        "forward": ("forward", "forward_kernel"),
        "dq": ("backward", "dq_kernel"),
        "dkv": ("backward", "dkv_kernel"),
    },
}


class Executed:
    """Totals for each kernel: tiles, full and partial ones, FLOPs, streamed bytes."""

    def __init__(self):
        self.counts = Counter()
        self.lock = Lock()
        self.kernel = None  # the one that is being traced

    def report(self, what, amount=1, weight=1):
        """Adds ``amount * weight`` each time this place of the kernel runs."""
        key = self.kernel, what

        def add(amount):
            with self.lock:  # the runtime calls from several threads
                self.counts[key] += int(amount) * weight

        jax.debug.callback(add, amount)

    def streamed(self, kernel):
        """Bytes that the kernel fetches for the blocks it visits; on TPUs only."""
        return self.counts[kernel, "streamed"]

    def of(self, kernel):
        """Full tiles, partial tiles, padded tiles, and FLOPs."""
        full, partial, tiles, flops = (
            self.counts[kernel, x] for x in ("full", "partial", "tiles", "flops")
        )
        return full, partial, tiles - full - partial, flops


def run(stages, inputs, tiles, impl):
    """Runs the kernels of lowered stages, forward and backward, on ``inputs``.

    ``inputs`` are q, k, v with heads first, of the lengths that the stages plan for.
    Returns the counts, and the plans.
    """
    q, k, _ = inputs
    masks = pipeline.masks(stages, tiles)
    program = stages["hoist"]
    vectors = Vectors(
        vectors_of(program.q_vectors, q.shape[2], q.shape[1], {}),
        vectors_of(program.kv_vectors, k.shape[2], q.shape[1], {}),
    )
    call = Call(KernelPredicate(program.maps), 1.0, tiles, interpret=impl != "xla")

    @jax.jit
    def both(inputs):
        def forward(inputs):
            return dispatch.attend(inputs, vectors, masks, call, impl=impl)

        out, pull = jax.vjp(forward, inputs)
        return pull(jax.tree.map(jnp.ones_like, out))

    found = Executed()
    with ExitStack() as stack:
        for owner, name, function in (_xla if impl == "xla" else _pallas)(found, impl):
            stack.enter_context(mock.patch.object(owner, name, function))
        jax.block_until_ready(both(Inputs(*inputs)))
    jax.effects_barrier()
    return found, masks


def _pallas(found, impl):
    dot, fold, mask, gradient = (
        getattr(softmax, x) for x in ("dot", "fold", "mask", "score_gradient")
    )
    make_async_copy = pltpu.make_async_copy

    def counted_dot(a, b, *, contract):
        out = dot(a, b, contract=contract)
        found.report("flops", 2 * out.size * a.shape[contract[0]])
        return out

    def counted_fold(carry, s, v, *rest):
        found.report("tiles")
        found.report("full")
        return fold(carry, s, v, *rest)

    def counted_mask(s, allowed):
        # A tile that is masked before it is folded is partial, not full.
        if allowed is not None:
            found.report("full", -1)
            found.report("partial")
        return mask(s, allowed)

    def counted_gradient(*args, **options):
        found.report("tiles")
        found.report("full")
        return gradient(*args, **options)

    def naming(kernel, body):
        def traced(*args, **options):
            found.kernel = kernel
            return body(*args, **options)

        return traced

    def counted_copy(source, target, semaphore):
        copy = make_async_copy(source, target, semaphore)
        start = copy.start

        def counted_start():
            found.report("streamed", int(np.prod(target.shape)) * target.dtype.itemsize)
            start()

        # The descriptor is a frozen dataclass.
        object.__setattr__(copy, "start", counted_start)
        return copy

    yield pltpu, "make_async_copy", counted_copy
    yield softmax, "dot", counted_dot
    yield softmax, "fold", counted_fold
    yield softmax, "mask", counted_mask
    yield softmax, "score_gradient", counted_gradient
    for kernel, (module, name) in BODIES[impl].items():
        owner = import_module(f"pallas_kernels.{impl}.{module}")
        yield owner, name, naming(kernel, getattr(owner, name))


def _xla(found, impl):
    tile, rows, forward, backward = (
        import_module(f"pallas_kernels.{impl}.{x}")
        for x in ("tile", "rows", "forward", "backward")
    )
    batched_dot, scores, fold_tiles = tile.batched_dot, tile.scores, forward.fold_tiles
    real_keys, real = rows.real_keys, tile.Pairs.real
    area = heads = 0

    def counted_dot(a, b, *, contract):
        out = batched_dot(a, b, contract=contract)
        found.report("flops", 2 * out.size * a.shape[2 + contract[0]])
        return out

    def counted_fold(unit, carry, s, v, *rest):
        # One product in each fold, inside two vmaps.
        found.report("flops", 2 * s.size * v.shape[-1])
        return fold_tiles(unit, carry, s, v, *rest)

    def counted_scores(q, k, *rest):
        found.report("tiles", int(np.prod(q.shape[:3])) * k.shape[2] // area)
        return scores(q, k, *rest)

    def counted_full(count, *rest):
        found.report("full", count, heads)
        return real_keys(count, *rest)

    def counted_partial(self, row, block, count):
        found.report("partial", count, heads)
        return real(self, row, block, count)

    def naming(kernel, body):
        def traced(inputs, *rest):
            nonlocal area, heads
            lists, group = rest[-3:-1]
            plan = getattr(lists, kernel, lists)
            found.kernel, area = kernel, plan.block_q * plan.block_kv
            heads = inputs.q.shape[0] * len(group.q_heads)
            return body(inputs, *rest)

        return traced

    yield tile, "batched_dot", counted_dot
    yield tile, "scores", counted_scores
    yield forward, "fold_tiles", counted_fold
    yield rows, "real_keys", counted_full
    yield tile.Pairs, "real", counted_partial
    for kernel, owner in (("forward", forward), ("backward", backward)):
        yield owner, f"_{kernel}", naming(kernel, getattr(owner, f"_{kernel}"))
