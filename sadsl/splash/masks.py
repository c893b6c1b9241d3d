"""The masks of jax's splash attention, as maps.

The classes have the names, arguments and meaning of those in
``jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask``. ``mask.map``
is the map of a mask. A mask of jax is accepted wherever one of these is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from typing_extensions import override

from lowering import ir
from lowering.expr.evaluate import NumPy, evaluate
from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.named import full, where
from sadsl.splash import arrays
from sadsl.splash.arrays import Shape
from sadsl.splash.arrays import make_causal_mask as make_causal_mask
from sadsl.splash.arrays import make_chunk_attention_mask as make_chunk_attention_mask
from sadsl.splash.arrays import make_local_attention_mask as make_local_attention_mask
from sadsl.splash.arrays import make_random_mask as make_random_mask
from sadsl.splash.places import STATIC, MaskPlaces


class Mask:
    """Which keys each query sees; combined by ``&`` and ``|``.

    A subclass defines ``shape`` and ``__getitem__``, as in jax: then ``mask[:, :]`` is
    read once. The subclasses of this module define ``pairs_at`` instead.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers of queries and keys."""
        raise NotImplementedError(f"{type(self).__name__} must define shape")

    @property
    def map(self) -> IndexMap:
        """The mask as a map, for ``sadsl.attention``, ``sadsl.plan`` and ``&``."""
        return self.pairs_at(STATIC)

    def pairs_at(self, places: MaskPlaces) -> IndexMap:
        """The mask as a map whose queries and arrays stand where ``places`` says."""
        return places.dense(np.asarray(self[:, :], bool))

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = _slices(index, self.shape)
        q, k = (np.arange(x.start, x.stop) for x in (rows, columns))
        node = ir.substitute(self.map.node, {"n": ir.Const(self.shape[-1])})
        found = evaluate(node, NumPy(q[:, None], k[None, :]))
        return np.array(np.broadcast_to(found, (len(q), len(k))))

    def __and__(self, other: "Mask") -> "LogicalAnd":
        return LogicalAnd(self, other)

    def __or__(self, other: "Mask") -> "LogicalOr":
        return LogicalOr(self, other)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: write `a & b`, `a | b` for masks")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shape == other.shape and self._content == other._content

    def __hash__(self) -> int:
        return hash((self.shape, self._content))

    @property
    def _content(self) -> Any:
        return self.map


class MapMask(Mask):
    """A map as a mask: any pattern of sadsl in a model that takes splash masks.

    Raises:
      ValueError: the map varies by head, or reads arrays of a call.
    """

    def __init__(self, shape: Shape, pairs: IndexMap) -> None:
        self._shape, self._pairs = _shape(shape), pairs
        varies = any(isinstance(n, ir.ByHead) for n in ir.walk(pairs.node))
        if varies or "h" in ir.axes(pairs.node) or ir.operand_names(pairs.node):
            raise ValueError(
                f"MapMask: {pairs!r} varies by head or reads arrays of a call: give "
                "each head its mask in a MultiHeadMask, or call sadsl.attention"
            )

    @property
    @override
    def shape(self) -> Shape:
        return self._shape

    @override
    def pairs_at(self, places: MaskPlaces) -> IndexMap:
        return places.with_rows(self._pairs, None)


class FullMask(Mask):
    """Every query sees every key."""

    def __init__(self, _shape_: Shape) -> None:
        self._shape = _shape(_shape_)

    @property
    @override
    def shape(self) -> Shape:
        return self._shape

    @override
    def pairs_at(self, places: MaskPlaces) -> IndexMap:
        return full()


class ComputableMask(Mask):
    """The pairs for which a function of the positions is true.

    Args:
      shape: the numbers of queries and keys.
      mask_function: called once, on symbols, as by ``sadsl.where``.
      shard_count: its square divides the number of queries; without further effect.

    Attributes:
      q_sequence: the position of each query, as in jax: a permutation of them, for a
        context that is split in parts of equal work. A subclass may set it.
    """

    def __init__(
        self, shape: Shape, mask_function: Callable[..., Any], shard_count: int = 1
    ) -> None:
        self._shape, self.mask_function = _shape(shape), mask_function
        at_least(type(self).__name__, "shard_count", shard_count, 1)
        if self._shape[0] % shard_count**2:
            raise ValueError(
                f"{type(self).__name__}: shard_count={shard_count}, squared, must "
                f"divide the {self._shape[0]} queries"
            )
        self.q_sequence = np.arange(self._shape[0], dtype=np.int32)

    @property
    @override
    def shape(self) -> Shape:
        return self._shape

    @override
    def pairs_at(self, places: MaskPlaces) -> IndexMap:
        return places.with_rows(where(self.mask_function), self.q_sequence)


# The name under which users of jax subclass it.
_ComputableMask = ComputableMask


class CausalMask(ComputableMask):
    """``k <= q + offset``."""

    def __init__(self, shape: Shape, offset: int = 0, shard_count: int = 1) -> None:
        self.offset = offset
        super().__init__(shape, arrays.causal_pairs(offset), shard_count)


class LocalMask(ComputableMask):
    """``q - left + offset <= k <= q + right + offset``; None is no limit."""

    def __init__(
        self,
        shape: Shape,
        window_size: tuple[int | None, int | None],
        offset: int,
        shard_count: int = 1,
    ) -> None:
        self.window_size, self.offset = window_size, offset
        super().__init__(shape, arrays.local_pairs(window_size, offset), shard_count)


class ChunkedCausalMask(ComputableMask):
    """Causal within chunks of ``chunk_size`` positions, as in Llama 4."""

    def __init__(self, shape: Shape, chunk_size: int, shard_count: int = 1) -> None:
        self.chunk_size = chunk_size
        super().__init__(shape, arrays.chunked_pairs(chunk_size), shard_count)


class NumpyMask(Mask):
    """A boolean array ``[q_seq, kv_seq]``."""

    def __init__(self, array: Bool[np.ndarray, "q_seq kv_seq"]) -> None:
        if getattr(array, "ndim", None) != 2 or array.dtype != bool:
            raise ValueError(
                "NumpyMask takes a NumPy array [q_seq, kv_seq] of bools, not "
                f"{getattr(array, 'dtype', type(array).__name__)} of shape "
                f"{getattr(array, 'shape', ())}"
            )
        self.array = array

    @property
    @override
    def shape(self) -> Shape:
        return self.array.shape

    @override
    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]

    @property
    @override
    def _content(self) -> bytes:
        return self.array.tobytes()


class _Pair(Mask):
    """Two masks of the same shape."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = as_mask(left), as_mask(right)
        if self.left.shape != self.right.shape:
            raise ValueError(
                f"masks of shapes {self.left.shape} and {self.right.shape} are "
                "combined: both must have the same shape"
            )

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return self.left.shape

    @override
    def __getitem__(self, index: Any) -> np.ndarray:
        return self._join(self.left[index], self.right[index])

    @override
    def pairs_at(self, places: MaskPlaces) -> IndexMap:
        return self._join(self.left.pairs_at(places), self.right.pairs_at(places))

    @staticmethod
    def _join(a: Any, b: Any) -> Any:
        raise NotImplementedError

    @property
    @override
    def _content(self) -> Any:
        return type(self), self.left, self.right


