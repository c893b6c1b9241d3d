"""Runs the attention tests of Flax's own source distribution on ``attention_fn``.

    python tests/clients/flax_suite.py

Downloads the source distribution of the Flax that is installed, swaps its dense
attention function (``flax_swapped``), and runs its tests. Fails if a test fails that is
not in ``EXPECTED``, or passes that is.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FILES = "tests/nnx/nn/attention_test.py", "tests/linen/linen_attention_test.py"
SOWN = "asks for the array of weights, which no kernel stores"
TEXT = "expects the words of Flax's own error"
EINSUM = "replaces the products, which run inside of the kernels"
# Tests that cannot pass, and why.
EXPECTED = {
    "test_causal_mask_equivalence": SOWN,
    "test_multihead_sow_attention_weights": SOWN,
    "test_gqa_parity_with_jax": SOWN,
    "test_mixed_precision_multihead_attention": SOWN,
    "test_invalid_shapes": TEXT,
    "test_dot_product_attention_precision_and_einsum_override": EINSUM,
    "test_dot_product_attention_specify_einsums_together": EINSUM,
    "test_dtype_infer": "attends in complex numbers, which sadsl does not",
}


def source(folder: Path) -> Path:
    """Downloads and unpacks Flax's source distribution."""
    name = f"flax=={version('flax')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-binary", "flax", "-d", folder, name], check=True)
    (archive,) = folder.glob("flax-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def main() -> int:
    """Runs the tests; 0 if exactly the expected ones fail."""
    with tempfile.TemporaryDirectory() as folder:
        where = source(Path(folder))
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "flax_swapped", "-rf", *FILES],
            cwd=where, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    failed = re.findall(r"^FAILED \S+::(test_\w+?)\d*(?: -.*)?$", found.stdout, re.M)
    print(found.stdout.strip().splitlines()[-1])
    for name, why in EXPECTED.items():
        print(f"{failed.count(name):>3} failed  {name}: {why}")
    surprising = sorted(set(failed) ^ set(EXPECTED))
    if surprising or not failed:
        print(f"Not as expected: {surprising}", found.stdout, found.stderr, sep="\n")
    return int(bool(surprising) or not failed)


if __name__ == "__main__":
    sys.exit(main())
