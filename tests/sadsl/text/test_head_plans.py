"""Head plans equal masks from plain loops, and survive a round trip through text."""

import json

import numpy as np
import pytest

import sadsl as sa
from sadsl import catalog
from sadsl.text.head_plans import read_head_plan, write_head_plan

LENGTH = 41
PLAN = {
    "layers": [
        "causal()",
        {"spec": "softmax(causal() & window(3), logits_soft_cap=2.0)"},
        {"heads": ["causal()", "causal() & window(5)", "causal()", "full()"]},
        {
            "heads": [
                {"window": 6, "dilation": 2, "sinks": 1},
                {"window": None, "dilation": 3},
                {"alpha": 8, "beta": 0.25},
                {"window": 4},
            ]
        },
        {
            "heads": [
                {"spec": "softmax(causal(), logits_soft_cap=2.0)", "count": 3},
                "causal()",
            ]
        },
    ]
}


def mask(rule, heads):
    """``rule(h, q, k)`` of every pair."""
    pairs = np.ndindex(heads, LENGTH, LENGTH)
    return np.array([rule(*x) for x in pairs]).reshape(heads, LENGTH, LENGTH)


def test_json_means_what_it_says():
    plan = read_head_plan(PLAN, num_heads=4)
    assert plan[0] == sa.causal()
    assert plan[1] == sa.softmax(sa.causal() & sa.window(3), 2.0)
    assert plan[4] == sa.heads((sa.softmax(sa.causal(), 2.0), 3), (sa.causal(), 1))
    wanted = mask(
        lambda h, q, k: [k <= q, q - 5 <= k <= q, k <= q, True][h],
        4,
    )
    np.testing.assert_array_equal(plan[2].dense(LENGTH, num_heads=4), wanted)

    def by_fields(h, q, k):
        kept = (
            (q - k <= 6 and (q - k) % 2 == 0) or k < 1,
            (q - k) % 3 == 0,
            # MoA in blocks of 64: all is one block here.
            True,
            q - k <= 4,
        )
        return k <= q and kept[h]

    wanted = mask(by_fields, 4)
    np.testing.assert_array_equal(plan[3].dense(LENGTH, num_heads=4), wanted)


def test_a_table_is_read_in_any_order():
    table = """layer, head, window, dilation
        1,1,,4
        0,0,3,1
        0,1,3,1
        1,0,9,3
    """
    first, second = read_head_plan(table)
    assert first == sa.causal() & sa.window(3)
    wanted = mask(
        lambda h, q, k: k <= q and (q - k) % (3, 4)[h] == 0 and (h or q - k <= 9), 2
    )
    np.testing.assert_array_equal(second.dense(LENGTH, num_heads=2), wanted)
    quoted = 'layer,head,spec\n0,0,causal()\n0,1,"window(2, 3)"\n'
    assert read_head_plan(quoted) == (sa.per_head(sa.causal(), sa.window(2, 3)),)
    spans = "layer,head,alpha,beta\n0,0,64,0.5\n0,1,-64,1\n"
    assert read_head_plan(spans) == (catalog.moa([(64, 0.5), (-64, 1)]),)


