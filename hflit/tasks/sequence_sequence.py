"""sequence-sequence: write the target that belongs to a source, as in translation and summaries."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.models.bart.modeling_bart import shift_tokens_right

from hflit.adapters import forward_inputs, inner_model
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.sequences import Sequences, references
from hflit.loading import Base
from hflit.metrics.generation import GenerationMetrics
from hflit.tasks.distillation import Distillation
from hflit.tasks.module import TaskModule

WORD = "a"  # some target
GENERATED_TOKENS = 128  # longest text where neither the caller nor the model sets a length


class SequenceSequence(TaskModule):
    """Trains an encoder-decoder: each token of the target from the source and those before it.

    Batch, sources of `seq` tokens and targets of `target` tokens:
        input_ids: `(batch, seq)`.
        attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding.
        labels: `(batch, target)`, -100 in padding.

    Args:
        model: A transformers encoder-decoder.
        args: The training arguments.
        parity: Run exactly the operations of `transformers.Trainer`.
        distillation: A teacher whose answers are learned beside the labels.
        tokenizer: Turns what the model generates into text; only metrics need it.
        target_maxlength: Tokens the decoder can take, or None for no limit.
        generation_max_length: Longest generated text in tokens. By default what the model's
            generation config says, else 128.
        generation_num_beams: Beams of the search; by default what the model's generation config
            says, else 1.
    """

    auto_model = AutoModelForSeq2SeqLM
    figures = GenerationMetrics.figures
    lora_type = "SEQ_2_SEQ_LM"
    tokenization = Sequences
    compares_in_turn = True
    chunks_loss = True
    options = ("tokenizer", "target_maxlength", "generation_max_length", "generation_num_beams")

    @classmethod
    def load(cls, base: Base, changes: dict[str, Any]) -> Any:
        """A model that generates from the token that it reads first in training.

        mBART's config may not name it: in training it is the language at the end of the target.
        """
        model = super().load(base, changes)
        known = model.generation_config
        if known is not None and known.decoder_start_token_id is None:
            ids = base.tokenizer(text_target=WORD, return_tensors="pt")["input_ids"]
            known.decoder_start_token_id = int(cls._shifted(ids, model)[0, 0])
        return model

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        parity: bool = False,
        distillation: Distillation | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_maxlength: int | None = None,
        generation_max_length: int | None = None,
        generation_num_beams: int | None = None,
    ) -> None:
        super().__init__(model, args, parity, distillation)
        # transformers.Trainer writes use_cache into the model's config. Decoders that share it
        # follow (BART); those with a copy (T5) keep keys and values, which moves the last bit.
        inner = inner_model(model)
        own = getattr(inner.get_decoder(), "config", None)  # FSMT's has none
        shared = own is inner.base_model.config
        self.passes_use_cache = shared or not parity
        self.tokenizer = tokenizer
        self.generation: dict[str, Any] = {}
        known = inner.generation_config
        if generation_max_length is not None:
            self.generation["max_length"] = generation_max_length
        elif known is None or (known.max_length is None and known.max_new_tokens is None):
            longest = target_maxlength or GENERATED_TOKENS
            self.generation["max_length"] = min(longest, GENERATED_TOKENS)
        if generation_num_beams is not None:
            self.generation["num_beams"] = generation_num_beams

    def prepare(self, batch: Batch, model: Any) -> Batch:
        """Add what the decoder reads: the labels, one place later."""
        # FSMT's shift writes its padding into what it is given, so that padding would be learned.
        labels = batch["labels"] if self.parity else batch["labels"].clone()
        shifted = self._shifted(labels, model)
        inputs: dict[str, Any] = {**batch, "decoder_input_ids": shifted}
        if self.passes_use_cache:
            inputs["use_cache"] = self.args.use_cache
        return inputs

    @staticmethod
    def _shifted(labels: Tensor, model: Any) -> Tensor:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels=labels)
        # M2M100, NLLB and Blenderbot do the same, but inside forward and given labels only.
        config = model.config
        return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)

    def metrics(self, rows: Dataset) -> GenerationMetrics:
        """BLEU, chrF and ROUGE of what the model generates."""
        return GenerationMetrics(self.generate, references(rows))

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """The text that the model makes of each source; the caller sets evaluation mode.

        Raises:
            ValueError: The module was given no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("Generated tokens become text by a tokenizer. Pass tokenizer=.")
        wanted = forward_inputs(self.model) - {"labels"}
        inputs = {k: v for k, v in batch.items() if k in wanted}
        with self.forward_autocast():
            # Processes have batches of their own: they do not wait for one another at each token.
            ids = self.model.generate(**inputs, **self.generation, synced_gpus=False)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Cut by the lengths of the sources; the targets of a part have a length of their own."""
        rest = {k: v for k, v in batch.items() if k != "labels"}
        parts = super()._parts({**rest, "row": torch.arange(len(batch["labels"]))})
        is_used = batch["labels"].cpu().ne(IGNORE_INDEX)
        for part in parts:
            rows = part.pop("row")
            used = is_used[rows].any(dim=0).nonzero()
            longest = int(used[-1]) + 1 if len(used) else is_used.shape[1]
            part["labels"] = batch["labels"][rows, :longest]
        return parts
