"""CAB's four patterns: what each mechanism does, and that the page says so."""

import cab_cases
import cab_patterns
import numpy as np
import pytest
from cab_cases import Entry

import sadsl as sa
from sadsl import catalog
from sadsl.analysis.leaks import declared_leak
from sadsl.selections.base import selections_of
from sadsl.text.specs import as_term

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

EVERY = cab_cases.every()


def test_the_page_is_current():
    assert cab_patterns.current(), "run python docs/cab_patterns.py"


# One row in `make test`: each takes seconds.
ROWS = [
    pytest.param(name, marks=() if name == "streaming" else pytest.mark.slow)
    for name in sorted(EVERY)
]


@pytest.mark.parametrize("name", ROWS)
def test_the_cells_are_what_the_mechanism_does(name):
    assert cab_patterns.patterns(EVERY[name]) == cab_patterns.written()[name]


def test_every_function_of_the_catalogue_has_a_row():
    names = {name for name in vars(catalog) if callable(getattr(catalog, name))}
    names -= {*cab_cases.NO_ATTENTION, *cab_cases.SELECTION_OF}
    text = " ".join(EVERY).replace("s2 ", "s2_attention ")
    by_selection = {"block_sparse", "sparsifiner", "nsa_topk", "reformer"}
    assert by_selection < set(EVERY)
    assert {name for name in names if name not in text} == set()


SMALL = {"snapkv": (20,)}


@pytest.mark.parametrize("name", cab_cases.SELECTION_OF)
def test_a_row_stands_for_a_mechanism_with_its_selection(name):
    spec = getattr(catalog, name)(*SMALL.get(name, ()))
    row = cab_cases.content_cases.CASES[cab_cases.SELECTION_OF[name]]
    kinds = [{type(s) for s in selections_of(as_term(x))} for x in (spec, row.spec)]
    assert kinds[0] == kinds[1]


def static_specs():
    """The maps that positions decide, by the name of their row."""
    cases = cab_cases.published.CASES
    return {case.name: (case.make(case.sizes[1]), case) for case in cases}


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", sorted(static_specs()))
def test_causality_by_running_is_causality_by_algebra(name):
    """The page runs a map; ``properties`` eliminates positions from its expression."""
    spec, case = static_specs()[name]
    causal = sa.properties(spec, 60, num_heads=case.heads).causal
    wanted = ("past only", "yes") if causal else ("yes", "no")
    assert cab_patterns.written()[name][:2] == wanted


def test_choices_that_look_ahead_are_declared_so():
    """Each selection says whether its choice leaks; the page found it by running."""
    page = cab_patterns.written()
    found = {}
    for entry, case in zip(
        cab_cases.by_content(), cab_cases.content_cases.CASES.values(), strict=True
    ):
        causal = page[entry.name][1]
        if causal != "no":
            found[entry.name] = causal, declared_leak(case.spec)
    assert len(found) > 20
    wrong = {
        name: x for name, x in found.items() if (x[0] == "choice") != (x[1] != "none")
    }
    assert wrong == {}


# The table of the CAB paper, for the mechanisms that are here too.
PUBLISHED = {
    "window on both sides": ("yes", None, None, None),
    "linear": (None, "yes", None, "yes"),
    "linear full": ("yes", None, "yes", None),
    "dilated_window causal": (None, "yes", None, None),
}


def test_what_cab_says_of_local_and_linear_attention():
    page = cab_patterns.written()
    for name, cells in PUBLISHED.items():
        for said, wanted in zip(page[name], cells, strict=True):
            assert wanted in (None, said), name


# --- what finds a violation finds it ---


def broken(attend):
    return cab_patterns.patterns(Entry("broken", attend, n=12))


def test_a_query_that_sees_one_later_key_is_found():
    def attend(q, k, v, given):
        ahead = sa.where(lambda q, k: (k <= q) | ((q == 4) & (k == 9)))
        return sa.attention(q, k, v, ahead, impl="reference")

    assert broken(attend) == ("yes", "no", "yes", "yes")


def test_a_running_statistic_of_the_queries_is_found():
    """Causal in its keys, but each output is divided by a mean over all queries."""

    def attend(q, k, v, given):
        out = sa.attention(q, k, v, sa.causal(), impl="reference")
        return out / (1 + np.float32(0.1) * abs(q).mean(axis=1, keepdims=True))

    assert broken(attend) == ("yes", "choice", "past only", "no")


def test_what_refuses_is_said():
    def attend(q, k, v, given):
        if q.shape[1] != k.shape[1]:
            raise ValueError("self-attention only")
        return sa.attention(q, k, v, sa.causal(), impl="reference")

    assert broken(attend) == ("past only", "yes", "past only =", "-")

    def refuse(q, k, v, given):
        raise NotImplementedError("no")

    assert broken(refuse) == ("-", "-", "-", "-")
