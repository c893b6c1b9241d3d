"""Metrics of a run as JSON lines, one line for each step."""

import json
from pathlib import Path

from lm.checkpoints import History
from lm.files import replace_file
from lm.training import TrainConfig


class Metrics:
    """The file ``path``, a copy of the run's ``History`` that grows with each step.

    A line has ``step`` (from 1), ``loss`` (bits per byte of the batch), ``lr``,
    ``grad_norm`` (before clipping), ``tokens_per_second``, ``seconds`` (of the step),
    and ``valid_loss`` at steps with a validation. One of several processes ``writes``.
    """

    def __init__(self, path: Path, config: TrainConfig, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.tokens = config.tokens_per_step
        self.rates = config.rates().tolist()

    def start(self, history: History) -> None:
        """Writes the lines of the finished steps.

        A run that was killed may have lines of steps after its last checkpoint. It
        repeats these steps, so their lines go.
        """
        if not self.writes:
            return
        valid = {int(step): bits for step, bits in history.valid}
        lines = [
            self._line(history, step, valid.get(step))
            for step in range(1, history.step + 1)
        ]
        replace_file(self.path, lambda part: part.write_text("".join(lines)))

    def append(self, history: History) -> None:
        """Adds the line of the last step. Other processes see it at once."""
        if not self.writes:
            return
        step, bits = history.valid[-1] if history.valid else (0, None)
        line = self._line(history, history.step, bits if step == history.step else None)
        with self.path.open("a") as file:
            file.write(line)

    def _line(self, history: History, step: int, valid: float | None) -> str:
        seconds = history.seconds[step - 1]
        numbers = {
            "step": step,
            "loss": history.train[step - 1],
            "lr": self.rates[step - 1],
            "grad_norm": history.grad_norm[step - 1],
            "tokens_per_second": self.tokens / seconds,
            "seconds": seconds,
            **({} if valid is None else {"valid_loss": valid}),
        }
        return json.dumps(numbers, allow_nan=False) + "\n"
