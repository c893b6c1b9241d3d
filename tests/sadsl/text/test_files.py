"""Loading a file returns the spec or plan that was saved, or raises an error."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from laws import few

import sadsl as sa
from sadsl.text import files as storage

SPEC = "softmax(causal() & (window(512) | sinks(4)), logits_soft_cap=30.0)"
# Maps of every kind of node, as a plan holds them after lowering.
MAPS = [
    "causal() & (window(40) | sinks(3))",
    "per_head(causal() & strided(7), window(9) - queries(20, 90))",
    "where(lambda q, k: table((3, 1, 2))[q % 3] <= floor_log2(k) + minimum(q, 7))",
    "causal() & ~where(lambda q, k: power_of_two(q - k) | isin(k - q, {-5, -2}))",
    "where(lambda q, k, h: (k <= q) & (operand('start')[k] <= h))",
    "segments() & where(lambda q, k: k < operand('prefix'))",
    "full()",
    "full() - full()",
]


@settings(max_examples=few(40))
@given(strategies.with_heads())
def test_specs_come_back(spec):
    assert storage.from_json(storage.to_json(spec)) == spec


def test_a_spec_in_a_file(tmp_path):
    path = tmp_path / "spec.json"
    sa.save(SPEC, path)
    assert sa.load(str(path)) == sa.parse(SPEC)
    content = json.loads(path.read_text())
    assert content["spec"] == SPEC
    assert content["format"] == 1
    assert content["sadsl"] == sa.__version__


def test_a_map_of_a_class_of_its_own_has_no_text(tmp_path):
    class Mine(sa.IndexMap):
        def __repr__(self):
            return "mine()"

    class Loud(sa.IndexMap):
        def __repr__(self):
            return "causal()"

    for mine in (Mine(), Loud()):
        with pytest.raises(ValueError, match=r"is not what parse reads.*where\(lambda"):
            sa.save(mine, tmp_path / "spec.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "causal()"}, "has been changed or damaged: the sha256"),
        ({"sha256": "0" * 64}, "it should be 000000000000…: restore the file"),
        ({"format": 2}, "format 2, and sadsl .* reads format 1: read it with the"),
        ({"format": "1"}, "does not hold a spec as save writes it: it has format='1'"),
        ({"spec": None}, "does not hold a spec as save writes it: it has spec=None"),
    ],
)
def test_a_changed_spec_is_refused(tmp_path, change, message):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(json.loads(storage.to_json(SPEC)) | change))
    with pytest.raises(ValueError, match=message) as error:
        sa.load(path)
    assert repr(str(path)) in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"causal()", "it is not JSON"),
        (b"[1, 2]", "it holds no named fields"),
        (b'{"sadsl": "0.1.0"}', "it has no 'format'"),
        (b'{"format": 1, "spec": "full()"}', "it has no 'sha256'"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[" * 100_000, "it is not JSON"),
    ],
)
def test_other_files_are_no_specs(tmp_path, content, why):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"does not hold a spec.*{why}"):
        sa.load(path)


def test_a_missing_file_is_missing(tmp_path):
    for read in (sa.load, sa.load_plan):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def assert_same(found, plan):
    for f in fields(plan.mask):
        a, b = getattr(found.mask, f.name), getattr(plan.mask, f.name)
        np.testing.assert_array_equal(a, b)
        assert type(a) is type(b)
        if not f.metadata and a is not None:
            assert a.dtype == b.dtype
    assert found.maps == plan.maps
    assert found.num_heads == plan.num_heads
    assert found.layouts == plan.layouts
    assert type(found.layouts) is type(plan.layouts)
    assert found.given == plan.given
    assert found.given_maps == plan.given_maps
    assert str(found) == str(plan)
    assert found.operands == plan.operands
    if not plan.operands:
        assert found.num_pairs == plan.num_pairs


@pytest.mark.parametrize("text", MAPS)
def test_plans_come_back(tmp_path, text):
    plan = sa.plan(text, 130, 97, block_q=16, block_kv=8, num_heads=4, q_offset=3)
    # The name is taken as it is: nothing is appended to it.
    path = tmp_path / "plan"
    sa.save_plan(plan, path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    assert_same(sa.load_plan(str(path)), plan)


def test_a_plan_in_another_order_comes_back(tmp_path):
    plan = sa.plan("strided(16)", 256, block_q=16, block_kv=16)
    assert plan.layouts is not None
    sa.save_plan(plan, tmp_path / "plan")
    assert_same(sa.load_plan(tmp_path / "plan"), plan)


@settings(max_examples=few(25))
@given(strategies.with_heads(), strategies.SIZES)
def test_any_plan_comes_back(tmp_path_factory, spec, n):
    plan = sa.plan(spec, n, block_q=16, block_kv=16, num_heads=6)
    path = tmp_path_factory.getbasetemp() / "any.npz"
    sa.save_plan(plan, path)
    assert_same(sa.load_plan(path), plan)


def test_a_million_tokens_are_small(tmp_path):
    plan = sa.plan("causal()", 1_048_576, block_q=128, block_kv=128)
    path = tmp_path / "plan.npz"
    sa.save_plan(plan, path)
    assert plan.nbytes < 1_000_000
    assert path.stat().st_size < 1_000_000
    assert sa.load_plan(path).num_pairs == 1_048_576 * 1_048_577 // 2


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.npz"
    sa.save_plan(sa.plan(MAPS[0], 130, block_q=16, block_kv=8), path)
    return path


def rewritten(path, **changes):
    with np.load(path) as found:
        held = {name: found[name] for name in found.files} | changes
    np.savez(path, **{name: x for name, x in held.items() if x is not None})


def as_bytes(meta):
    return np.frombuffer(json.dumps(meta).encode(), np.uint8)


def meta_of(path):
    with np.load(path) as found:
        return json.loads(found["meta"].tobytes())


def test_a_flipped_byte_is_found_wherever_it_is(saved):
    data = saved.read_bytes()
    plan = sa.load_plan(saved)
    flips = range(0, len(data), 37)
    messages = []
    for at in flips:
        saved.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        # Some bytes of an archive, as the time of writing, say nothing of the plan.
        try:
            assert_same(sa.load_plan(saved), plan)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(flips) / 2
    assert all(message.startswith(repr(str(saved))) for message in messages)


def test_a_changed_plan_is_refused(saved):
    with np.load(saved) as found:
        stop = found["run_stop"]
    rewritten(saved, run_stop=stop + 1)
    with pytest.raises(ValueError, match="has been changed or damaged: the sha256"):
        sa.load_plan(saved)
    # The same bytes as another type are another array.
    rewritten(saved, run_stop=stop.view(np.float32))
    with pytest.raises(ValueError, match="has been changed or damaged: the sha256"):
        sa.load_plan(saved)
    rewritten(saved, run_stop=stop)
    sa.load_plan(saved)
    rewritten(saved, meta=as_bytes(meta_of(saved) | {"num_heads": 2}))
    with pytest.raises(ValueError, match="has been changed or damaged: the sha256"):
        sa.load_plan(saved)


def test_a_plan_of_another_format(saved):
    rewritten(saved, meta=as_bytes(meta_of(saved) | {"format": 7}))
    with pytest.raises(ValueError, match=r"has format 7, and sadsl .* by save_plan"):
        sa.load_plan(saved)


@pytest.mark.parametrize("name", ["meta", "sha256", "row_ptr"])
def test_a_plan_that_lacks_something(saved, name):
    rewritten(saved, **{name: None})
    with pytest.raises(ValueError, match=f"does not hold a plan.*it lacks {name}"):
        sa.load_plan(saved)


def test_meta_that_makes_no_plan(saved):
    with np.load(saved) as found:
        arrays = {name: found[name] for name in storage.ARRAYS}
    meta = meta_of(saved)
    for change, why in (
        ({"maps": [["Nothing", 1]]}, "'Nothing'"),
        ({"maps": [["Le", 1]]}, "missing 1 required positional argument"),
        ({"mask": {}}, "'q_seq_len'"),
        ({"layouts": ["Layout", 4, [], [1]]}, "must name each of the 0 digits"),
    ):
        text = json.dumps(meta | change).encode()
        digest = storage._plan_hash(text, arrays).encode()
        rewritten(saved, meta=np.frombuffer(text, np.uint8),
                  sha256=np.frombuffer(digest, np.uint8))  # fmt: skip
        with pytest.raises(ValueError, match=f"do not make a plan.*{re.escape(why)}"):
            sa.load_plan(saved)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 torn"])
def test_other_files_are_no_plans(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold a plan as save_plan writes it"):
        sa.load_plan(path)


def test_pickles_are_never_read(saved):
    rewritten(saved, run_start=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"does not hold a plan.*allow_pickle=False"):
        sa.load_plan(saved)
