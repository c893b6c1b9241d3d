"""Mixtures by their definition, in float64: each option by name, nothing flattened."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sadsl as sa
from sadsl.terms.biases import Alibi, KeyBias, PairBias, alibi_slopes
from sadsl.terms.heads import Heads
from sadsl.terms.mixtures import Average, Gated, Joint, Weighted
from sadsl.terms.softmax import Softmax


class Shared(ValueError):
    """Parts of a joint with ``overlap="refuse"`` have a pair in common."""


class Logits(NamedTuple):
    """What one normaliser covers: scores, the pairs that they belong to, and sinks."""

    scores: tuple  # of [batch, heads, q, k], float64
    pairs: tuple  # of bools [batch or 1, heads, q, k]
    sinks: dict  # name -> the weight of the first term that has it


def attention(spec, q, k, v, given, masks):
    """Output ``[batch, q, heads, dim]``, and the lse, or None if there are several.

    ``masks(map, heads)`` gives the pairs of a map, bools ``[batch or 1, heads, q, k]``.
    """
    match spec:
        case Average(terms):
            outs = [attention(x, q, k, v, given, masks)[0] for x in terms]
            return sum(outs) / len(outs), None
        case Gated(terms, name):
            outs = [attention(x, q, k, v, given, masks)[0] for x in terms]
            gates = given[name]
            return sum(gates[None, ..., m, None] * o for m, o in enumerate(outs)), None
        case Heads(shares):
            found, start = [], 0
            for part, count in shares:
                mine = slice(start, start + count)
                arrays = (x[:, :, mine] for x in (q, k, v))
                found.append(attention(part, *arrays, given, masks))
                start += count
            lses = [lse for _, lse in found]
            lse = None if any(x is None for x in lses) else jnp.concatenate(lses, 1)
            return jnp.concatenate([out for out, _ in found], 2), lse
        case Weighted(inner, log_weight) if not _normalised(inner):
            out, lse = attention(inner, q, k, v, given, masks)
            return out, None if lse is None else lse + log_weight
    return _normalise(logits(spec, q, k, given, masks), v, given)


def _normalised(spec):
    """Whether one normaliser covers all of the pairs."""
    if isinstance(spec, Weighted):
        return _normalised(spec.term)
    return isinstance(spec, sa.IndexMap | Softmax | Joint)


def logits(spec, q, k, given, masks):
    """The scores of all pairs of a term with one normaliser."""
    heads = q.shape[2]
    match spec:
        case Softmax(of_map, cap, bias, sink):
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            s = s if cap is None else cap * jnp.tanh(s / cap)
            s = s + _added(bias, heads, q.shape[1], given)
            return Logits((s,), (masks(of_map, heads),), {sink: 0.0} if sink else {})
        case Weighted(term, log_weight):
            of = logits(term, q, k, given, masks)
            sinks = {name: w + log_weight for name, w in of.sinks.items()}
            return Logits(tuple(s + log_weight for s in of.scores), of.pairs, sinks)
        case Joint(terms, overlap):
            every = [logits(x, q, k, given, masks) for x in terms]
            taken, pairs, sinks = np.array(False), (), {}
            for of in every:
                mine = np.any(np.stack(np.broadcast_arrays(*of.pairs)), axis=0)
                if overlap == "refuse" and (mine & taken).any():
                    raise Shared(spec)
                kept = of.pairs
                if overlap == "remove":
                    kept = tuple(p & ~taken for p in of.pairs)
                pairs, taken = (*pairs, *kept), taken | mine
                sinks = {**of.sinks, **sinks}
            return Logits(tuple(s for of in every for s in of.scores), pairs, sinks)
    return logits(sa.softmax(spec), q, k, given, masks)


def _added(bias, heads, length, given):
    at = np.arange(length)
    distance = at[:, None] - at
    match bias:
        case None:
            return 0.0
        case PairBias(name):
            return given[name][None]
        case KeyBias(name):
            return given[name][None, :, None, :]
        case Alibi(_):
            slopes = np.asarray(alibi_slopes(heads))
            return -slopes[None, :, None, None] * np.abs(distance)
    raise AssertionError(bias)


def _normalise(of, v, given):
    """One softmax over all logits; a sink is one more logit, without a value."""
    shape = of.scores[0].shape
    pairs = [jnp.broadcast_to(p, shape) for p in of.pairs]
    weights = [
        jnp.where(p, jnp.exp(jnp.where(p, s, 0.0)), 0.0)
        for s, p in zip(of.scores, pairs, strict=True)
    ]
    total = sum(w.sum(-1) for w in weights)
    for name, log_weight in of.sinks.items():
        total = total + jnp.exp(given[name] + log_weight)[None, :, None]
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    out = sum(jnp.einsum("bhqk,bkhd->bqhd", w / safe[..., None], v) for w in weights)
    return out, jnp.where(some, jnp.log(safe), -jnp.inf)


def with_gradients(spec, arrays, given, masks, do, dlse):
    """Output, lse (or None) and the gradients of q, k, v and the given arrays."""

    def loss(arrays, given):
        out, lse = attention(spec, *arrays, given, masks)
        total = jnp.sum(out * do)
        if lse is not None:
            # A constant -inf carries no gradient.
            total += jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * dlse)
        return total, (out, lse)

    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)), (arrays, given, do, dlse)
        )
        arrays, given, do, dlse = wide
        grads, (out, lse) = jax.grad(loss, (0, 1), has_aux=True)(arrays, given)
        return jax.tree.map(np.asarray, (out, lse, grads))