class LogicalAnd(_Pair):
    """The pairs of both masks."""

    @staticmethod
    @override
    def _join(a: Any, b: Any) -> Any:
        return a & b


class LogicalOr(_Pair):
    """The pairs of either mask."""

    @staticmethod
    @override
    def _join(a: Any, b: Any) -> Any:
        return a | b


class MultiHeadMask(Mask):
    """A mask for each query head, all of one shape."""

    def __init__(self, masks: Sequence[Any]) -> None:
        if not masks:
            raise ValueError("MultiHeadMask: give a mask for each query head, not none")
        # Heads often share one object, which is traced once.
        found = {id(mask): as_mask(mask) for mask in masks}
        self.masks = tuple(found[id(mask)] for mask in masks)
        if any(isinstance(mask, MultiHeadMask) for mask in self.masks):
            raise ValueError("MultiHeadMask: a head takes a mask of one head")
        shapes = {mask.shape for mask in self.masks}
        if len(shapes) > 1:
            raise ValueError(
                f"MultiHeadMask: the masks have the shapes {sorted(shapes)}: all must "
                "have the same"
            )

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return (len(self.masks), *self.masks[0].shape)

    @override
    def __getitem__(self, index: Any) -> np.ndarray:
        head, *rest = index
        if isinstance(head, int):
            return self.masks[head][tuple(rest)]
        return np.stack([mask[tuple(rest)] for mask in self.masks[head]])

    @property
    @override
    def _content(self) -> tuple[Mask, ...]:
        return self.masks


def as_mask(mask: Any) -> Mask:
    """A mask of this module for one of jax's; its class is known by name.

    Raises:
      TypeError: it is no mask.
    """
    if isinstance(mask, Mask):
        return mask
    names = {cls.__name__ for cls in type(mask).__mro__}
    for pair in (LogicalAnd, LogicalOr):
        if pair.__name__ in names:
            return pair(mask.left, mask.right)
    if "MultiHeadMask" in names:
        return MultiHeadMask(mask.masks)
    if "FullMask" in names:
        return FullMask(mask.shape)
    if "_ComputableMask" in names:
        found = ComputableMask(mask.shape, mask.mask_function)
        found.q_sequence = np.asarray(mask.q_sequence)
        return found
    if "Mask" in names:
        rows, columns = mask.shape
        return NumpyMask(np.asarray(mask[0:rows, 0:columns], bool))
    raise TypeError(
        f"{mask!r} is no mask: give one of sadsl.splash or of jax's splash attention"
    )


def _shape(shape: Any) -> Shape:
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(f"shape={shape!r} of a mask must be a tuple (q_seq, kv_seq)")
    return int(shape[0]), int(shape[1])


def _slices(index: Any, shape: tuple[int, ...]) -> list[slice]:
    """The slices of an index of two, with ends that are known.

    Raises:
      NotImplementedError: it is none, or has a step.
    """
    parts = index if isinstance(index, tuple) else (index,)
    found = [s for s in parts if isinstance(s, slice) and s.step in (None, 1)]
    if len(parts) != 2 or len(found) != 2:
        raise NotImplementedError(
            f"mask[{index!r}]: write mask[a:b, c:d], with two slices without a step"
        )
    return [slice(*s.indices(n)) for s, n in zip(found, shape, strict=True)]
