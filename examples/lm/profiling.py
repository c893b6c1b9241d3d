"""A profiler trace of some steps, for TensorBoard, XProf or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax


class Profile:
    """Traces ``num_steps`` steps into ``folder``, from the second of this process on.

    The first step includes warming up. Fewer are traced if fewer are left. Use it as a
    context manager, and ``with profile.step(number):`` around each step.
    """

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.traced: list[int] = []
        self._running = False
        self._warm = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds a step, all of whose results are waited for."""
        if self._warm and len(self.traced) < self.num_steps:
            if not self._running:
                jax.profiler.start_trace(self.folder)
                self._running = True
            self.traced.append(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._warm = True
        if len(self.traced) == self.num_steps:
            self._stop()

    @property
    def said(self) -> str:
        """Which steps were traced, and where the trace is."""
        if not self.traced:
            return "no step was left to profile: the first one is never traced"
        first, last = self.traced[0], self.traced[-1]
        return f"profile of steps {first:,} to {last:,}: {self.folder}"

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
