"""``examples/generate.py``: a prompt continued by caches equals the whole pass."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm.generation import Sampling, checked, generate
from lm.model import LanguageModel, ModelConfig, routing_for
from train_runs import EXAMPLES, TINY, write_texts

import sadsl as sa

CONFIG = ModelConfig(2, 2, 1, 16, 32)
SPEC = sa.causal() & (sa.window(8) | sa.sinks(2))


def model_of(spec=SPEC):
    """A model whose head is not zero, so that bytes differ in their logits."""
    model = LanguageModel(CONFIG, spec, nnx.Rngs(0))
    noise = iter(jax.random.split(jax.random.key(1), 99))

    def moved(x):
        return x + 0.3 * jax.random.normal(next(noise), x.shape, x.dtype)

    nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.Param)))
    return model


def test_greedy_bytes_are_those_of_the_whole_pass():
    model, prompt = model_of(), list(b"while True: return")
    made = list(generate(model, prompt, 12, Sampling()))
    whole = jnp.asarray([prompt + made], jnp.int32)
    wanted = np.asarray(model(whole))[0, len(prompt) - 1 : -1].argmax(axis=-1)
    assert made == wanted.tolist()
    assert len(set(made)) > 2


def test_a_seed_decides_what_is_drawn():
    model, prompt = model_of(), list(b"yield ")

    def drawn(seed, top_k=None):
        how = Sampling(temperature=1.5, top_k=top_k, seed=seed)
        return list(generate(model, prompt, 12, how))

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0, top_k=1) == list(generate(model, prompt, 12, Sampling()))


def test_what_is_refused():
    with pytest.raises(ValueError, match="token 1 of the prompt is 256"):
        checked([3, 256])
    with pytest.raises(ValueError, match="empty"):
        checked(b"")
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampling(temperature=-1.0)
    with pytest.raises(ValueError, match="top_k=0"):
        Sampling(top_k=0)
    with pytest.raises(ValueError, match="count=0"):
        next(generate(model_of(), [1], 0, Sampling()))
    routed = LanguageModel(ModelConfig(1, 2, 2, 16, 32), routing_for(64), nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="no cache"):
        next(generate(routed, [1], 1, Sampling()))


@pytest.mark.slow
def test_the_script_continues_a_prompt_from_a_checkpoint(tmp_path):
    """It trains a little, then writes text as it is made, and its speed."""

    def run(script, *flags):
        command = [sys.executable, str(EXAMPLES / script), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    data = write_texts(tmp_path / "data")
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    out = tmp_path / "out"
    trained = run("train_lm.py", f"--data={data}", f"--out={out}", *sizes)
    assert trained.returncode == 0, trained.stderr
    folder = f"--checkpoint={out / 'checkpoints' / 'sparse'}"
    made = run("generate.py", folder, "--prompt=while ", "--count=20")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("while ")
    assert "20 written" in made.stderr
    assert "tokens/s" in made.stderr
    again = run("generate.py", folder, "--prompt=while ", "--count=20")
    assert again.stdout == made.stdout
    missing = run("generate.py", f"--checkpoint={tmp_path}/nothing")
    assert missing.returncode == 2
    assert "no checkpoint" in missing.stderr