def test_the_files_of_moa_are_read(tmp_path):
    content = {"alphas": [[0, 128], [64, 64]], "betas": [[1, 0.5], [0.25, 0.25]]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    plan = read_head_plan(path, num_heads=8)
    assert plan[0] == catalog.moa([(0, 1), (128, 0.5)])
    assert sa.per_head(plan[1]) == catalog.moa([(64, 0.25)])
    plan = read_head_plan({**content, "block": 16, "global_blocks": 2})
    assert plan[0] == catalog.moa([(0, 1), (128, 0.5)], 16, 2)


def test_a_plan_that_is_written_comes_back():
    plan = (
        *read_head_plan(PLAN),
        catalog.s2_attention(8, 4, 2, 8),
        catalog.moa([(64, 0.5), (-64, 1)]),
        sa.heads((sa.causal(), 2), (sa.full(), 1)),
        sa.per_head(sa.causal(), sa.causal()),
    )
    text = write_head_plan(plan)
    assert read_head_plan(text) == plan
    assert read_head_plan(json.loads(text)) == plan
    # A map for each head is written head by head, to be read and changed.
    assert '"causal() & window(5)", "causal()", "full()"' in text


def heads(*entries):
    return {"layers": [{"heads": list(entries)}]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", r"line 1, column 2: Expecting"),
        ("plan.json", r"'plan.json' is neither JSON .*pathlib.Path"),
        ({"layer": []}, r"has layer: it must have a list of 'layers'"),
        ({"layers": []}, r"the plan has no layer"),
        ({"layers": ["causal()", {"head": 1}]}, r"layers\[1\]: is {'head': 1}"),
        ({"layers": [{"heads": []}]}, r"layers\[0\].heads: is \[\]"),
        ({"layers": [{"spec": 3}]}, r"layers\[0\].spec: is 3: give the text"),
        (heads("causal()", "windw(3)"), r"heads\[1\]: spec: .*unknown name 'windw'"),
        (heads(3), r"layers\[0\].heads\[0\]: is 3"),
        (heads({"span": 3}), r"has \['span'\].*spec, count; alpha, beta; window"),
        (heads({"window": 3, "beta": 1}), r"heads\[0\]: beta: does not go with window"),
        (heads({"spec": "full()", "count": 0}), r"count: is 0: .*at least 1"),
        (heads({"window": -1}), r"window: is -1: it must be an integer of at least 0"),
        (heads({"window": 2.5}), r"window: is 2.5"),
        (heads({"window": 2, "dilation": 0}), r"dilation: is 0: .*at least 1"),
        (heads({"alpha": 2}), r"beta: is missing"),
        (heads({"alpha": 2, "beta": [1]}), r"beta: is \[1\]: it must be a number"),
        (
            heads({"alpha": float("nan"), "beta": 1}),
            r"alpha: is nan: it must",
        ),
        ({"alphas": [[1]], "betas": []}, r"1 layers of alphas, but 0 of betas"),
        ({"alphas": [[1]], "betas": [[]]}, r"layer 0: has 1 alphas and 0 betas"),
        ({"alphas": [["x"]], "betas": [[1]]}, r"alphas\[0\]\[0\]: could not convert"),
        ({"alphas": [], "beta": []}, r"unknown 'beta'"),
        ({"alphas": [], "betas": [], "block": 0}, r"block: is 0: .*at least 1"),
        ({"alphas": 1, "betas": []}, r"a list a layer in both"),
        ("head,layer,window\n0,0,1", r"line 1: columns are .*begin with layer, head"),
        ("layer,head,window\n0,0", r"line 2, does not have the 3 cells"),
        ("layer,head,window\n0,0,1\n0,x,1", r"line 3, column head: invalid literal"),
        ("layer,head,window\n0,0,1\n0,0,1", r"line 3, layer 0, head 0 .*twice"),
        ("layer,head,window\n0,1,1", r"no row for head 0 of layer 0"),
        ("layer,head,window\n1,0,1", r"no row for head 0 of layer 0"),
        ("layer,head,span\n0,0,1", r"line 2, column has \['span'\]"),
        ("layer,head,spec,count\n0,0,full(),2", r"column count: a row .*one head"),
    ],
)
def test_the_message_says_where(source, message):
    with pytest.raises(ValueError, match=f"head plan: .*{message}"):
        read_head_plan(source)


def test_heads_must_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"layers\[2\]: is for 4 heads.*num_heads=6"):
        read_head_plan(PLAN, num_heads=6)
    with pytest.raises(ValueError, match=r"layers\[4\]: is for 4 heads.*num_heads=8"):
        read_head_plan(PLAN, num_heads=8)
    path = tmp_path / "heads.csv"
    path.write_text("layer,head,window\n0,0,x\n")
    with pytest.raises(ValueError, match=r"heads.csv: line 2, column window: invalid"):
        read_head_plan(path)


def test_a_map_without_text_is_refused():
    class Own(sa.IndexMap):
        def pairs(self, q, k, h):
            return k <= q

        def __repr__(self):
            return "own()"

    with pytest.raises(ValueError, match=r"layers\[1\]: own\(\) has no text"):
        write_head_plan([sa.causal(), Own()])
