"""Compiling in another process: results, the cache, errors, time, what is left."""

import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowering.targets import chips, compiling, gpu, outside, store, tpu

ARGS = (jax.ShapeDtypeStruct((8, 128), jnp.float32),)
BUNDLES = "    0 LB: > { %1 = vmatmul.mubr.bf16.gmra.mxu0 %2 }\n"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Nothing outside of the test's folder is read or written."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


def child(monkeypatch, script):
    """Lets a script take the place of the process that compiles."""
    head = "import sys, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
    code = head + textwrap.dedent(script)
    monkeypatch.setattr(outside, "CHILD", (sys.executable, "-c", code))


def compiled(target="tpu-v6e", **options):
    low = compiling.lower_for(jnp.sin, ARGS, target)
    return outside.compile_outside(low, target, **options)


GOOD = f"""
    (folder / "program.hlo").write_text("HloModule sin")
    (folder / "result.json").write_text('{{"temporaries": 7}}')
    dump = folder / "dump" / "1-sadsl_forward.1-72-final_bundles.txt"
    dump.write_text({BUNDLES!r})
"""


def test_what_a_compiler_made_is_kept_by_content(monkeypatch):
    child(monkeypatch, GOOD)
    made = compiled()
    assert (made.hlo, made.memory) == ("HloModule sin", {"temporaries": 7})
    (kernel,) = tpu.kernels_of(made.files)
    assert (kernel.name, kernel.bundles) == ("sadsl_forward.1", 1)
    child(monkeypatch, "sys.exit(3)")
    assert compiled() == made
    # Another chip is another program, and so is another version of a compiler.
    with pytest.raises(RuntimeError, match="target='tpu-v5e': the compiler refuses"):
        compiled("tpu-v5e")
    monkeypatch.setattr(outside, "compiler_versions", lambda: {"libtpu": "0"})
    with pytest.raises(RuntimeError, match="it ended with code 3"):
        compiled()


def test_nothing_is_kept_if_the_cache_is_off(monkeypatch):
    monkeypatch.setenv(store.VARIABLE, "off")
    child(monkeypatch, GOOD)
    compiled()
    child(monkeypatch, "sys.exit(3)")
    with pytest.raises(RuntimeError, match="it ended with code 3"):
        compiled()


def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch):
    child(monkeypatch, "time.sleep(60)")
    with pytest.raises(RuntimeError, match=r"more than 0.2 s .*larger timeout="):
        compiled(timeout=0.2)


VMEM = (
    "INTERNAL: at many places\nRESOURCE_EXHAUSTED: Ran out of memory in memory space "
    "vmem. Used 17.88M of 16.00M vmem.\nAllocations: a long list"
)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (VMEM, r"'tpu-v6e'.*: Ran out of memory in memory space vmem. Used 17.88M of "
         r"16.00M vmem.: name smaller blocks, config=KernelConfig"),
        ("Mosaic failed to compile\nUNIMPLEMENTED: unsupported layout",
         r"UNIMPLEMENTED: unsupported layout: try other blocks"),
        ("something\nlibtpu could not describe 'v9'; `pip install libtpu` if it is",
         "libtpu could not describe .*install what is missing"),
    ],
)  # fmt: skip
def test_errors_say_what_matters(monkeypatch, said, message):
    script = f"(folder / 'error.txt').write_text({said!r}); sys.exit(1)"
    child(monkeypatch, script)
    with pytest.raises(RuntimeError, match=message) as error:
        compiled()
    assert "\n" not in str(error.value)


def test_a_gpu_needs_the_plugin(monkeypatch):
    monkeypatch.setattr(gpu, "has_plugin", lambda: False)
    with pytest.raises(RuntimeError, match="jax's CUDA plugin is not installed"):
        compiled("h100")


def test_the_environment_keeps_the_flags_of_the_caller(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine")
    found = outside.environment(Path("/dump"), chips.find("tpu-v5e"))
    assert found["LIBTPU_INIT_ARGS"].startswith("--mine --xla_jf_dump_to=/dump ")
    assert found["JAX_PLATFORMS"] == "cpu"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = outside.environment(Path("/dump"), chips.find("a100"))
    assert found["XLA_FLAGS"] == "--xla_dump_to=/dump"


def test_the_cache_has_a_place_and_a_bound(tmp_path, monkeypatch):
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert store.cache_folder() == tmp_path / "home" / "sadsl"
    texts = {
        name: np.random.default_rng(at).bytes(3000).hex()
        for at, name in enumerate("abc")
    }
    monkeypatch.setattr(store, "LIMIT", 10_000)
    for name, text in texts.items():
        store.save(name, text)
        if name == "b":
            assert store.load("a") == texts["a"]
    # "b" was read longest ago.
    assert [store.load(x) for x in "abc"] == [texts["a"], None, texts["c"]]
    (store.cache_folder() / "c.json.gz").write_bytes(b"half of a file")
    assert store.load("c") is None


@pytest.mark.slow
def test_a_real_compiler(monkeypatch):
    made = compiled("tpu-v5e")
    assert made.memory["arguments"] == 8 * 128 * 4
    assert "HloModule" in made.hlo
    assert made.files == {}
