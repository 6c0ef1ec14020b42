"""token-detection: a generator replaces masked tokens, a discriminator finds which (ELECTRA)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from hflit.adapters import inner_model, save_config
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.texts import Texts
from hflit.loading import Base, copy_with_weights, load_model, load_weights
from hflit.metrics.detection import DetectionMetrics
from hflit.tasks.distillation import bernoulli_distance, kl_distance
from hflit.tasks.module import TaskModule
from hflit.tasks.parts import blind_to_neighbours, logits_only_at


@dataclass
class DetectionOutput(ModelOutput):
    """What one pass through both halves gives.

    Attributes:
        loss: Scalar: mean masked-language loss, plus the weighted mean of the detection loss.
        logits: For replaced, against original, `(batch, seq)`.
        replaced: 1 for tokens the generator replaced by others, 0 for original ones, -100 in
            padding, `(batch, seq)`.
        sums: The two losses in nats, summed over masked and over all tokens; the second one
            weighted, `(2,)`.
        guesses: The generator's logits at the masked tokens, `(masked, vocab)`.
        corrupted: What the discriminator read, `(batch, seq)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    replaced: Tensor | None = None
    sums: Tensor | None = None
    guesses: Tensor | None = None
    corrupted: Tensor | None = None


class DetectionPair(nn.Module):
    """A generator and a discriminator that train together and share their embedding tables.

    Objective and weight of Clark et al. 2020, "ELECTRA": tokens are sampled from the generator at
    masked positions, without gradient; the discriminator tells replaced from original tokens.

    Args:
        generator: Masked language model.
        discriminator: Scores each token: one logit, or two for original and replaced.
        tokenizer: Saved with both halves.
        weight: Of the detection loss.
    """

    def __init__(
        self,
        generator: PreTrainedModel,
        discriminator: PreTrainedModel,
        tokenizer: Any,
        weight: float = 50.0,
    ) -> None:
        super().__init__()
        self.config = discriminator.config
        self.generator = generator
        self.discriminator = discriminator
        self.tokenizer = tokenizer
        self.weight = weight
        _share_tables(generator, discriminator)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        is_token: Tensor | None = None,
    ) -> DetectionOutput:
        """Guess the masked tokens, then find the wrong guesses.

        Args:
            input_ids: `(batch, seq)`, some of them masked.
            attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding, or as `merge="pack"`
                makes it, `(batch, 1, seq, seq)`.
            token_type_ids: `(batch, seq)`.
            position_ids: `(batch, seq)`.
            labels: The masked tokens, `(batch, seq)`; -100 elsewhere.
            is_token: False in padding, `(batch, seq)`; by default what `attention_mask` says.
        """
        assert labels is not None, "token detection learns from the masked tokens"
        if is_token is None:
            is_token = (
                torch.ones_like(input_ids) if attention_mask is None else attention_mask
            ) > 0
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs = {"attention_mask": attention_mask}
        inputs |= {name: value for name, value in optional.items() if value is not None}
        is_masked = labels != IGNORE_INDEX
        guesses = self.guess(is_masked, input_ids, **inputs).float()  # (masked, vocab)
        originals = labels[is_masked]
        generator_loss = F.cross_entropy(guesses, originals, reduction="sum")

        with torch.no_grad():
            # Of NaN nothing can be drawn; it is the loss that is to tell of it.
            odds = guesses.softmax(dim=-1).nan_to_num(nan=1.0)
            sampled = torch.multinomial(odds, 1).squeeze(-1)
            corrupted = input_ids.masked_scatter(is_masked, sampled)
            replaced = torch.zeros_like(labels)
            replaced = replaced.masked_scatter(is_masked, (sampled != originals).long())
            replaced = replaced.masked_fill(~is_token, IGNORE_INDEX)

        logits = self.detect(corrupted, **inputs)
        is_scored = replaced != IGNORE_INDEX
        detection_loss = F.binary_cross_entropy_with_logits(
            logits[is_scored], replaced[is_scored].float(), reduction="sum"
        )
        sums = torch.stack([generator_loss, self.weight * detection_loss])
        items = torch.stack([is_masked.sum(), is_scored.sum()]).clamp(min=1)
        return DetectionOutput((sums / items).sum(), logits, replaced, sums, guesses, corrupted)

    def guess(self, is_masked: Tensor, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits of the generator at the masked tokens, `(masked, vocab)`."""
        generator = inner_model(self.generator)
        is_compiled = self._compiled_call_impl is not None  # then a hook would compile anew
        with nullcontext() if is_compiled else logits_only_at(is_masked, generator):
            logits = self.generator(input_ids, **inputs).logits
        return logits if logits.dim() == 2 else logits[is_masked]

    def detect(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits of the discriminator for replaced against original, `(batch, seq)`."""
        logits = self.discriminator(input_ids, **inputs).logits.float()
        # Two logits a token: their difference is the one that counts.
        return logits[..., 1] - logits[..., 0] if logits.dim() == 3 else logits

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens that both halves share."""
        return self.generator.get_input_embeddings()

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Compute the activations of both halves again when they are needed."""
        for half in (self.generator, self.discriminator):
            half.activation_checkpointing_enable(*args, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep the activations of both halves."""
        for half in (self.generator, self.discriminator):
            half.activation_checkpointing_disable()

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write `generator/` and `discriminator/`, each to load with `from_pretrained`."""
        for name in ("generator", "discriminator"):
            half = getattr(self, name)
            half.save_pretrained(Path(folder) / name, **options)
            save_config(half, Path(folder) / name)
            self.tokenizer.save_pretrained(Path(folder) / name)

    def num_parameters(self, **options: Any) -> int:
        """Parameters of both halves, counted as transformers counts each."""
        halves = (self.generator, self.discriminator)
        return sum(half.num_parameters(**options) for half in halves)


class TokenDetection(TaskModule):
    """Trains a generator and a discriminator from one masked-language base.

    Batch:
        As for language-modeling.
    """

    auto_model = AutoModelForMaskedLM
    figures = DetectionMetrics.figures
    lora_type = "FEATURE_EXTRACTION"
    label_names = ()  # the pair is given its labels, which say what tokens to sample
    outputs_by_row = False
    tokenization = Texts
    tokenization_settings = {"masked": True}
    unsmoothed = "token-detection: its labels are replaced or original"

    @classmethod
    def load(cls, base: Base, changes: dict[str, Any]) -> Any:
        """Both halves from one base: a masked language model, a folder of both, or a pair."""
        if isinstance(base.model, DetectionPair):
            return copy_with_weights(base.model) if base.is_adapted else base.model
        folder = Path(base.path or "")
        if base.path and (folder / "discriminator").is_dir():
            halves: list[Any] = []
            for name in ("generator", "discriminator"):
                config = type(base.config).from_pretrained(folder / name)
                kind = cls.auto_model if name == "generator" else _discriminator_kind(config)
                halves.append(load_weights(base, str(folder / name), kind, config))
            return DetectionPair(halves[0], halves[1], base.tokenizer)
        discriminator: Any
        generator = load_model(base, cls.auto_model, changes)
        config = copy.deepcopy(base.config)
        config.update(changes)
        kind = _discriminator_kind(config)
        if kind is AutoModelForTokenClassification:
            config.id2label = {0: "original", 1: "replaced"}
            config.label2id = {"original": 0, "replaced": 1}
        if base.path is not None:
            discriminator = load_weights(base, base.path, kind, config)
        else:
            make = getattr(kind, "from_config", kind)
            discriminator = make(config)
            body = generator.base_model.state_dict()
            discriminator.base_model.load_state_dict(body, strict=False)
        return DetectionPair(generator, discriminator, base.tokenizer)

    @classmethod
    def each_model(cls, model: Any, change: Callable[[Any], Any]) -> Any:
        """Change both halves."""
        model.generator, model.discriminator = change(model.generator), change(model.discriminator)
        return model

    def prepare(self, batch: Batch, model: Any) -> Batch:
        """Keep the texts of a packed row from seeing each other."""
        batch = {**batch, "is_token": batch["attention_mask"] > 0}
        return blind_to_neighbours(batch, inner_model(model.generator), causal=False)

    def count_items(self, batch: Batch) -> Tensor:
        """Masked tokens and all tokens, `(2,)`."""
        return torch.stack([batch["labels"].ne(IGNORE_INDEX).sum(), batch["attention_mask"].sum()])

    def teach(self, batch: Batch, outputs: Any) -> Any:
        """The teacher's guesses, and what it makes of the tokens that the student replaced."""
        assert self.distillation is not None
        teacher = self.distillation.teacher
        wanted = ("attention_mask", "token_type_ids", "position_ids")
        prepared = self.prepare(batch, teacher)
        inputs = {name: prepared[name] for name in wanted if name in prepared}
        masked = batch["labels"] != IGNORE_INDEX
        with self.forward_autocast():
            guesses = teacher.guess(masked, prepared["input_ids"], **inputs)
            return {"guesses": guesses, "logits": teacher.detect(outputs["corrupted"], **inputs)}

    def distance(self, outputs: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        """Divergences from the teacher's guesses and from its verdicts, `(2,)`."""
        scored = outputs["replaced"] != IGNORE_INDEX
        guessing = kl_distance(outputs["guesses"], teacher["guesses"], temperature)
        verdicts, taught = outputs["logits"][scored], teacher["logits"][scored]
        detecting = bernoulli_distance(verdicts, taught, temperature)
        return torch.stack([guessing, self.model.weight * detecting])

    def summed_loss(self, outputs: dict[str, Any], batch: Batch) -> Tensor:
        """The two losses of the pair, `(2,)`."""
        return outputs["sums"]

    def metrics(self, rows: Dataset) -> DetectionMetrics:
        """Masked-language loss; precision, recall and F1 of finding replaced tokens."""
        return DetectionMetrics()


def _discriminator_kind(config: Any) -> Any:
    # Only ELECTRA comes with a head for this. What AutoModelForPreTraining gives for others is a
    # masked-language head, which would take 0 and 1 for words.
    return (
        ElectraForPreTraining if config.model_type == "electra" else AutoModelForTokenClassification
    )


def _share_tables(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Let both halves look tokens and positions up in the same tables."""
    theirs = dict(generator.base_model.named_modules())
    for name, table in list(discriminator.base_model.named_modules()):
        twin = theirs.get(name)
        if not (isinstance(table, nn.Embedding) and isinstance(twin, nn.Embedding)):
            continue
        if table.weight.shape == twin.weight.shape:
            discriminator.base_model.set_submodule(name, twin)
