"""Runs ``latent``, expanded or absorbed, whichever takes fewer operations."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.run_time.lists import visited_pairs
from sadsl.run import lists
from sadsl.run.attend import attend, choose
from sadsl.run.options import options_of
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import read_by
from sadsl.terms.latent import Latent


class LatentSizes(NamedTuple):
    """The channels of a call: see ``sadsl.latent``."""

    heads: int
    key: int  # d_n
    turned: int  # d_r
    value: int  # d_v
    rank: int  # r

    def expanded_flops(self, keys: int, pairs: int) -> int:
        """Multiplications of the expanded form; ``pairs`` are over all heads."""
        made = self.heads * keys * self.rank * (self.key + self.value)
        return made + pairs * (self.key + self.turned + self.value)

    def absorbed_flops(self, queries: int, pairs: int) -> int:
        """Multiplications of the absorbed form."""
        made = self.heads * queries * self.rank * (self.key + self.value)
        return made + pairs * (2 * self.rank + self.turned)


@attend.register
def _(term: Latent, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """Output ``[batch, q, heads, d_v]`` and lse.

    Raises:
      ValueError: the weights are missing, or sizes do not fit together.
    """
    q, k, _ = inputs
    up = _weights(term, given, inputs)
    sizes = _sizes(term, up, q, k)
    mine = read_by(term.softmax, given)
    if _form(term, sizes, (q, k), mine, setting) == "expanded":
        keys, values = expanded(k, up, sizes)
        return attend(term.softmax, (q, keys, values), mine, setting)
    turned, back, rank = absorbed_form(term, given, (q, k))
    part = replace(term.softmax, values=(0, rank))
    # The scale is that of the call, not of the absorbed head_dim.
    found = attend(part, (turned, k, k), mine, setting)
    return Outcome(back(found.out), found.lse)


def absorbed_form(
    term: Latent, given: Mapping[str, Any], inputs: tuple[Array, Array]
) -> tuple[Array, Callable[[Array], Array], int]:
    """The queries of the cached rows, what expands outputs, and the rank of a latent.

    Raises:
      ValueError: the weights are missing, or sizes do not fit together.
    """
    q, k = inputs
    up = _weights(term, given, inputs)
    sizes = _sizes(term, up, q, k)

    def back(out: Array) -> Array:
        return _product("bqhr,hvr->bqhv", out, up[:, sizes.key :])

    return absorbed(q, up, sizes), back, sizes.rank


@choose.register
def _(
    term: Latent, inputs: tuple[Array, Array], given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:  # fmt: skip
    """The choices of the map; scores of q and k see the absorbed queries."""
    q, k = inputs
    up = _weights(term, given, (q, k))
    turned = absorbed(q, up, _sizes(term, up, q, k))
    return choose(term.softmax, (turned, k), read_by(term.softmax, given), setting)


def expanded(
    k: Float[Array, "batch kv 1 cached"], up: Float[Array, "heads both rank"],
    sizes: LatentSizes,
) -> tuple[Float[Array, "batch kv heads d"], Array]:  # fmt: skip
    """The keys and values of all heads."""
    latent, turned = k[:, :, 0, : sizes.rank], k[:, :, :, sizes.rank :]
    both = _product("bkr,hcr->bkhc", latent, up)
    turned = jnp.broadcast_to(turned, (*both.shape[:3], sizes.turned))
    keys = jnp.concatenate([both[..., : sizes.key], turned], axis=-1)
    return keys, both[..., sizes.key :]


def absorbed(
    q: Float[Array, "batch q heads d"], up: Float[Array, "heads both rank"],
    sizes: LatentSizes,
) -> Float[Array, "batch q heads cached"]:  # fmt: skip
    """The queries of the one cached key."""
    of_latent = _product("bqhn,hnr->bqhr", q[..., : sizes.key], up[:, : sizes.key])
    return jnp.concatenate([of_latent, q[..., sizes.key :]], axis=-1)


def _product(formula: str, a: Array, b: Array) -> Array:
    """A product of weights in the dtype of ``a``.

    XLA accumulates products of narrow types in float32 by itself. Asked for a float32
    result, XLA:CPU refuses some of these products of bfloat16.
    """
    precision = "highest" if a.dtype.itemsize >= 4 else None
    return jnp.einsum(formula, a, b, precision=precision)


def _weights(term: Latent, given: Mapping[str, Any], inputs: tuple) -> Array:
    q, name = inputs[0], term.up
    if name not in given:
        raise ValueError(
            f"{term!r} reads {name!r}, which was not given: pass operands={{{name!r}: "
            "array}} of shape [heads, d_n + d_v, rank]"
        )
    up = jnp.asarray(given[name])
    if up.ndim != 3 or up.shape[0] != q.shape[2]:
        raise ValueError(
            f"operand {name!r} has shape {up.shape}: it must be [heads, d_n + d_v, "
            f"rank], with the {q.shape[2]} heads of q"
        )
    if up.dtype != q.dtype:
        raise ValueError(
            f"operand {name!r} has dtype {up.dtype}, q has {q.dtype}: cast them to one "
            "dtype"
        )
    return up


def _sizes(term: Latent, up: Array, q: Array, k: Array) -> LatentSizes:
    """The channels of a call.

    Raises:
      ValueError: k has several heads, or the channels do not fit together.
    """
    heads, both, rank = up.shape
    turned = k.shape[3] - rank
    key = q.shape[3] - turned
    if k.shape[2] != 1 or turned < 0 or not 0 < key < both:
        raise ValueError(
            f"{term!r}: k has shape {k.shape}, q {q.shape} and {term.up!r} {up.shape}: "
            f"k must be [batch, kv_seq, 1, {rank} + d_r], q [..., d_n + d_r], and d_n "
            f"below {both}, so that values have channels"
        )
    return LatentSizes(heads, key, turned, both - key, rank)


def _form(
    term: Latent, sizes: LatentSizes, inputs: tuple[Array, Array],
    given: Mapping[str, Any], setting: Setting,
) -> str:  # fmt: skip
    """The form of a call: the one that was asked for, else that of fewer operations."""
    if term.form is not None:
        return term.form
    q, k = inputs
    options = options_of((q, k), term.softmax, setting)
    if lists.form_of(options, 1, given) is not None:
        # A list gathers one cached row for all heads.
        return "absorbed"
    pairs = visited_pairs(lists.static_node(term.softmax.map), options.problem)
    more = sizes.expanded_flops(k.shape[1], pairs)
    return "absorbed" if sizes.absorbed_flops(q.shape[1], pairs) < more else "expanded"
