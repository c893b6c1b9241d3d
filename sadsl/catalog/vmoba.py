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
    """The chunk of the query and the chunks that hold the mass ``tau`` of all scores.

    Wu et al., VMoBA: mixture-of-block attention for video diffusion models, 2025,
    section 3; 0.25 is the code's. On a ``grid`` of time, height and width the layers
    take turns: chunks of ``frames``, a ``tile`` of every frame, a ``cube``. Scores are
    stretched from 0 to 1 in their scope: "query", "block", "head" (the paper's global
    selection) or "overall". The own chunk counts towards ``tau``, one more is always
    chosen, and where nothing can be, all is seen. ``k`` asks for the code's top-k mode:
    ``k`` chunks a query beside its own, wherever they are in the scope.
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
