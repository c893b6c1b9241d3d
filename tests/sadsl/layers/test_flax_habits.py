"""What users of Flax do with layers: annotate, rematerialise, take over weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sadsl as sa
from pallas_kernels.config import KernelConfig
from sadsl.layers import attention_fn
from sadsl.layers import linen as linen_layers
from sadsl.layers import nnx as nnx_layers
from sadsl.layers.rotary import Rotary
from sadsl.layers.transforms import HeadTransforms, OutputGate, QKNorm
from sadsl.layers.weights import from_flax, to_flax

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

BATCH, SEQ, FEATURES, HEADS = 2, 13, 24, 4
BY_HEAD = HeadTransforms(Rotary(4), QKNorm(), gate=OutputGate("head"))
SPEC = "softmax(causal() & window(5), sink=True)"


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@nnx.jit
def called(layer, *args, **options):
    return layer(*args, **options)


# --- sharding ---


def annotated(api):
    """Initializers with names, as Flax's own layers take them."""
    start = jax.nn.initializers.lecun_normal()
    name = api.with_partitioning
    return {
        "kernel_init": name(start, (None, "heads", None)),
        "out_kernel_init": name(start, ("heads", None, None)),
        "bias_init": name(jax.nn.initializers.normal(), ("heads", None)),
        "out_bias_init": jax.nn.initializers.normal(),
        "use_bias": True,
    }


def a_mesh():
    return jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))


HEAD_PARTS = {
    ("query", "kernel"): PartitionSpec(None, "heads", None),
    ("gate", "kernel"): PartitionSpec(),
    ("out", "kernel"): PartitionSpec("heads", None, None),
    ("key", "bias"): PartitionSpec("heads", None),
    ("query_ln", "scale"): PartitionSpec(),
    ("learned", "sink"): PartitionSpec(),
}


@pytest.mark.slow
def test_nnx_runs_with_sharded_heads():
    x, mesh = normal(BATCH, SEQ, FEATURES), a_mesh()

    def make():
        return nnx_layers.SparseAttention(
            SPEC,
            HEADS,
            FEATURES,
            transforms=BY_HEAD,
            rngs=nnx.Rngs(1),
            **annotated(nnx),
        )

    plain = nnx_layers.SparseAttention(
        SPEC, HEADS, FEATURES, transforms=BY_HEAD, use_bias=True, rngs=nnx.Rngs(1)
    )

    @nnx.jit
    def sharded():
        layer = make()
        state = nnx.state(layer)
        specs = nnx.get_partition_spec(state)
        nnx.update(layer, jax.lax.with_sharding_constraint(state, specs))
        return layer

    with jax.set_mesh(mesh):
        layer = sharded()
        found = called(layer, x)
    params = nnx.state(layer, nnx.Param)
    for (module, name), wanted in HEAD_PARTS.items():
        leaf = params[module][name][...]
        same = NamedSharding(mesh, wanted).is_equivalent_to(leaf.sharding, leaf.ndim)
        assert same, (module, name, leaf.sharding)
    nnx.update(plain, jax.tree.map(np.asarray, nnx.to_pure_dict(params)))
    np.testing.assert_allclose(found, called(plain, x), atol=2e-6)


def test_annotations_shard_the_heads():
    x = normal(BATCH, SEQ, FEATURES)
    layer = linen_layers.SparseAttention(
        SPEC, HEADS, transforms=BY_HEAD, **annotated(linen)
    )
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
    of_linen = linen.get_partition_spec(boxed)["params"]
    make = lambda: nnx.state(
        nnx_layers.SparseAttention(
            SPEC, HEADS, FEATURES, transforms=BY_HEAD, rngs=nnx.Rngs(1),
            **annotated(nnx),
        )
    )  # fmt: skip
    with jax.set_mesh(a_mesh()):
        of_nnx = nnx.get_partition_spec(nnx.eval_shape(make))
    for specs in (of_linen, nnx.to_pure_dict(of_nnx)):
        for (module, name), wanted in HEAD_PARTS.items():
            assert specs[module][name] == wanted, (module, name)


