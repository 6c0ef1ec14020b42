"""What a run adds up from one update to the next: its loss, tokens and operations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from hflit.ranks import total


class RunningSums:
    """Sums that stay on the device until somebody asks, which waits for it.

    What they tell is of all processes, which therefore have to ask together; once `is_alone`, as
    if the others were like this one.

    Args:
        model: Whose operations are counted: 6 for each weight, but for embeddings, and token.
        device: Of the losses.
        args: `world_size` and `logging_nan_inf_filter`.

    Attributes:
        step_logged: The last update whose loss was taken.
        is_alone: Whether the other processes answer no more.
    """

    is_alone = False

    def __init__(self, model: Any, device: torch.device, args: TrainingArguments) -> None:
        self.world = args.world_size
        self.leaves_out_nonfinite = args.logging_nan_inf_filter
        self.flos_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        self.padded_tokens = self.computed_tokens = 0
        self.tokens = torch.zeros((), dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)
        self.loss_taken = 0.0
        self.step_logged = self.steps_unsummed = 0

    def add(self, update: dict[str, Any], step: int) -> None:
        """Add what one update gave, see `TaskModule.training_step`.

        Args:
            update: Its `losses`, `tokens`, `padded_tokens` and `computed_tokens`.
            step: Updates before it.
        """
        for loss in update["losses"]:  # one by one: transformers' order of summing
            if self.leaves_out_nonfinite:
                # In the log only, a step without a finite loss counts as the mean of those before.
                mean = self.loss / (1 + step - self.step_logged)
                loss = torch.where(torch.isfinite(loss), loss, mean)
            self.loss += loss
        self.padded_tokens += update["padded_tokens"]
        self.computed_tokens += update["computed_tokens"]
        self.tokens += update["tokens"]

    def take_loss(self, step: int) -> float:
        """Mean loss of the updates since it was last taken."""
        loss = self._mean_loss()
        mean = loss / (step - self.step_logged)
        self.loss.zero_()
        self.loss_taken += loss
        self.step_logged = step
        return mean

    def train_loss(self, step: int) -> float:
        """Mean loss of the whole run, as far as it is known."""
        return (self.loss_taken + self._mean_loss()) / max(step - self.steps_unsummed, 0.001)

    def take_flos(self) -> float:
        """Operations since they were last taken."""
        tokens = torch.tensor(self.padded_tokens, device=self.loss.device)
        self.padded_tokens = 0
        return float(int(self._total(tokens)) * self.flos_per_token)

    def padding_share(self) -> float:
        """Share of padding among the tokens that were computed."""
        read = torch.stack([self.tokens, torch.full_like(self.tokens, self.computed_tokens)])
        tokens, computed = self._total(read).tolist()
        return float(1 - tokens / computed) if computed else 0.0

    def begin_after(self, step: int) -> None:
        """Go on after some updates of which nothing is known."""
        self.step_logged = self.steps_unsummed = step

    def saved(self) -> dict[str, Any]:
        """What `load` needs to go on."""
        return {
            "loss": self._mean_loss(),
            "loss_logged": self.loss_taken,
            "step_logged": self.step_logged,
            "steps_unsummed": self.steps_unsummed,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what was saved."""
        self.loss += saved["loss"]
        self.loss_taken, self.step_logged = saved["loss_logged"], saved["step_logged"]
        self.steps_unsummed = saved["steps_unsummed"]

    def _mean_loss(self) -> float:
        return float(self._total(self.loss) / self.world)

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.world if self.is_alone else total(values, self.world)
