"""The data module: reads, checks and tokenizes both splits, then hands out batches."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import datasets
import lightning.pytorch as L
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import seed_worker

from hflit.data.batching import BatchOrder, Collator, Order, TokenRows, WindowLoader, grouped
from hflit.data.budget import budgeted
from hflit.data.dealing import Deal
from hflit.data.encoding import encoded
from hflit.data.tokenization import Tokenization
from hflit.ranks import from_first

GROUPED = ("group_by_length", "batch_rebalance")  # orders that depend on the lengths of rows
LOADING_SECONDS = 60  # that a worker still loads data after SIGTERM
SAMPLED_ROWS = 2_000  # that tell one set of training rows from another
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
        max_tokens_per_batch: Training batches hold as many rows as fit, with padding, in place of
            `per_device_train_batch_size`.
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
        max_tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.data = {"train": train, "validation": validation}
        self.readers: dict[str, Callable[..., Any]] = dict.fromkeys(SPLITS, self.read)
        self.files: dict[str, Any] = {}  # names of the data, where they were given by name
        self.tokenization = tokenization
        self.args = args
        self.tokenizers = tokenizers
        self.tokenizebatch = tokenizebatch
        self.cache = cache
        self.parity = parity
        self.max_tokens_per_batch = max_tokens_per_batch
        self.start = (0, 0)  # first epoch, and windows of it to leave out, see `WindowLoader`
        self.rows: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}
        self.lengths: dict[str, list[int]] = {}  # of the rows, where their order depends on them

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
        given = [split for split in SPLITS if self.data[split] is not None]
        for step in (self._read, self._check, self._encode):
            for split in given:
                with self._file_told(split):
                    step(split)

    @contextmanager
    def _file_told(self, split: str) -> Iterator[None]:
        """Let errors about rows of a file begin with its name."""
        try:
            yield
        except ValueError as error:
            if split not in self.files or f"{self.files[split]}" in f"{error}":
                raise
            raise ValueError(f"{self.files[split]}: {error}") from error

    def _read(self, split: str) -> None:
        names, lengths = self.tokenization.names, self._length_column(split)
        columns = list(dict.fromkeys([*names, lengths or names[0]]))
        converters = self.tokenization.converters
        rows = self.readers[split](self.data[split], columns, SPLITS[split], converters)
        if lengths is not None:
            self.lengths[split] = list(rows[lengths])
            rows = rows.select_columns(names)
        self.rows[split] = rows

    def _check(self, split: str) -> None:
        rows = self.rows[split]
        if split == "train":
            self.tokenization.fit(rows, self._rows_of_stream(rows))
        else:
            self.tokenization.check(rows, SPLITS[split])

    def _encode(self, split: str) -> None:
        rows = self.rows[split]
        needed = self._rows_of_stream(rows) if split == "train" else None
        tokens = encoded(
            rows,
            self.tokenization,
            SPLITS[split],
            batch_size=min(self.tokenizebatch, needed or self.tokenizebatch),
            processes=self.tokenizers,
            is_cached=self.cache,
            is_shared=self.args.world_size > 1,
        )
        if split == "train":
            tokens = tokens.remove_columns(list(self.tokenization.evaluation_columns))
        self.tokens[split] = self.tokenization.arrange(tokens)
        needs_lengths = split == "train" and self.max_tokens_per_batch is not None
        if self.args.train_sampling_strategy in GROUPED or needs_lengths:
            self._measure(split)

    def state_dict(self) -> dict[str, Any]:
        """The epoch in which Lightning's own checkpoint goes on, and the windows of it to skip."""
        loop: Any = cast(L.Trainer, self.trainer).fit_loop
        epoch, batches = loop.epoch_progress.current.ready, loop.epoch_loop.batch_progress
        ends = batches.is_last_batch or not epoch
        return {"start": (epoch, 0) if ends else (epoch - 1, batches.current.processed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.start = state["start"]

    def train_dataloader(self) -> WindowLoader:
        """Windows of micro-batches, in the order that `train_sampling_strategy` names."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        strategy, lengths = args.train_sampling_strategy, self.lengths.get("train", [])
        if getattr(self.trainer, "overfit_batches", 0):  # the same rows in each epoch
            strategy = "sequential"
        windows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        order: dict[str, Any] = {}
        if self.max_tokens_per_batch is not None:
            order["batches"] = budgeted(lengths, self.max_tokens_per_batch, seed, args.world_size)
        elif strategy == "group_by_length":
            order["order"] = grouped(lengths, windows, None if self.parity else seed)
            if self.parity:
                order["order"] = self._agreed(order["order"])
        elif strategy == "batch_rebalance":
            order["rebalanced"] = BatchRebalanceSampler(
                lengths,
                windows * args.world_size,
                dp_size=args.world_size,
                rank=args.process_index,
                grad_accum=args.gradient_accumulation_steps,
                seed=42 if self.parity else seed,  # transformers passes no seed on
                drop_last=args.dataloader_drop_last,
            )
        elif strategy == "random":
            order["seed"] = seed
            config: Any = args.accelerator_config
            if not config.use_seedable_sampler:
                order["order"] = self._agreed(
                    _torch_order(len(self.tokens["train"]), args.world_size)
                )
        deal = self._deal("train")
        loader = self._loader(
            "train",
            args.per_device_train_batch_size,
            deal=deal,
            worker_init_fn=partial(
                _start_worker, workers=args.dataloader_num_workers, rank=args.process_index
            ),
            **order,
        )
        # Later than where a run went on, where Lightning is to reload the data in between.
        start = max(self.start, (getattr(self.trainer, "current_epoch", 0), 0))
        return WindowLoader(loader, args.gradient_accumulation_steps, start, deal)

    def val_dataloader(self) -> Any:
        """Batches of the validation rows, in their order; no loader without such rows."""
        if "validation" not in self.tokens:
            return []
        args, order = self.args, None
        if self.parity and args.train_sampling_strategy == "group_by_length":
            # transformers evaluates in this order too.
            seed = args.seed if args.data_seed is None else args.data_seed
            order = grouped(
                self.lengths["validation"], args.per_device_eval_batch_size, seed, epochs=False
            )
        return self._validation(order)

    def validation_by_length(self) -> tuple[DataLoader, list[int]]:
        """Batches of validation inputs of like length, the longest first, and their numbers."""
        self._measure("validation")
        order = np.argsort(-np.array(self.lengths["validation"]), kind="stable").tolist()
        return self._validation(lambda epoch: order), order

    def validation_batches(self) -> int | None:
        """Batches of validation rows, those of all processes; None of a stream."""
        rows, size = self.tokens["validation"], self.args.per_device_eval_batch_size
        if not isinstance(rows, datasets.Dataset):
            return None
        return len(rows) // size if self.args.dataloader_drop_last else math.ceil(len(rows) / size)

    def _validation(self, order: Order | None) -> DataLoader:
        rows = self.args.per_device_eval_batch_size
        return self._loader("validation", rows, order=order, deal=self._deal("validation"))

    def _deal(self, split: str) -> Deal:
        args, config = self.args, cast(Any, self.args.accelerator_config)
        ranks = args.process_index, args.world_size
        if split != "train":
            return Deal(*ranks, fill="nothing")
        wraps = self.parity and config.even_batches
        return Deal(*ranks, fill="wrap" if wraps else "blank", splits=config.split_batches)

    def _agreed(self, order: Order) -> Order:
        """An order drawn from random numbers that processes do not share: the first one's."""
        return lambda epoch: from_first(order(epoch), self.args.world_size)

    def digest(self) -> str | None:
        """Tells one set of training rows from another by a sample of them; None of a stream."""
        tokens = self.tokens["train"]
        if isinstance(tokens, datasets.IterableDataset):
            return None
        picked = np.linspace(0, len(tokens) - 1, min(len(tokens), SAMPLED_ROWS)).astype(int)
        table = tokens.with_format("arrow")[picked.tolist()]
        digest = hashlib.sha256(str(len(tokens)).encode())
        for name in sorted(table.column_names):
            digest.update(name.encode())
            digest.update(json.dumps(table[name].to_pylist()).encode())
        return digest.hexdigest()[:16]

    def _loader(
        self,
        split: str,
        batch_size: int,
        worker_init_fn: Callable[[int], None] | None = None,
        **order: Any,
    ) -> DataLoader:
        args, tokens = self.args, self.tokens[split]
        side = self.tokenization.tokenizer.padding_side
        if self.tokenization.predicts_next and not self.parity:
            side = "right"  # else the first token would be predicted from padding
        draws = None if self.parity else args.seed
        options: dict[str, Any] = {
            "collate_fn": Collator(
                self.tokenization.padding, side, self.tokenization.finish, draws
            ),
            "worker_init_fn": worker_init_fn,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "in_order": args.dataloader_in_order,
        }
        drop_last = args.dataloader_drop_last
        if isinstance(tokens, datasets.IterableDataset):
            return DataLoader(tokens, batch_size=batch_size, drop_last=drop_last, **options)
        made = BatchOrder(len(tokens), batch_size, drop_last=drop_last, draws=draws, **order)
        return DataLoader(TokenRows(tokens), batch_sampler=made, **options)

    def _length_column(self, split: str) -> str | None:
        """The column of row lengths: of a Dataset that has it, or one that was asked for."""
        args, data = self.args, self.data[split]
        name = args.length_column_name
        # transformers drops the column as unused before it looks for it.
        if args.train_sampling_strategy not in GROUPED or (
            self.parity and args.remove_unused_columns
        ):
            return None
        has_it = isinstance(data, datasets.Dataset) and name in data.column_names
        return name if has_it or (split == "train" and name != "length") else None

    def _measure(self, split: str) -> None:
        tokens = self.tokens[split]
        if not isinstance(tokens, datasets.Dataset):
            if self.max_tokens_per_batch is not None:
                asked = f"max_tokens_per_batch={self.max_tokens_per_batch}"
                instead = "Leave it out."
            else:
                asked = f"train_sampling_strategy={self.args.train_sampling_strategy!r}"
                instead = "Use 'random'."
            raise ValueError(
                f"{asked} needs the lengths of all rows, which streaming data does not tell. "
                f"{instead}"
            )
        if split not in self.lengths:
            ids = tokens.with_format("arrow")[:]["input_ids"]
            self.lengths[split] = pc.list_value_length(ids).to_pylist()
        elif len(self.lengths[split]) != len(tokens):
            raise ValueError(
                f"length_column_name={self.args.length_column_name!r} holds the lengths of "
                f"{len(self.lengths[split])} rows, which became {len(tokens)} rows of tokens. "
                "Leave it out, and the tokens are counted."
            )

    def _rows_of_stream(self, rows: Any) -> int | None:
        if isinstance(rows, datasets.Dataset):
            return None
        args = self.args
        if args.max_steps <= 0:
            raise ValueError("Streaming data has no known length, so max_steps must be set.")
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        return batches * args.per_device_train_batch_size


def _torch_order(rows: int, world: int) -> Order:
    """Drawn from the global random numbers, as torch shuffles: no resume can draw it again."""
    generator = None
    if world > 1:  # accelerate makes one of its own then, for all epochs
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    return lambda epoch: list(RandomSampler(range(rows), generator=generator))


def _start_worker(worker: int, workers: int, rank: int) -> None:
    """What a process that loads data does first. It is sent there, so it is no local function."""
    if hasattr(signal, "alarm"):
        # SIGTERM often goes to all processes of a run, which ends after its update and needs
        # data until then.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LOADING_SECONDS))
    seed_worker(worker, num_workers=workers, rank=rank)
