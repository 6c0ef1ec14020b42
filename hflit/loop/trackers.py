"""The trackers of transformers that `report_to` names."""

from __future__ import annotations

import os

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Trackers that write into output_dir, and where else they can be sent.
IN_OUTPUT_DIR = {
    "tensorboard": "a folder in the environment variable TENSORBOARD_LOGGING_DIR",
    "codecarbon": "another tracker",
}
TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def make_trackers(args: TrainingArguments) -> list[TrainerCallback]:
    """Make the callbacks of all trackers in `report_to`.

    A tracker with a place of its own (MLflow, Weights & Biases, ...) keeps to it. One that writes
    into `output_dir` must be given one: a run without `output_dir` leaves no files behind.

    Raises:
        ValueError: The name is unknown, or the tracker has no place to write to.
        ImportError: Its package is not installed.
    """
    trackers = []
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["all", "none", *INTEGRATION_TO_CALLBACK])
            raise ValueError(f"Unknown report_to={name!r}. Choose among: {known}.")
        elsewhere = name == "tensorboard" and os.environ.get("TENSORBOARD_LOGGING_DIR")
        if name in IN_OUTPUT_DIR and not args.output_dir and not elsewhere:
            raise ValueError(
                f"report_to={name!r} writes into output_dir. Give one, or {IN_OUTPUT_DIR[name]}."
            )
        try:
            trackers.append(INTEGRATION_TO_CALLBACK[name]())
        except (ImportError, RuntimeError, ValueError) as error:
            raise ImportError(f"report_to={name!r} cannot be used: {error}") from None
    return trackers
