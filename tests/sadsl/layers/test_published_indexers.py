"""Parts of layers with an indexer against the arrays of published models."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl.layers.indexed_loss import Attention, choice_loss
from sadsl.layers.indexers import PooledKeys
from sadsl.layers.norms import RowNorm
from sadsl.layers.rotary import Rotary

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

CAUSAL = sa.causal()


def side_by_side(*arrays):
    """Arrays as one input, and the linear maps that take each out of it."""
    widths = [x.shape[-1] for x in arrays]
    takes, first = [], 0
    for width in widths:
        takes.append(jnp.eye(sum(widths), dtype=jnp.float32)[:, first : first + width])
        first += width
    return jnp.concatenate([jnp.asarray(x) for x in arrays], axis=-1), takes


def test_keys_of_blocks_are_those_of_qwen4():
    """The mean of four raw keys, normed, then rotated at the first."""
    arrays, options = cases("qwen4_exp_qsa")["layer1"]
    keys = PooledKeys(
        options["ratio"], norm=RowNorm(eps=options["eps"], plus_one=True),
        rotary=Rotary(arrays["cos"].shape[-1], "half"),
    )  # fmt: skip
    x, (take,) = side_by_side(arrays["idx_raw_k"])
    params = {"ik": take, "ik_norm": jnp.asarray(arrays["idx_norm"])}
    assert params.keys() == keys.parameters("ik", 8, 8).keys()
    found = jax.jit(partial(keys, "ik"))(params, x)
    assert_agrees(found, arrays["idx_block_k"], "keys of blocks")


def test_keys_of_pools_are_those_of_glm_5_next():
    arrays, options = cases("glm5_next_kpool")["layer1"]
    keys = PooledKeys(options["pool"], gate=True)
    x, (take, gate) = side_by_side(arrays["idx_k"], arrays["pool_gate"])
    place = jnp.asarray(arrays["pool_bias"])
    params = {"ik": take, "ik_gate": gate, "ik_place": place}
    assert params.keys() == keys.parameters("ik", 16, 8).keys()
    found = jax.jit(partial(keys, "ik"))(params, x)
    assert_agrees(found, arrays["pool_keys"], "keys of pools")


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["csa", "hca", "csa_index_keys"])
def test_entries_are_those_of_deepseek_v4(case):
    arrays, options = cases("deepseek_v4_compress")[case]
    rotary = Rotary(4, "interleaved", "last", 160000.0)
    keys = PooledKeys(
        options["ratio"], gate=True, overlap=options["overlap"],
        norm=RowNorm(eps=options["eps"]), rotary=rotary,
    )  # fmt: skip
    x, (take, gate) = side_by_side(arrays["kv"], arrays["gate"])
    params = {
        "entry": take,
        "entry_gate": gate,
        "entry_place": jnp.asarray(arrays["position_bias"]),
        "entry_norm": jnp.asarray(arrays["norm"]),
    }
    wanted = keys.parameters("entry", x.shape[-1], arrays["norm"].shape[0])
    assert {n: y.shape for n, y in params.items()} == {
        n: y.shape for n, y in wanted.items()
    }
    found = jax.jit(partial(keys, "entry"))(params, x)
    assert_agrees(found, arrays["out"], case)


def test_rotation_is_taken_off_as_in_deepseek_v4():
    arrays, _ = cases("deepseek_v4")["sliding"]
    rotary = Rotary(4, "interleaved", "last")
    at = jnp.arange(arrays["out"].shape[1])
    found = jax.jit(lambda x: rotary(x, at, {}, back=True))(arrays["out"])
    assert_agrees(found, arrays["derotated"], "derotated")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense_warm_up", "sparse_training"])
def test_the_loss_of_cells_is_that_of_keys(case):
    arrays, options = cases("dsa_indexer_loss")[case]
    q, k = jnp.asarray(arrays["q"]), jnp.asarray(arrays["k"])
    score = sa.dot("iq", "ik", "iw", "relu", options["idx_scale"])
    choice = sa.topk(
        options["k"], block=1, block_q=1, score=score, scope="shared", eligible=CAUSAL
    )
    index = {
        "iq": jnp.asarray(arrays["idx_q"]),
        "ik": jnp.asarray(arrays["idx_k"])[:, :, None],
        "iw": jnp.asarray(arrays["idx_w"]),
    }
    spec, listed, made = CAUSAL, None, {}
    if options["sparse"]:
        spec = CAUSAL & choice
        made = sa.select(spec, q, k, operands=index, lists=True)
        (listed,) = made.values()
    _, lse = sa.attention(
        q, k, k, spec, operands=made, sm_scale=options["scale"], return_lse=True,
        impl="reference",
    )  # fmt: skip
    call = Attention(q, k, lse, options["scale"])

    def loss(index):
        return choice_loss(choice, index, call, listed)

    found, gradients = jax.jit(jax.value_and_grad(loss))(index)
    assert_agrees(found, arrays["loss"].reshape(()), "loss")
    assert_agrees(gradients["iq"], arrays["d_idx_q"], "d_idx_q")
    assert_agrees(gradients["ik"][:, :, 0], arrays["d_idx_k"], "d_idx_k")
    assert_agrees(gradients["iw"], arrays["d_idx_w"], "d_idx_w")
