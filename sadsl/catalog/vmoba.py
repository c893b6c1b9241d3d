"""VMoBA: mixture of block attention for video, with chunks that change by layer."""

from sadsl.maps.base import IndexMap
from sadsl.selections import mass, rules, scored, tiles, topk, within
from sadsl.selections.cells import Scope


def vmoba(
    grid: tuple[int, int, int],
    layer: int,
    *,
    frames: int,
    tile: tuple[int, int],
    cube: tuple[int, int, int],
    tau: float = 0.25,
    k: int | None = None,
    scope: Scope = "head",
) -> IndexMap:
    """A query sees its own chunk, and the chunks that hold a share of all scores.

    On a ``grid`` of time, height and width the layers take turns: chunks of ``frames``
    whole frames, a ``tile`` of every frame, a ``cube``. One chunk besides the own is
    always chosen. Where none can be chosen, all keys are seen.

    Wu et al., VMoBA: mixture-of-block attention for video diffusion models, 2025,
    section 3; 0.25 is the code's.

    Args:
      grid: frames, height and width of the video, in tokens.
      layer: number of the layer, from 0; it says which chunks are used.
      frames: frames in a chunk of the first kind.
      tile: height and width of a chunk of the second kind.
      cube: frames, height and width of a chunk of the third kind.
      tau: share of the scores that the seen chunks hold, the own included. Scores are
        stretched from 0 to 1 in their scope.
      k: the code's top-k mode instead: ``k`` chunks for each query besides its own,
        wherever they are in the scope.
      scope: "query", "block", "head" (the paper's global selection) or "overall".

    Example:
      >>> from sadsl import catalog
      >>> sizes = {"frames": 2, "tile": (2, 2), "cube": (2, 2, 2)}
      >>> print(catalog.vmoba((4, 4, 4), layer=1, k=3, **sizes))
      topk(3, block=tiles((4, 4, 4), (4, 2, 2)), block_q=1, scope='head',
      forced=within(tiles((4, 4, 4), (4, 2, 2))),
      rules=rules(forced_counts=False, otherwise='eligible'))
    """
    shapes = (frames, *grid[1:]), (grid[0], *tile), cube
    chunk = tiles(grid, shapes[layer % 3])
    own = within(chunk)
    if k is not None:
        rule = rules(forced_counts=False, otherwise="eligible")
        return topk(k, block=chunk, block_q=1, scope=scope, forced=own, rules=rule)
    score = scored("mean", normalise="minmax")
    rule = rules(at_least=1, otherwise="eligible")
    return mass(
        tau, block=chunk, block_q=1, score=score, scope=scope, forced=own, rules=rule
    )
