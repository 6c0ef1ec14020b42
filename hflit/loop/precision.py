"""Mixed precision as `transformers.Trainer` does it: autocast around the forward only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.plugins import MixedPrecision


class ForwardPrecision(MixedPrecision):
    """Autocast that a task enters around its model, and nothing else.

    Lightning's own plugin wraps the whole training step, so backward runs inside autocast too;
    with dropout on, that moves the losses by 1e-4.
    """

    def forward_autocast(self) -> AbstractContextManager[Any]:
        """The context for a call of the model."""
        return self.autocast_context_manager()

    def forward_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]  # the base yields
        """Lightning's context for whole steps: does nothing here."""
        return nullcontext()
