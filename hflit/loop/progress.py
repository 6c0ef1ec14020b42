"""The progress bar: loss, learning rate and tokens per second; in a notebook, transformers' own."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from transformers import PrinterCallback, TrainerCallback


class ProgressBar(RichProgressBar):
    """Lightning's rich bar with the figures of the last update.

    Tokens per second counts real tokens, not padding, since the bar was last drawn.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1, leave=True)
        self.latest: dict[str, Any] = {}
        self.tokens = 0.0
        self.rate = 0.0
        self.since = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the figures of this update, then draw."""
        self.latest = outputs
        self.tokens += outputs["tokens"]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        if not self.latest:
            return {}
        if self.tokens:  # drawn again without an update, the bar keeps its rate
            now = time.monotonic()
            self.rate = float(self.tokens) / max(now - self.since, 1e-9)
            self.tokens, self.since = 0.0, now
        return {
            "loss": f"{float(sum(self.latest['losses'])):.4f}",
            "lr": f"{self.latest['learning_rate']:.1e}",
            "tokens/s": f"{self.rate:,.0f}",
        }


def notebook_table(world: int) -> TrainerCallback:
    """What a cell shows of a run: transformers' bar above a table of figures.

    Rich's bar needs ipywidgets there. Of `world` processes made by forks none can reach the cell
    with more than what it prints: the log entries.
    """
    from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

    return NotebookProgressCallback() if world == 1 else PrinterCallback()