@pytest.mark.slow
def test_linen_runs_with_sharded_heads():
    x, mesh = normal(BATCH, SEQ, FEATURES), a_mesh()
    layer = linen_layers.SparseAttention(
        SPEC, HEADS, transforms=BY_HEAD, **annotated(linen)
    )
    boxed = layer.init(jax.random.key(0), x)
    specs, variables = linen.get_partition_spec(boxed)["params"], linen.unbox(boxed)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    placed = jax.tree.map(put, variables, {"params": specs})
    assert not placed["params"]["query"]["kernel"].sharding.is_fully_replicated
    found = jax.jit(layer.apply)(placed, x)
    np.testing.assert_allclose(found, jax.jit(layer.apply)(variables, x), atol=2e-6)


def test_what_else_is_annotated():
    """A gate by channel is; kernels of two axes, which a spec learns, are not."""
    spec, x = "gated(causal(), window(2))", normal(BATCH, SEQ, FEATURES)
    around = HeadTransforms(gate=OutputGate())
    layer = linen_layers.SparseAttention(
        spec, HEADS, transforms=around, **annotated(linen)
    )
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    of_linen = linen.get_partition_spec(shapes)["params"]
    make = lambda: nnx.state(
        nnx_layers.SparseAttention(
            spec, HEADS, FEATURES, transforms=around, rngs=nnx.Rngs(0),
            **annotated(nnx),
        )
    )  # fmt: skip
    with jax.set_mesh(a_mesh()):
        of_nnx = nnx.get_partition_spec(nnx.eval_shape(make))
    for found in (of_linen, nnx.to_pure_dict(of_nnx)):
        leaves = jax.tree.leaves(found["learned"])
        assert set(leaves) == {PartitionSpec()}
        assert len(leaves) == 2
        assert found["gate"]["kernel"] == PartitionSpec(None, "heads", None)


# --- rematerialisation ---


def count(jaxpr, *names):
    """How many equations have one of some primitives, in inner jaxprs too."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in names
        for inner in eqn.params.values():
            for x in inner if isinstance(inner, tuple | list) else (inner,):
                x = getattr(x, "jaxpr", x)
                total += count(x, *names) if hasattr(x, "eqns") else 0
    return total


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("impl", ["xla", "triton", "tpu"])
def test_named_residuals_spare_the_forward_kernel(api, impl):
    """A layer under remat, with the names of the kernel or one of the caller's."""
    x = normal(1, 128, FEATURES)
    options = {
        "head_dim": 64, "impl": impl, "config": KernelConfig(residual_name="context"),
        "transforms": HeadTransforms(Rotary(4), QKNorm()),
    }  # fmt: skip

    def kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        if api == "nnx":
            layer = nnx_layers.SparseAttention(
                "causal()", 2, FEATURES, rngs=nnx.Rngs(0), **options
            )
            graph, state = nnx.split(layer)

            @nnx.remat(policy=policy)
            def call(layer, x):
                return layer(x)

            run = lambda state: call(nnx.merge(graph, state), x)
        else:
            module = linen.remat(linen_layers.SparseAttention, policy=policy)(
                "causal()", 2, **options
            )
            make = linen_layers.SparseAttention("causal()", 2, **options).init
            state = jax.eval_shape(make, jax.random.key(0), x)
            run = lambda state: module.apply(state, x)
        slope = jax.grad(lambda state: jnp.sum(jnp.sin(run(state))))
        jaxpr = jax.make_jaxpr(slope)(state).jaxpr
        return (
            count(jaxpr, "pallas_call", "attention_derivative"),
            count(jaxpr, "dot_general"),
        )

    saved, repeated = kernels("attn_out", "attn_lse"), kernels("other")
    # Another forward pass is one kernel more, or products of the XLA path.
    assert repeated[0] > saved[0] or repeated[1] > saved[1]
    assert saved[0] == (1 if impl == "xla" else 3)
    assert kernels("context") == saved


# --- weights of Flax ---


