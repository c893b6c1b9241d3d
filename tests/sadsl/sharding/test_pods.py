"""Programs for pods that are not there send no more than the map needs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sadsl as sa
from lowering.targets.collectives import collectives, received
from lowering.targets.compiling import tpu_devices

C = sa.causal()
HEADS, DIM, WINDOW = 4, 128, 1024
HALO = (1, WINDOW, HEADS, DIM)


def compiled(spec, topology, n, gradient=False, **ids):
    """The program of a call whose sequence is dealt over all chips of a topology."""
    devices = np.array(tpu_devices(topology))
    mesh = Mesh(devices, ("seq",), axis_types=(AxisType.Auto,))
    dealt = NamedSharding(mesh, PartitionSpec(None, "seq"))
    shape = partial(jax.ShapeDtypeStruct, sharding=dealt)
    x = shape((1, n, HEADS, DIM), jnp.bfloat16)
    ids = {name: shape((1, n), jnp.int32) for name in ids}
    where = {"mesh": mesh, "sequence": "seq", "impl": "tpu"}

    def run(q, k, v, ids):
        return sa.sharded_attention(q, k, v, spec, **where, **ids)

    def loss(*args):
        return jnp.sum(run(*args).astype(jnp.float32))

    fn = jax.grad(loss, (0, 1, 2)) if gradient else run
    traced = jax.jit(fn).trace(x, x, x, ids)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def sent(program):
    """The kind and the shapes of all collectives of a program, sorted."""
    found = collectives(program.as_text())
    return sorted((each.kind, *sorted(set(each.shapes))) for each in found)


def permutes(count):
    return [("collective-permute", HALO)] * count


SMALL = "v5e:2x4", 32_768
PODS = [
    pytest.param("v5e:16x16", 1, marks=pytest.mark.slow),
    pytest.param("v5p:8x8x8", 14, marks=pytest.mark.slow),
]


def test_a_window_permutes_its_halo():
    program = compiled(C & sa.window(WINDOW), *SMALL, gradient=True)
    # Keys and values forward, their derivatives back.
    assert sent(program) == permutes(4)
    assert program.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize(("topology", "most"), PODS)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_window_over_a_million_tokens(topology, most, gradient):
    """``most``: MiB of temporaries on a chip; a chip has 12 or 6 MiB of arguments."""
    program = compiled(C & sa.window(WINDOW), topology, 2**20, gradient)
    assert sent(program) == permutes(4 if gradient else 2)
    assert program.memory_analysis().temp_size_in_bytes <= most * 2**20


@pytest.mark.slow
def test_sinks_are_one_small_sum_beside_the_halo():
    spec = C & (sa.window(WINDOW) | sa.sinks(4))
    (total, *_), *others = collectives_by_kind(compiled(spec, *SMALL))
    assert total.kind == "all-reduce"
    # A granule of keys, and of values.
    assert total.nbytes == 2 * 128 * HEADS * DIM * 2
    assert [x.kind for x, *_ in others] == ["collective-permute"]


def collectives_by_kind(program):
    found = {}
    for each in collectives(program.as_text()):
        found.setdefault(each.kind, []).append(each)
    return [found[kind] for kind in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_documents_in_a_window_send_their_ids_along(gradient):
    spec = C & sa.segments() & sa.window(WINDOW - 1)
    ids = dict.fromkeys(("q_segment_ids", "kv_segment_ids"))
    program = compiled(spec, *SMALL, gradient, **ids)
    of_ids = [("collective-permute", (1, WINDOW))]
    assert sent(program) == sorted(permutes(4 if gradient else 2) + of_ids)


@pytest.mark.slow
def test_a_state_travels_instead_of_keys():
    program = compiled(sa.linear("elu1"), *SMALL)
    of_keys = 2 * HEADS * SMALL[1] * DIM * 2
    assert received(program.as_text()) < of_keys / 32
    assert {kind for kind, *_ in sent(program)} == {"collective-permute"}
