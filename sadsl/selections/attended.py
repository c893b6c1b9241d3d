"""``attended``: scores cells by the attention that a query pays to pooled keys.

Native sparse attention calls these scores the importance of a block. They are the
softmax weights of its compressed branch, so all they need are the pooled keys, and
where each of them lies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.precision import widened
from sadsl.maps.base import at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.selections.base import Content
from sadsl.selections.tiles import Partition, num_parts


@dataclass(frozen=True, repr=False)
class Attended:
    """The softmax weight of pooled keys in a cell; see ``attended``."""

    length: int = 32
    stride: int = 16
    keys: str | None = None

    def __post_init__(self) -> None:
        at_least("attended", "length", self.length, 1)
        at_least("attended", "stride", self.stride, 1)
        if self.keys is not None:
            check_operand_name("attended: keys", self.keys, "None")

    @property
    def operands(self) -> Mapping[str, int]:
        """The pooled keys, if a layer makes them."""
        return {} if self.keys is None else {self.keys: 3}

    def __repr__(self) -> str:
        return call_text(self)

    def count(self, length: int) -> int:
        """The number of whole windows in a sequence."""
        return max(0, (length - self.length) // self.stride + 1)

    def entries(self, content: Content) -> Float[Array, "batch heads entries dim"]:
        """The pooled keys of a call.

        Raises:
          ValueError: the operand was not given, or has another shape or dtype.
        """
        batch, heads, length, dim = content.k.shape
        if self.keys is None:
            means = window_means(
                jnp.swapaxes(content.k, 1, 2), self.length, self.stride
            )
            return jnp.swapaxes(means, 1, 2)
        found = content.operand(self.keys, "pooled keys")
        wanted = self.count(length), heads, dim
        if found.shape[1:] != wanted or found.shape[0] not in (1, batch):
            raise ValueError(
                f"operand {self.keys!r} has shape {found.shape}: {self!r} needs a key "
                f"for each whole window of {length} tokens, [batch or 1, *{wanted}]"
            )
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                f"operand {self.keys!r} has dtype {found.dtype}: it must be of floats"
            )
        found = jnp.broadcast_to(found, (batch, *wanted))
        return jnp.swapaxes(found, 1, 2)

    def shared(
        self,
        weights: Float[Array, "*axes entries"],
        block: Partition,
        length: int,
    ) -> Float[Array, "*axes cells"]:
        """Gives each cell the weights of the windows that overlap it.

        A window counts by the number of its strides that lie in the cell. The overlap
        repeats from cell to cell, so it takes a few strided sums.

        Raises:
          ValueError: the stride does not divide the cells.
        """
        if not isinstance(block, int) or block % self.stride:
            raise ValueError(
                f"{self!r} scores cells of {block!r} keys: the stride must divide them"
            )
        each, cells = block // self.stride, num_parts(block, length)
        before = -(-self.length // self.stride) - 1
        after = max(0, cells * each - weights.shape[-1])
        widths = [(0, 0)] * (weights.ndim - 1) + [(before, after)]
        padded = jnp.pad(weights, widths)
        total = jnp.zeros((*weights.shape[:-1], cells), weights.dtype)
        for place in range(-before, each):
            start = place * self.stride
            inside = min(start + self.length, block) - max(start, 0)
            first = place + before
            own = padded[..., first : first + (cells - 1) * each + 1 : each]
            total = total + own * np.float32(inside / self.stride)
        return total


def attended(length: int = 32, stride: int = 16, keys: str | None = None) -> Attended:
    """Scores a cell by the attention that its queries pay to pooled keys in it.

    Window ``j`` holds the ``length`` keys from ``j * stride`` on, and has one pooled
    key. A query's softmax goes over the windows that end by its position, with the
    scale of the call. A window adds its weight to each cell in proportion to the part
    of it, in strides, that lies in the cell (Yuan et al., Native sparse attention:
    hardware-aligned and natively trainable sparse attention, 2025, section 3.3.2,
    equations 8 to 10, "according to their spatial relationship"; the index that is
    printed there reaches before the block instead). The scores of heads that choose
    together are averaged, which ranks as their sum does.

    It is for ``topk``, ``threshold`` and ``mass``, which compute it for some queries at
    a time, and for cells whose keys the stride divides.

    Args:
      length, stride: those of the ``compressed`` term, or of the entries of ``over``.
      keys: the operand of the pooled keys ``[batch or 1, windows, num_kv_heads,
        head_dim]``, one for each whole window, as a layer makes them; None: the means
        of the keys.

    Raises:
      ValueError: a size is below 1, or ``keys`` is not an identifier.

    Example:
      >>> import sadsl as sa
      >>> score = attended(32, 16, keys="short_k")
      >>> sa.topk(16, block_q=1, score=score, scope="group")
      topk(16, block_q=1, score=attended(keys='short_k'), scope='group')
    """
    return Attended(length, stride, keys)


@partial(jax.jit, static_argnums=(1, 2))
def window_means(
    x: Float[Array, "batch seq heads dim"], length: int, stride: int
) -> Float[Array, "batch windows heads dim"]:
    """The mean of each whole window of ``length``, accumulated in float32 at least.

    Example:
      >>> import jax.numpy as jnp
      >>> window_means(jnp.arange(6.0).reshape(1, 6, 1, 1), 4, 2).ravel().tolist()
      [1.5, 3.5]
    """
    summed = widened(x)
    window, step = (1, length, 1, 1), (1, stride, 1, 1)
    zero = np.zeros((), summed.dtype)
    total = jax.lax.reduce_window(summed, zero, jax.lax.add, window, step, "valid")
    return (total / length).astype(x.dtype)
