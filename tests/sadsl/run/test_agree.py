"""Processes compare their specs and options: what each one hears."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import EXAMPLES

import sadsl as sa
from sadsl.run.agree import MOST_SHOWN, check_agreement, disagreement

SPEC = sa.causal() & (sa.window(8) | sa.sinks(2))


def test_equal_specs_have_equal_hashes():
    mine = check_agreement(SPEC, {"seed": 0, "sizes": (2, 3)})
    assert len(mine) == 64
    assert mine == check_agreement(repr(SPEC), {"sizes": (2, 3), "seed": 0})
    assert mine == check_agreement(sa.softmax(SPEC), {"seed": 0, "sizes": (2, 3)})
    others = [
        check_agreement(SPEC),
        check_agreement(SPEC, {"seed": 1, "sizes": (2, 3)}),
        check_agreement(SPEC, {"seed": "0", "sizes": (2, 3)}),
        check_agreement(sa.causal(), {"seed": 0, "sizes": (2, 3)}),
        check_agreement(None, {"seed": 0, "sizes": (2, 3)}),
    ]
    assert len({mine, *others}) == 6


def test_arrays_are_compared_by_all_that_they_hold():
    x = np.arange(4000, dtype=np.float32)
    mine = check_agreement(SPEC, {"bias": x})
    assert mine == check_agreement(SPEC, {"bias": jnp.asarray(x)})
    changed = x.copy()
    changed[2000] = 0  # not in its repr
    others = [changed, x.reshape(40, 100), x.astype(np.int32), x[:-1]]
    assert len({mine, *(check_agreement(SPEC, {"bias": y}) for y in others)}) == 5


def test_texts_that_no_other_process_has_are_refused():
    with pytest.raises(ValueError, match=r"kernel=<.*> holds the address of an object"):
        check_agreement(SPEC, {"kernel": test_equal_specs_have_equal_hashes})
    with pytest.raises(ValueError, match="options='spec' is the name of the spec"):
        check_agreement(SPEC, {"spec": "causal()"})
    with pytest.raises(TypeError, match="must be an index map"):
        check_agreement(3)


def test_the_message_says_who_has_what():
    records = [{"spec": "causal()", "seed": "0"} for _ in range(5)]
    records[1]["spec"] = records[4]["spec"] = "full()"
    records[2]["spec"] = "window(3)"
    records[3] = {**records[3], "mesh": "x" * (MOST_SHOWN + 7)}
    for rank, record in enumerate(records):
        record["long"] = "a" * 400 + "b" * rank + "c" * (8 - rank)
    assert disagreement(records).splitlines() == [
        "the processes of this computation disagree:",
        "  long: "
        + "; ".join(
            f"... {'a' * 100}{'b' * rank}{'c' * (8 - rank)} in process {rank}"
            for rank in range(5)
        ),
        "  mesh: nothing in processes 0, 1, 2 and 4; "
        f"{'x' * MOST_SHOWN} ... in process 3",
        "  spec: causal() in processes 0 and 3; full() in processes 1 and 4; "
        "window(3) in process 2",
        "start every process with the same spec and the same options",
    ]


# A process takes the window of its rank, and the text of another length with it.
PROCESS = f"""
import sys, jax
sys.path.insert(0, {str(EXAMPLES)!r})
from lm import processes
processes.join()
import sadsl as sa
from sadsl.run.agree import check_agreement
rank = jax.process_index()
print("hash", check_agreement(sa.causal(), {{"seed": 0}}))
try:
    check_agreement(sa.causal() & sa.window(5 * 20 ** rank), {{"seed": 0}})
except ValueError as error:
    print("refused", repr(str(error)))
"""


def test_every_process_hears_of_a_disagreement():
    flags = "--processes=2", "--devices_each=2", "--heartbeat_timeout=10"
    command = [sys.executable, "-c", PROCESS]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "launch.py", *flags, "--", *command],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    mine = check_agreement(sa.causal(), {"seed": 0})
    text = disagreement(
        [
            {"spec": f"softmax(causal() & window({size}))", "seed": "0"}
            for size in (5, 100)
        ]
    )
    for rank in range(2):
        assert f"[{rank}] hash {mine}" in lines
        assert f"[{rank}] refused {text!r}" in lines
    assert "window(5)) in process 0" in text
    assert "window(100)) in process 1" in text
