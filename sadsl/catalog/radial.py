"""Radial attention: windows in space that halve as distance in time doubles."""

from functools import reduce
from operator import or_

from sadsl.maps.base import IndexMap
from sadsl.maps.grids import Grid
from sadsl.maps.named import full, keys, offsets, strided, window


def radial(
    num_frames: int,
    tokens_per_frame: int,
    *,
    text_tokens: int = 0,
    sink_frames: int = 1,
) -> IndexMap:
    """A token sees frames through windows that shrink with their distance in time.

    With ``s = tokens_per_frame``, frames ``p = 2**g`` up to ``2 * p - 1`` apart see
    less than ``s / p`` tokens to either side. Where ``p`` exceeds ``s``, they see the
    same token in every ``ceil(p / s)``-th frame. All see the first frame. Text tokens
    see everything and are seen by all.

    Li et al., Radial attention: O(n log n) sparse attention with energy decay for long
    video generation, 2025, section 4. This is the mask of the paper. The released code
    widens the windows by a decay factor to at least a block, splits by 128, has frame 0
    for one of its models only, and rounds to blocks; its text tokens are as here.

    Args:
      num_frames: frames of the video.
      tokens_per_frame: tokens of a frame.
      text_tokens: tokens after the video.
      sink_frames: first frames that all tokens see.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.radial(4, 2).dense(8)[0].astype(int))
      [[1 1 1 1 1 0 1 0]
       [1 1 1 1 0 1 0 1]
       [1 1 1 1 1 1 1 0]
       [1 1 1 1 1 1 0 1]
       [1 1 1 1 1 1 1 1]
       [1 1 1 1 1 1 1 1]
       [1 1 1 0 1 1 1 1]
       [1 1 0 1 1 1 1 1]]
    """
    grid = Grid(t=num_frames, s=tokens_per_frame)

    def ring(p: int) -> IndexMap:
        """Frames ``p`` to ``2 * p - 1`` apart; nearer ones see more wherever p <= s."""
        time = window(2 * p - 1, 2 * p - 1) if 2 * p < num_frames else full()
        if p == 1:
            return grid.product(t=time, extra=text_tokens)
        if p > tokens_per_frame:
            far = strided(-(-p // tokens_per_frame)) - window(p - 1, p - 1)
            return grid.product(t=time & far, s=offsets({0}), extra=text_tokens)
        side = tokens_per_frame // p - 1
        return grid.product(t=time, s=window(side, side), extra=text_tokens)

    rings = [ring(2**g) for g in range(max(1, (int(num_frames) - 1).bit_length()))]
    return reduce(or_, rings) | keys(0, sink_frames * tokens_per_frame)
