"""The PyTorch half of cpu_attention.py: reads cases as JSON lines, answers seconds.

It runs in its own interpreter, which needs torch and nothing else of this project.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

compiled_flex = torch.compile(flex_attention)


def arrays(seq_len: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 1, heads, seq_len, head_dim
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def flex(pairs: Callable, seq_len: int, heads: int, head_dim: int) -> Callable:
    """Compiled flex_attention over the pairs of a predicate."""
    q, k, v, _ = arrays(seq_len, heads, head_dim)
    mask = create_block_mask(pairs, None, None, seq_len, seq_len, device="cpu")

    def run() -> None:
        with torch.no_grad():
            compiled_flex(q, k, v, block_mask=mask)

    return run


@cache
def flex_window(seq_len: int, heads: int, head_dim: int, window: int) -> Callable:
    def pairs(b: int, h: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q - k <= window)

    return flex(pairs, seq_len, heads, head_dim)


@cache
def flex_causal(seq_len: int, heads: int, head_dim: int, window: int) -> Callable:
    def pairs(b: int, h: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k <= q

    return flex(pairs, seq_len, heads, head_dim)


@cache
def causal_with_gradient(
    seq_len: int, heads: int, head_dim: int, window: int
) -> Callable:
    q, k, v, do = arrays(seq_len, heads, head_dim)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        o = scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(o, inputs, do)

    return run


CASES = {
    "flex window": flex_window,
    "flex causal": flex_causal,
    "causal with gradient": causal_with_gradient,
}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({"version": torch.__version__}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        run = CASES[case.pop("name")](**case)
        begin = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
