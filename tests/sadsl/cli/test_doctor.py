"""``sadsl doctor``: what is here, what is missing, and what adds it."""

import sys

import jax

from sadsl.cli import doctor


def test_doctor(run, values):
    found = values("doctor")
    assert found["tools"]["jax"] == jax.__version__
    assert found["devices"][0].startswith("cpu: cpu")
    assert found["targets"]["cpu"] == "HLO"
    missing = {part["name"] for part in found["missing"]}
    assert missing == {name for name, v in found["tools"].items() if v is None}
    text = run("doctor")
    for part in found["missing"]:
        assert part["command"] in text


def test_doctor_says_what_adds_a_package(values, run, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "_tool", lambda name: "/cuda/bin/" + name)
    found = values("doctor")
    assert found["targets"]["tpu-v6e"] is None
    assert found["tools"]["ptxas"] == "/cuda/bin/ptxas"
    missing = {part["name"]: part["command"] for part in found["missing"]}
    assert missing["libtpu"] == "pip install libtpu"
    assert "ptxas" not in missing
    assert "pip install libtpu" in run("doctor")


def test_a_tool_of_cuda_is_found_in_its_wheel(tmp_path, monkeypatch):
    path = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert doctor._tool("nvdisasm") == str(path)
    assert doctor._tool("ptxas") is None
