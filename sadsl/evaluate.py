"""What a spec yields on checked arrays: each term by its own rule, part by part."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sadsl import (
    by_heads,
    channels,
    checks,
    compression,
    dropout,
    merging,
    mixtures_run,
    routing,
)
from sadsl.channels import Channel
from sadsl.compression import Compressed
from sadsl.execution import Options, call_arrays, traced
from sadsl.linear import Linear
from sadsl.linear_run import attend as by_recurrence
from sadsl.maps import IndexMap
from sadsl.mixtures import Average, Gated, Joint, Weighted
from sadsl.summaries import Summaries
from sadsl.summaries import attend as summarised
from sadsl.term import (
    DROPOUT_KEY,
    TRACED_SCALE,
    Inputs,
    Outcome,
    Setting,
    Spec,
)
from sadsl.terms import Heads, ScatterMean, Softmax


def evaluate(
    inputs: Inputs, spec: Spec, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Output and lse of ``spec``; ``given`` are the run-time arrays that it reads.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it.
    """
    match spec:
        case IndexMap():
            return _softmax(inputs, Softmax(spec), given, setting)
        case Softmax():
            return _softmax(inputs, spec, given, setting)
        case ScatterMean():
            return _scatter_mean(inputs, spec, given, setting)
        case Heads():
            return by_heads.attend(inputs, spec, given, setting, evaluate)
        case Joint() | Average() | Gated() | Weighted():
            return mixtures_run.attend(inputs, spec, given, setting, evaluate)
        case Summaries():
            return summarised.attend(inputs, spec, given, setting, evaluate)
        case Channel():
            return channels.attend(inputs, spec, given, setting, evaluate)
        case Compressed():
            return compression.attend(inputs, spec, given, setting, evaluate)
        case Linear():
            return by_recurrence(inputs, spec, given, setting, evaluate)
    raise TypeError(f"{spec!r} is not a term that sadsl knows")


def options_of(inputs: tuple[Array, ...], term: Softmax, setting: Setting) -> Options:
    """The static part of a call with one softmax; ``inputs`` start with q and k."""
    q, k = inputs[0], inputs[1]
    v = inputs[2] if len(inputs) > 2 else k
    return Options(
        term=replace(term, sink=None),
        problem=checks.problem(q, k, v, setting.q_offset),
        sm_scale=None if traced_scale(setting) else setting.sm_scale,
        impl=setting.impl,
        interpret=setting.interpret,
        config=setting.config,
        dropout_rate=setting.dropout_rate,
    )


def traced_scale(setting: Setting) -> dict[str, Array]:
    """The factor of the scores as a run-time array, if it is one."""
    scale = setting.sm_scale
    return {} if isinstance(scale, float) else {TRACED_SCALE: scale}


def _softmax(
    inputs: Inputs, term: Softmax, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    options = options_of(inputs, term, setting)
    apart = (term.sink, DROPOUT_KEY)
    operands = {name: x for name, x in given.items() if name not in apart}
    arrays = call_arrays(options, operands, (None, None), inputs[0].shape[0])
    if setting.dropout_rate:
        arrays[DROPOUT_KEY] = dropout.key_words(given[DROPOUT_KEY])
    arrays |= traced_scale(setting)
    out, lse = traced(*inputs, arrays, options=options)
    if term.sink is None:
        return Outcome(out, lse)
    return merging.with_sink(out, lse, sinks_of(term, given, inputs[0]))


def sinks_of(term: Softmax, given: Mapping[str, Any], q: Array) -> Array:
    """The sink of every head, ``[batch or 1, heads]``.

    Raises:
      ValueError: it was not given, or in another shape.
    """
    batch, _, heads, _ = q.shape
    if term.sink not in given:
        raise ValueError(
            f"{term!r} reads its sinks from {term.sink!r}, which was not given: pass "
            f"operands={{{term.sink!r}: array}} with a float for each of {heads} heads"
        )
    sinks = jnp.asarray(given[term.sink])
    if sinks.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"operand {term.sink!r} has shape {sinks.shape}: the sinks of {term!r} "
            f"must be ({heads},), one a head, perhaps with the batch of {batch} in "
            "front"
        )
    return sinks.reshape(-1, heads)


def _scatter_mean(
    inputs: Inputs, term: ScatterMean, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    if setting.dropout_rate:
        raise NotImplementedError(
            f"dropout_rate={setting.dropout_rate}: {term!r} averages several softmaxes "
            "of a query, whose weights have no dropout yet: leave it 0"
        )
    if traced_scale(setting):
        raise NotImplementedError(
            f"sm_scale={setting.sm_scale!r} is traced: {term!r} takes a Python number"
        )
    options = options_of(inputs, Softmax(term.rest), setting)
    return Outcome(routing.attention(inputs, term, given, options), None)
