"""Declared selection leaks against choices on random content."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from content_cases import CASES, drawn

import sadsl as sa
from lowering import ir
from lowering.expr.assume import envelope
from sadsl import catalog
from sadsl.analysis.leaks import Trial, declared_leak, selection_leak
from sadsl.maps.symbols import Truth
from sadsl.run.call import select
from sadsl.selections import Selection, key_positive, key_topw
from sadsl.selections.base import selections_of


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    """Compiled as for the interpreter: here compilation takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", sorted(CASES))
def test_leak_is_as_declared(name):
    case = CASES[name]
    trial = Trial(case.n, case.num_heads, case.head_dim)
    found = selection_leak(case.spec, case.operands, trial)
    assert found.leaks == (found.declared != "none"), str(found)
    assert found.declared != "block" or found.distance < case.block, str(found)


@dataclass(frozen=True)
class Later(Selection):
    """A query sees a key iff the number at the token ``ahead`` of the key is positive.

    It claims not to leak.
    """

    ahead: int
    leak: ClassVar[str] = "none"

    def choose(self, content) -> Mapping:
        ahead = jnp.minimum(jnp.arange(content.k.shape[2]) + self.ahead, 23)
        return {"kept": content.keys()[:, :, ahead, 0] > 0}

    def pairs(self, q, k, h):
        return self.part("kept")[h, k] == 1


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_a_hidden_leak_is_found(ahead):
    found = selection_leak(sa.causal() & Later(ahead), trial=Trial(n=24))
    # The token that decides is ``ahead`` of a key that may stand with its query.
    assert (found.declared, found.distance) == ("none", ahead)
    assert found.leaks == (ahead > 0)
    assert ("no choice changed" in str(found)) == (ahead == 0)
    if found.leaks:
        prefix, _, query, key = found.example
        assert prefix - max(query, key) == ahead
        assert f"whether query {query} sees key {key}" in str(found)


def test_a_static_map_has_no_choice_to_leak():
    assert declared_leak(sa.causal()) is None
    with pytest.raises(ValueError, match=r"causal\(\) has no selection"):
        selection_leak("causal()")


def test_properties_of_what_content_may_choose():
    kept, best = key_positive(smooth=4), key_topw(3)
    found = sa.properties(sa.causal() & (kept | sa.window(2)), 64)
    assert (found.selection_leak, found.causal) == ("block", True)
    assert found.num_pairs == 64 * 65 // 2
    assert ("selection leak", "block") in found.rows()
    # What is taken away may be nothing: it is not counted.
    assert sa.properties(sa.window(2) - best, 64).num_pairs == 63 * 3
    assert sa.properties(kept & best, 16).selection_leak == "block"
    static = sa.properties(sa.window(2), 64)
    assert static.selection_leak is None
    assert "selection leak" not in str(static)
    with pytest.raises(ValueError, match="reads the run-time arrays"):
        sa.properties(sa.segments() & best, 16)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["reformer", "key_topw", "key_positive smooth"])
def test_envelope_holds_every_choice(name):
    case = CASES[name]
    widths = []
    for spec in (case.spec, ~case.spec, sa.window(5) - case.spec):
        chosen = selections_of(spec)
        assert len(chosen) == 1
        widest, surely = (
            envelope(spec.node, chosen[0].owns, held=held) for held in (True, False)
        )
        assert not ir.operand_names(widest)
        q, k = drawn(2, 1, case.n, case.num_heads, case.head_dim)
        parts = select(spec, q, k, operands=case.operands(q, k))
        given = {x: np.asarray(part)[0] for x, part in parts.items()}
        pairs = spec.dense(case.n, num_heads=case.num_heads, operands=given)
        most, least = (
            sa.where(lambda q, k, node=node: Truth(node)).dense(case.n)
            for node in (widest, surely)
        )
        assert not np.any(pairs & ~most)
        assert not np.any(least & ~pairs)
        widths.append(int(most.sum() - least.sum()))
    assert widths[0] == widths[1] == case.n * (case.n + 1) // 2


def test_specs_are_text_and_say_how_they_leak():
    leaks = {
        catalog.minference(): "all",
        catalog.flex_prefill(): "all",
        catalog.mminference_q_boundary(): "all",
        catalog.dhsa(by_block=True): "all",
        catalog.anchor_attention(step=8): "block",
        catalog.hip(sinks=16): "block",
        catalog.snapkv(4096): "none",
    }
    for spec, leak in leaks.items():
        assert sa.parse(repr(spec)) == spec
        found = {s.leak for s in selections_of(spec)}
        assert max(found, key=["none", "block", "all"].index) == leak
