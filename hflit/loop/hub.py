"""Uploads to the Hugging Face Hub while a run goes on and at its end."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hflit.loop.folders import MARK, RANDOM, SCALE, SHARES, STATE, TENSORS

logger = logging.getLogger(__name__)

# What only a resume reads of a checkpoint folder; the rest is the model and its tokenizer.
RESUME_FILES = (*TENSORS, SHARES, SCALE, STATE, RANDOM, MARK)


class HubUpload(TrainerCallback):
    """Makes the repository, uploads each checkpoint as `hub_strategy` says, and the end result.

    `end` uploads once, when the run is over. `every_save` also uploads the model at each
    checkpoint; `checkpoint` adds the checkpoint itself as `last-checkpoint`, `all_checkpoints`
    under its own name. Uploads in a run go on in the background; the one at its end is waited for.
    """

    def __init__(self) -> None:
        self.repository: str | None = None
        self.running: list[Future[Any]] = []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Make the repository, before any time is spent on training."""
        if state.is_world_process_zero and self.repository is None:
            name = args.hub_model_id or Path(args.output_dir or "").absolute().name
            self.repository = huggingface_hub.create_repo(
                name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True
            ).repo_id

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Upload a checkpoint, unless the one before is still on its way."""
        busy = not all(job.done() for job in self.running)
        if (
            self.repository is None
            or args.hub_strategy == HubStrategy.END
            or (busy and not args.hub_always_push)
        ):
            return
        self._report_failures()
        output_dir = Path(args.output_dir or "")
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        left_out = shutil.ignore_patterns(*RESUME_FILES)
        try:  # copied, as the checkpoint may be deleted before it is uploaded
            shutil.copytree(checkpoint, output_dir, ignore=left_out, dirs_exist_ok=True)
        except OSError as error:  # shutil's own of several files, too
            logger.warning("%s is not uploaded: it cannot be copied (%s).", checkpoint, error)
            return
        message = f"Training in progress, step {state.global_step}"
        jobs = [self._upload(args, output_dir, message, run_as_future=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else checkpoint.name
            message += ", checkpoint"
            jobs.append(
                self._upload(args, checkpoint, message, path_in_repo=place, run_as_future=True)
            )
        self.running = [job for job in self.running if not job.done()] + jobs

    def finish(self, args: TrainingArguments) -> None:
        """Wait for what is on its way, then upload `output_dir` as it is now."""
        if self.repository is not None:
            wait(self.running)
            self._report_failures()
            self._upload(args, Path(args.output_dir or ""), "End of training")

    def _upload(self, args: TrainingArguments, folder: Path, message: str, **options: Any) -> Any:
        return huggingface_hub.upload_folder(
            repo_id=str(self.repository),
            folder_path=folder,
            commit_message=message,
            token=args.hub_token,
            revision=args.hub_revision,
            # Hidden ones are being written, or on their way out.
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f".{PREFIX_CHECKPOINT_DIR}-*"],
            **options,
        )

    def _report_failures(self) -> None:
        for job in self.running:
            if job.done() and job.exception() is not None:
                logger.warning("An upload to the Hub failed: %s", type(job.exception()).__name__)
