"""Reading collectives, on programs of which every byte is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lowering.targets.collectives import Collective, collectives, received

MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
SIZE = 32 * 4  # bytes that a device has


def compiled(local):
    """The optimised program of ``local`` on 8 devices with 32 floats each."""
    where = PartitionSpec("x")
    fn = jax.shard_map(
        local, mesh=MESH, in_specs=where, out_specs=where, check_vma=False
    )
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    return jax.jit(fn).trace(x).lower().compile().as_text()


def ring(x):
    return jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])


def test_a_loop_counts_each_of_its_steps():
    hlo = compiled(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: ring(y) * 2, x))
    assert received(hlo) == 7 * SIZE
    assert [each.times for each in collectives(hlo)] == [7]


@pytest.mark.parametrize(
    ("local", "kind", "wanted"),
    [
        (ring, "collective-permute", SIZE),
        (lambda x: jax.lax.all_gather(x, "x").sum(0), "all-gather", 7 * SIZE),
        (lambda x: jax.lax.psum(x, "x"), "all-reduce", 2 * SIZE * 7 // 8),
        (
            lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
            "reduce-scatter", SIZE * 7 // 8,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True),
            "all-to-all", SIZE * 7 // 8,
        ),
    ],
)  # fmt: skip
def test_bytes_that_a_device_receives(local, kind, wanted):
    hlo = compiled(local)
    assert {each.kind for each in collectives(hlo)} == {kind}
    assert received(hlo) == wanted


def test_a_program_that_sends_nothing():
    assert received(compiled(jnp.sin)) == 0


def test_half_of_the_devices():
    groups = np.arange(8).reshape(2, 4).tolist()
    hlo = compiled(lambda x: jax.lax.psum(x, "x", axis_index_groups=groups))
    assert received(hlo) == 2 * SIZE * 3 // 4


# What libtpu writes, shortened.
TPU = """
%fused_computation.1 (a: bf16[1,8,128]) -> (bf16[1,8,128], bf16[1,32,128]) {
  %all-gather.9 = bf16[1,32,128]{2,1,0} all-gather(%a), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.7 = (bf16[1,8,128], u32[]) custom-call(%all-gather.9), custom_call_target="AsyncCollectiveStart"
}

%fused_computation.2 (a: bf16[1,8,128]) -> (bf16[1,8,128], bf16[1,32,128]) {
  %all-gather.10 = bf16[1,32,128]{2,1,0} all-gather(%a), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.8 = bf16[1,32,128] custom-call(%all-gather.10), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[1,8,128], b: pred[128]) -> bf16[1,32,128] {
  %start = (bf16[1,8,128], u32[]) fusion(%a), kind=kCustom, calls=%fused_computation.1
  %done = bf16[1,32,128] fusion(%start), kind=kCustom, calls=%fused_computation.2
  %send = (bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1}}
  %got = bf16[1,8,128]{2,1,0} collective-permute-done(%send)
  %sums = (bf16[4,128]{1,0}, pred[128]{0}) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
}
"""  # noqa: E501


def test_forms_of_libtpu():
    permute = Collective("collective-permute", ((1, 8, 128),), 2048, 2)
    gather = Collective("all-gather", ((1, 32, 128),), 8192, 4)
    reduce = Collective("all-reduce", ((4, 128), (128,)), 1024 + 128, 4)
    assert collectives(TPU) == (gather, permute, reduce)
    assert [each.received for each in collectives(TPU)] == [6144, 2048, 1728]


SCAN = """
%body (x: (s32[], f32[64])) -> (s32[], f32[64]) {
  %y = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%condition (x: (s32[], f32[64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(511), metadata={}
  %counter = s32[]{:T(128)} get-tuple-element(%x), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT, metadata={}
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %loop = (s32[], f32[64]) while(%a), condition=%condition, body=%body
}
"""


def test_a_scan_of_libtpu_counts_up_to_its_limit():
    (found,) = collectives(SCAN)
    assert (found.times, found.received) == (511, 511 * 256)


def test_a_loop_of_unknown_length():
    def local(x):
        more = jax.lax.psum(jnp.sum(x), "x")
        return jax.lax.while_loop(
            lambda y: jax.lax.psum(jnp.sum(y), "x") < more, lambda y: ring(y) * 2, x
        )

    with pytest.raises(ValueError, match="the program does not say how often it runs"):
        received(compiled(local))


@pytest.mark.parametrize(("over", "share"), [("'x'", 1 / 2), ("'x','y'", 7 / 8)])
def test_groups_that_name_axes_of_a_mesh(over, share):
    line = (
        "  %all_gather.6 = f32[16,8]{1,0} all-gather(%a), channel_id=1, "
        f"replica_groups=mesh['x'=2,'y'=4] {{{over}}}, dimensions={{0}}"
    )
    (found,) = collectives(f"ENTRY %main () -> f32[] {{\n{line}\n}}")
    assert found.received == 16 * 8 * 4 * share
