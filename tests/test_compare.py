"""The comparison of kinds of attention: it is fair, and a killed run loses nothing."""

import json
import math

import compare
import jax
import numpy as np
import pytest
from flax import nnx
from lm import comparison, foresight
from lm.cases import QUICK, entries
from lm.checkpoints import History
from lm.comparison import Estimate, Kept, Row, Run
from lm.model import LanguageModel, ModelConfig, count_params, matched, routing_for

import sadsl as sa

SIZES = ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2, d_model=16, d_hidden=32)


@pytest.fixture(autouse=True)
def settings():
    """Promotion as users of the example have it; programs run once: no optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(10):
        words = rng.choice(["while", "return", "yield", "lambda"], 60)
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def run(texts, out, *more):
    return compare.main(["--quick", f"--data={texts}", f"--out={out}", *more])


def files(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


@pytest.mark.slow
def test_a_comparison_is_written_and_goes_on(texts, tmp_path, capsys):
    assert run(texts, tmp_path) == 0
    first = files(tmp_path)
    names = {f"{name}-{seed}.json" for name in ("dense", "window") for seed in (0, 1)}
    assert set(first) == names | {"times-dense-window.json"}
    lost = tmp_path / "runs" / "window-1.json"
    before = json.loads(lost.read_text())["found"]["history"]["train"]
    lost.unlink()
    assert run(texts, tmp_path) == 0
    second = files(tmp_path)
    assert {name for name in first if first[name] != second[name]} == {lost.name}
    assert json.loads(lost.read_text())["found"]["history"]["train"] == before

    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "window"]
    assert rows[0]["num_params"] == rows[1]["num_params"]
    assert all(row["step_ms"] > 0 and row["temp_mib"] > 0 for row in rows)
    # A window that is longer than the text is no restriction: at one seed the weights
    # and the batches of both are the same, and so are the losses.
    assert rows[0]["bits"] == rows[1]["bits"]
    assert rows[1]["against"] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert rows[0]["bits"][1] > 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    assert "against dense" in said
    assert "half of the 95% t-interval" in said
    assert not list(tmp_path.rglob("*.part"))

    assert run(texts, tmp_path, "--steps=3") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "is of another run: steps: 4 there, 3 here" in said
    assert "--fresh" in said


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--data=nowhere", "there is no such file or folder"),
    ],
)
def test_bad_options_are_said_without_a_trace(texts, tmp_path, capsys, flag, message):
    assert run(texts, tmp_path, flag) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_kinds_that_do_not_exist_are_refused(texts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(texts, tmp_path, "--only=denser")
    assert "invalid choice: 'denser'" in capsys.readouterr().err


def test_the_mlp_takes_up_what_a_kind_learns_less():
    routing = routing_for(256)
    sizes = ModelConfig(
        num_layers=2, num_heads=4, num_kv_heads=4, d_model=64, d_hidden=256
    )
    dense = count_params(sizes, sa.causal())
    # Clustered heads share queries and keys: half of the key projection is not there.
    lacking = 2 * 64 * 32
    assert count_params(sizes, routing) == dense - lacking
    equal = matched(sizes, routing, dense)
    assert equal.d_hidden == 256 + lacking // (2 * 2 * 64)
    assert count_params(equal, routing) == dense


def test_the_count_is_that_of_the_model():
    model = LanguageModel(SIZES, sa.causal(), nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert count_params(SIZES, sa.causal()) == sum(x.size for x in leaves)


def test_a_kind_with_gates_of_its_own_has_a_narrower_mlp():
    wanted = "dense", "delta", "gated delta"
    dense, delta, gated = entries(QUICK, wanted)
    assert gated.spec == sa.delta(decay="g")
    assert dense.model.d_hidden > delta.model.d_hidden > gated.model.d_hidden
    sizes = [count_params(x.model, x.spec) for x in (dense, delta, gated)]
    comparison.check_equal_params(dict(zip(wanted, sizes, strict=True)))


def test_models_of_two_sizes_are_refused():
    comparison.check_equal_params({"a": 1000, "b": 1009, "c": 991})
    with pytest.raises(
        ValueError, match=r"b has 1,011 parameters and a 1,000, over 1%"
    ):
        comparison.check_equal_params({"a": 1000, "b": 1011})


@pytest.mark.slow
def test_the_future_is_found_wherever_it_comes_in():
    chosen = sa.causal() & sa.topk(1, block=4, eligible=sa.causal())
    specs = {"causal": sa.causal(), "not": sa.window(5, 1), "by blocks": chosen}
    specs |= {"delta": sa.delta(), "gated delta": sa.delta(decay="g")}
    found = {name: foresight.foresight(x, SIZES, 24) for name, x in specs.items()}
    assert found["causal"] == (0.0, 0.0)
    for name in ("delta", "gated delta"):
        assert max(found[name]) <= foresight.TOLERANCE
    assert min(found["not"]) > 0.01
    # Causal pairs, chosen for blocks of queries by the last query of the block as well.
    assert found["by blocks"].values == 0.0
    assert found["by blocks"].choices > 0.01


def test_what_sees_the_future_is_refused():
    refuse = lambda ahead, *found: foresight.refuse(
        "it", sa.full(), foresight.Foresight(*found), chooses_ahead=ahead
    )
    refuse(False, 1e-6, 1e-6)
    refuse(True, 1e-6, 0.5)
    with pytest.raises(ValueError, match=r"it: full\(\) lets a query see later bytes"):
        refuse(True, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"gradient nan"):
        refuse(True, math.nan, 0.0)
    with pytest.raises(ValueError, match=r"it: .* decides by later bytes what a query"):
        refuse(False, 0.0, 0.5)


def test_intervals_are_those_of_student():
    # Quantiles of tables: t(0.975; 2) = 4.303, t(0.975; 4) = 2.776.
    found = comparison.estimate([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    found = comparison.estimate([0.0, 0.0, 0.0, 0.0, 1.0])
    assert found == pytest.approx((0.2, 2.776 * math.sqrt(0.2 / 5)), rel=1e-3)
    single = comparison.estimate([1.5])
    assert single.mean == 1.5
    assert math.isnan(single.half)
    assert single.text() == "1.500"
    assert Estimate(-0.25, 0.125).text("+") == "-0.250 ± 0.125"


def run_with(bits):
    return Run(History([bits] * 40, [0.1] * 40, [[40, bits]]), 10, 1 << 20)


def test_differences_are_taken_seed_by_seed():
    base = [run_with(bits) for bits in (3.0, 4.0, 5.0)]
    other = [run_with(bits) for bits in (2.5, 3.5, 4.5)]
    assert comparison.against(other, base) == (-0.5, 0.0)


def row(name, **changes):
    base = Row(name, "causal()", "", Estimate(3.0, 0.1), None, 12.0, 3.4, 10, 8)
    return Row(**{**vars(base), **changes})


def test_tables_line_up():
    rows = [row("dense"), row("other", against=Estimate(0.5, 0.25), note="odd")]
    lines = comparison.text_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "+0.500 ± 0.250" in lines[3]
    text = comparison.markdown(rows, "Measured somehow.")
    head, rule, first, second = text.splitlines()[:4]
    assert {line.count("|") for line in (head, rule, first, second)} == {6}
    assert "- other: `causal()`; odd" in text


def test_a_picture_of_one_seed_and_of_several():
    rows = [row("dense"), row("other", bits=Estimate(3.0, math.nan))]
    runs = {"dense": [run_with(3.0), run_with(4.0)], "other": [run_with(3.5)]}
    curves, costs = comparison.draw(rows, runs).axes
    assert [line.get_label() for line in curves.lines] == ["dense", "other"]
    np.testing.assert_allclose(curves.lines[0].get_ydata(), 3.5)
    assert sorted(text.get_text() for text in costs.texts) == ["dense", "other"]


def test_the_table_goes_between_its_markers(tmp_path):
    path = tmp_path / "benchmarks.md"
    path.write_text(f"before\n{comparison.START}\nold\n{comparison.END}\nafter\n")
    comparison.insert(path, "new")
    once = path.read_text()
    comparison.insert(path, "new")
    assert path.read_text() == once
    assert once == f"before\n{comparison.START}\n\nnew\n\n{comparison.END}\nafter\n"
    for text in ("", comparison.START, f"{comparison.END}{comparison.START}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="must have one line '<!-- compare:start"):
            comparison.insert(path, "new")


def test_what_was_kept_is_checked(tmp_path):
    kept = Kept(tmp_path)
    assert kept.read("a", {"x": 1}) is None
    kept.write("a", {"x": 1}, comparison.run_record(run_with(3.0)))
    assert comparison.run_of(kept.read("a", {"x": 1})) == run_with(3.0)
    with pytest.raises(ValueError, match=r"another run:\n  x: 1 there, 2 here\n"):
        kept.read("a", {"x": 2})
    (tmp_path / "a.json").write_text('{"identity": {}')
    with pytest.raises(ValueError, match=r"a.json is damaged .*--fresh"):
        kept.read("a", {"x": 1})
    kept.forget()
    assert kept.read("a", {"x": 1}) is None