@pytest.mark.sample(1)
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_weights_of_nnx_and_back(normalize_qk):
    x, kv = normal(BATCH, SEQ, FEATURES), normal(BATCH, 9, 10, seed=1)
    flax = nnx.MultiHeadAttention(
        HEADS, FEATURES, 32, 20, 2, 10, decode=False, normalize_qk=normalize_qk,
        bias_init=jax.nn.initializers.normal(), rngs=nnx.Rngs(3),
    )  # fmt: skip
    if normalize_qk:
        flax.query_ln.scale[...] = normal(8, seed=4)
    layer = from_flax(flax, "full()", kernel_init=jax.nn.initializers.zeros)
    found, wanted = called(layer, x, kv), called(flax, x, kv)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    back = to_flax(layer, decode=False)
    assert back.attention_fn is nnx.dot_product_attention
    assert back.normalize_qk == normalize_qk
    of = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, of(back), of(flax))
    jax.tree.map(np.testing.assert_array_equal, of(layer), of(flax))


@pytest.mark.sample(1)
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_weights_of_linen_and_back(normalize_qk):
    x = normal(BATCH, SEQ, FEATURES)
    flax = linen.MultiHeadDotProductAttention(
        HEADS, qkv_features=32, out_features=20, normalize_qk=normalize_qk
    )
    variables = flax.init(jax.random.key(0), x)
    layer = from_flax(flax, "full()")
    wanted = jax.jit(flax.apply)(variables, x)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), wanted, atol=2e-6)
    shapes = lambda m: jax.eval_shape(m.init, jax.random.key(0), x)
    assert shapes(layer) == shapes(flax)
    back = to_flax(layer)
    assert back.attention_fn is linen.dot_product_attention
    same = "num_heads", "qkv_features", "out_features", "normalize_qk", "use_bias"
    assert [getattr(back, n) for n in same] == [getattr(flax, n) for n in same]
    assert shapes(back) == shapes(flax)


def test_flax_layers_of_a_sparse_spec_keep_it():
    """On the way back the spec becomes the function of attention."""
    x = normal(BATCH, SEQ, FEATURES)
    layer = nnx_layers.SparseAttention(
        "causal() & window(3)", HEADS, FEATURES, rngs=nnx.Rngs(0)
    )
    flax = to_flax(layer, decode=False)
    assert flax.attention_fn == attention_fn("causal() & window(3)")
    np.testing.assert_allclose(called(flax, x), called(layer, x), atol=2e-6)
    flax = nnx.MultiHeadAttention(
        HEADS, FEATURES, decode=False, dropout_rate=0.5, deterministic=True,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    layer = from_flax(flax, SPEC, rngs=nnx.Rngs(1))
    assert (layer.dropout_rate, layer.deterministic) == (0.5, True)
    assert layer.term == sa.softmax(sa.causal() & sa.window(5), sink=True)


def flax_nnx(**options):
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **options)


def sparse(**options):
    spec = options.pop("spec", "causal()")
    return nnx_layers.SparseAttention(spec, 2, 8, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "full()"), TypeError,
         r"takes nnx.MultiHeadAttention .* not Linear"),
        (lambda: from_flax(flax_nnx(precision="highest"), "full()"), ValueError,
         r"precision='highest' has no counterpart"),
        (lambda: from_flax(flax_nnx(attention_fn=attention_fn("full()")), "full()"),
         ValueError, r"attention_fn=.* would be lost"),
        (lambda: to_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), TypeError,
         r"takes SparseAttention, not Linear"),
        (lambda: to_flax(sparse(transforms=HeadTransforms(Rotary(2)))), ValueError,
         r"transforms=HeadTransforms.* has no counterpart"),
        (lambda: to_flax(sparse(transform_qk=lambda q, k: (q, k))), ValueError,
         r"transform_qk=.* has no counterpart"),
        (lambda: to_flax(sparse(spec="softmax(causal(), sink=True)")), ValueError,
         r"the learned sink of .* has no counterpart"),
        (lambda: to_flax(sparse(use_bias=("query", "key", "out"))), ValueError,
         r"biases of some projections only"),
        (lambda: to_flax(linen_layers.SparseAttention("causal()", 2, 1)), ValueError,
         r"num_kv_heads=1: Linen's layer has as many heads"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
