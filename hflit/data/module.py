"""The data module: reads, checks and tokenizes both splits, then hands out batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as L
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from hflit.data.batching import BatchOrder, Collator, TokenRows, WindowLoader
from hflit.data.tokenization import Tokenization

logger = logging.getLogger(__name__)

SPLITS = {"train": "training", "validation": "validation"}  # name -> how errors call it


class DataModule(L.LightningDataModule):
    """Turns the user's rows into windows for training and batches for evaluation.

    Args:
        train: Rows to learn from.
        validation: Rows to evaluate on, or None.
        tokenization: How a row becomes token ids; it is fitted to the training rows.
        args: Batch sizes, seeds and loader options.
        tokenizers: Processes that tokenize; None for the main process alone.
        tokenizebatch: Rows tokenized at a time. Never changes the result.
        cache: Keep tokenized rows in the Hugging Face data sets cache for the next run, whatever
            the kind of data, and read them from disk as needed; False holds them in memory.
        parity: Draw masks from the global random numbers, as transformers does; otherwise from a
            seed of each batch.
    """

    def __init__(
        self,
        train: Any,
        validation: Any,
        tokenization: Tokenization,
        args: TrainingArguments,
        tokenizers: int | None = None,
        tokenizebatch: int = 1000,
        cache: bool = True,
        parity: bool = False,
    ) -> None:
        super().__init__()
        self.data = {"train": train, "validation": validation}
        self.readers: dict[str, Callable[..., Any]] = dict.fromkeys(SPLITS, self.read)
        self.tokenization = tokenization
        self.args = args
        self.tokenizers = tokenizers
        self.tokenizebatch = tokenizebatch
        self.cache = cache
        self.parity = parity
        self.rows: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}

    @staticmethod
    def read(
        data: Any,
        columns: list[str],
        split: str,
        converters: dict[str, Callable[[Any], Any]],
    ) -> datasets.Dataset:
        """The user's rows as a `datasets.Dataset` of the named columns.

        Args:
            data: The user's rows.
            columns: Names to keep.
            split: How errors call the data.
            converters: Column -> what brings its values to one kind, before they become Arrow.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenize; whatever is wrong with the data is raised here."""
        if self.tokens:  # Lightning calls again what the call has done before it loads weights
            return
        rows = self.rows
        for split, told in SPLITS.items():
            if self.data[split] is not None:
                rows[split] = self.readers[split](
                    self.data[split], self.tokenization.names, told, self.tokenization.converters
                )
        self.tokenization.fit(rows["train"], self._rows_of_stream(rows["train"]))
        if "validation" in rows:
            self.tokenization.check(rows["validation"], "validation")
        for split in rows:
            tokens = self._tokenize(rows[split], split)
            if split == "train":
                tokens = tokens.remove_columns(list(self.tokenization.evaluation_columns))
            self.tokens[split] = self.tokenization.arrange(tokens)

    def train_dataloader(self) -> WindowLoader:
        """Windows of micro-batches, shuffled unless `train_sampling_strategy` says otherwise."""
        args = self.args
        shuffled = args.train_sampling_strategy != "sequential"
        seed = args.seed if args.data_seed is None else args.data_seed
        loader = self._loader(
            "train",
            args.per_device_train_batch_size,
            seed if shuffled else None,
            worker_init_fn=_seed_worker(args) if args.dataloader_num_workers else None,
        )
        return WindowLoader(loader, args.gradient_accumulation_steps)

    def val_dataloader(self) -> Any:
        """Batches of the validation rows, in their order; no loader without such rows."""
        if "validation" not in self.tokens:
            return []
        return self._loader("validation", self.args.per_device_eval_batch_size)

    def _loader(
        self, split: str, batch_size: int, seed: int | None = None, **options: Any
    ) -> DataLoader:
        args, tokens = self.args, self.tokens[split]
        options.update(
            collate_fn=Collator(
                self.tokenization.padding,
                self.tokenization.tokenizer.padding_side,
                self.tokenization.finish,
            ),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )
        if isinstance(tokens, datasets.IterableDataset):
            return DataLoader(
                tokens, batch_size=batch_size, drop_last=args.dataloader_drop_last, **options
            )
        rows = TokenRows(tokens)
        draws = None if self.parity else args.seed
        order = BatchOrder(len(rows), batch_size, seed, args.dataloader_drop_last, draws)
        return DataLoader(rows, batch_sampler=order, **options)

    def _rows_of_stream(self, rows: Any) -> int | None:
        if isinstance(rows, datasets.Dataset):
            return None
        args = self.args
        if args.max_steps <= 0:
            raise ValueError("Streaming data has no known length, so max_steps must be set.")
        return args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size

    def _tokenize(self, rows: Any, split: str) -> Any:
        encode: dict[str, Any] = {
            "batched": True,
            "batch_size": self.tokenizebatch,
            "remove_columns": self.tokenization.names,
            "features": self.tokenization.features,
            "with_indices": self.tokenization.with_indices,
        }
        if isinstance(rows, datasets.IterableDataset):
            return rows.map(self.tokenization, **encode)

        key = Hasher.hash([rows._fingerprint, self.tokenization.settings])
        if self.cache:
            folder = Path(datasets.config.HF_DATASETS_CACHE) / "hflit"
            folder.mkdir(parents=True, exist_ok=True)
            encode["cache_file_name"] = str(folder / f"{key}.arrow")
        quiet = datasets.utils.logging.is_progress_bar_enabled() and len(rows) < 50_000
        if quiet:
            datasets.disable_progress_bars()
        try:
            tokens = rows.map(
                self.tokenization,
                **encode,
                num_proc=self.tokenizers,
                new_fingerprint=key,
                keep_in_memory=not self.cache,
                load_from_cache_file=self.cache,
            )
        finally:
            if quiet:
                datasets.enable_progress_bars()
        self._report_cut(tokens, split)
        return tokens

    def _report_cut(self, tokens: datasets.Dataset, split: str) -> None:
        for name, column in self.tokenization.limits.items():
            longest = getattr(self.tokenization, name)
            if longest is None:
                continue
            lengths = pc.list_value_length(tokens.with_format("arrow")[:][column])
            reached = pc.sum(pc.equal(lengths, longest)).as_py()
            if reached:
                logger.warning(
                    "%d of %d %s rows reach %s=%d tokens; what is longer was cut.",
                    reached,
                    len(tokens),
                    SPLITS[split],
                    name,
                    longest,
                )


def _seed_worker(args: TrainingArguments) -> Callable[[int], None]:
    def seed(worker: int) -> None:
        seed_worker(worker, num_workers=args.dataloader_num_workers, rank=args.process_index)

    return seed
