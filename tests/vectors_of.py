"""Reads ``tests/vectors``: what the code of published models gives; see its README."""

import json
from functools import cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "vectors"


@cache
def cases(name):
    """The cases of a file: each name, with its arrays by name and its options."""
    with np.load(FOLDER / f"{name}.npz") as file:
        options = json.loads(str(file["meta"]))["cases"]
        found = {case: ({}, options[case]) for case in options}
        for key in file.files:
            case, _, array = key.partition(".")
            if array:
                found[case][0][array] = file[key]
    return found


def assert_agrees(found, wanted, what, bound=3e-6):
    """Asserts that no entry differs by more than ``bound`` times the greatest one."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    greatest = np.abs(wanted).max()
    error = np.abs(found - wanted).max() / greatest
    assert error <= bound, f"{what}: off by {error:.2g} of its greatest entry"
