"""Rotary frequencies for contexts that are longer than those of pre-training."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np


def rates_of(theta: float, channels: int) -> np.ndarray:
    """The angle that each pair of channels turns by in one position, float64."""
    pairs = channels // 2
    return theta ** (-np.arange(pairs) / pairs)


def _check_factor(name: str, factor: float) -> None:
    if not factor >= 1:
        raise ValueError(
            f"{name}: factor={factor} must be at least 1: it is how many times longer "
            "the context becomes"
        )


@dataclass(frozen=True)
class LinearScaling:
    """Divides every frequency by ``factor``.

    Chen et al., Extending context window of large language models via positional
    interpolation, 2023, section 2.3.

    Raises:
      ValueError: ``factor`` is below 1.

    Example:
      >>> LinearScaling(4.0).rates(10000.0, 4).tolist()
      [0.25, 0.0025]
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor("LinearScaling", self.factor)

    def rates(self, theta: float, channels: int) -> np.ndarray:
        """The angle of each pair in one position."""
        return rates_of(theta, channels) / self.factor

    @property
    def magnitude(self) -> float:
        """The factor of cosine and sine."""
        return 1.0


@dataclass(frozen=True)
class NtkScaling:
    """Raises ``theta``, so that the slowest pair slows by ``factor``, the first by 1.

    ``theta * factor ** (channels / (channels - 2))``. bloc97, NTK-aware scaled RoPE,
    2023, in the form of Peng et al., YaRN, 2023, section 3.1.

    Raises:
      ValueError: ``factor`` is below 1, or only 2 channels turn.

    Example:
      >>> NtkScaling(4.0).rates(10000.0, 4).round(6).tolist()
      [1.0, 0.0025]
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor("NtkScaling", self.factor)

    def rates(self, theta: float, channels: int) -> np.ndarray:
        """The angle of each pair in one position."""
        if channels < 4:
            raise ValueError(
                f"NtkScaling: channels={channels} have one pair, whose frequency does "
                "not depend on theta: use LinearScaling"
            )
        power = channels / (channels - 2)
        return rates_of(theta * self.factor**power, channels)

    @property
    def magnitude(self) -> float:
        """The factor of cosine and sine."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Slows only the pairs that turn seldom within the original context.

    Peng et al., YaRN: efficient context window extension of large language models,
    2023, sections 3.2 and 3.4. Pair ``i`` turns ``r = original_length * rate / (2 pi)``
    times. From ``beta_fast`` turns on it keeps its rate, up to ``beta_slow`` its rate
    is divided by ``factor``; between them the two are mixed. Cosine and sine grow by
    ``0.1 ln(factor) + 1``, so that scores grow by its square.

    Attributes:
      factor: how many times longer the context becomes.
      original_length: positions of the original context.
      beta_fast, beta_slow: see above.
      attention_factor: the factor of cosine and sine; None for the one above.
      ramp: what the mixture is linear in. "turns": in ``r``, as the paper has it.
        "index": in ``i``, between the real ``i`` with ``beta_fast`` and ``beta_slow``
        turns (gpt-oss). "whole_index": between these rounded down and up, as the
        authors' code has it (DeepSeek).

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> YarnScaling(4.0, 100).rates(10000.0, 4).round(4).tolist()
      [0.6109, 0.0025]
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    ramp: Literal["turns", "index", "whole_index"] = "turns"

    def __post_init__(self) -> None:
        _check_factor("YarnScaling", self.factor)
        if self.original_length < 1:
            raise ValueError(
                f"YarnScaling: original_length={self.original_length} must be at least "
                "1: it is the context of pre-training"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"YarnScaling: beta_fast={self.beta_fast} must be above "
                f"beta_slow={self.beta_slow}, and both above 0"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(
                f"YarnScaling: attention_factor={self.attention_factor} must be "
                "positive, or None"
            )

    def rates(self, theta: float, channels: int) -> np.ndarray:
        """The angle of each pair in one position."""
        rates = rates_of(theta, channels)
        kept = self._kept(rates, theta)
        return rates * kept + rates / self.factor * (1 - kept)

    def _kept(self, rates: np.ndarray, theta: float) -> np.ndarray:
        """The share of its own rate that each pair keeps."""
        slow, fast = self.beta_slow, self.beta_fast
        if self.ramp == "turns":
            turns = self.original_length * rates / (2 * math.pi)
            return np.clip((turns - slow) / (fast - slow), 0, 1)
        # Solves original_length * theta ** (-i / pairs) = 2 pi turns for i.
        pairs = len(rates)
        low, high = (
            pairs * math.log(self.original_length / (2 * math.pi * turns), theta)
            for turns in (fast, slow)
        )
        if self.ramp == "whole_index":
            low, high = math.floor(low), math.ceil(high)
        low = max(low, 0)
        high = max(low, min(high, 2 * pairs - 1))
        # A ramp of no width is a step.
        width = high - low if high != low else 0.001
        return 1 - np.clip((np.arange(pairs) - low) / width, 0, 1)

    @property
    def magnitude(self) -> float:
        """The factor of cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1


Scaling: TypeAlias = LinearScaling | NtkScaling | YarnScaling
