"""Models that compute another loss than their task."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.tasks import TASKS
from tests.tasks import tiny

WEIGHTS = torch.tensor([1.0, 4.0, 9.0])


def weighted_forward(model, input_ids=None, attention_mask=None, labels=None, **others):
    """Rare classes count more, as the forum's most frequent answer has it."""
    kind = BertForSequenceClassification
    outputs = kind.forward(model, input_ids, attention_mask, **others)
    if labels is not None:
        outputs.loss = F.cross_entropy(outputs.logits, labels, WEIGHTS)
    return outputs


class WeightedClasses(BertForSequenceClassification):
    """Changes the loss."""

    forward = weighted_forward


class NeedsLabels(BertForSequenceClassification):
    """Has no mind for a call without labels."""

    def forward(self, input_ids, labels, attention_mask=None):
        outputs = super().forward(input_ids, attention_mask)
        return {"loss": F.cross_entropy(outputs.logits, labels, WEIGHTS), "logits": outputs.logits}


class HandsOn(BertForSequenceClassification):
    """Names the labels alone."""

    def forward(self, labels=None, **inputs):
        outputs = super().forward(**inputs)
        outputs.loss = F.cross_entropy(outputs.logits, labels, WEIGHTS)
        return outputs


class GivesTuple(BertForSequenceClassification):
    """As the models of ten years ago."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids, attention_mask).logits
        return F.cross_entropy(logits, labels, WEIGHTS), logits


class GivesMore(GivesTuple):
    """Hidden states too."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        loss, logits = super().forward(input_ids, attention_mask, labels)
        return loss, logits, logits


class Halved(GPT2LMHeadModel):
    """A loss over tokens that is not the task's."""

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None):
        outputs = super().forward(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, labels=labels
        )
        outputs.loss = None if outputs.loss is None else outputs.loss / 2
        return outputs


class Renamed(BertForSequenceClassification):
    """Another class with the loss of its parent."""


class WithoutLoss(BertForMaskedLM):
    """Takes no labels."""

    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids, attention_mask)


def made(kind, task):
    base, tokenizer = tiny.make(task, seed=0)
    model = kind(base.config)
    model.load_state_dict(base.state_dict())
    return model, tokenizer


def run(base, task, **arguments):
    settings = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, **arguments}
    settings["per_device_eval_batch_size"] = 9  # a mean over weights depends on its batch
    trainer = HFTrainer()
    rows = tiny.rows(task)
    model, _ = trainer(base, rows, rows[:9], task=task, eval_strategy="epoch", **settings)
    logs = trainer.state.log_history
    return model, [each.get("loss", each.get("eval_loss")) for each in logs[:-1]]


@pytest.mark.parametrize("kind", [WeightedClasses, NeedsLabels, HandsOn, GivesTuple, MethodType])
def test_a_forward_of_ones_own_decides_the_loss(kind):
    """Once the loss of the task was trained in its place, without a word."""
    task = "text-classification"

    def base():
        if kind is not MethodType:
            return made(kind, task)
        model, tokenizer = tiny.make(task, seed=0)
        model.forward = MethodType(weighted_forward, model)
        return model, tokenizer

    model, found = run(base(), task)
    expected_model, expected = run(base(), task, parity=True)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found[0] != pytest.approx(run(tiny.make(task, seed=0), task)[1][0], rel=1e-3)


class MeanOverRows(BertForSequenceClassification):
    """Weights that do not depend on which rows share a batch."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        losses = F.cross_entropy(outputs.logits, labels, reduction="none")
        outputs.loss = (WEIGHTS[labels] * losses).mean()
        return outputs


@pytest.mark.parametrize("kind", [GivesTuple, GivesMore])
def test_the_logits_of_a_tuple_are_judged(kind):
    task = "text-classification"
    trainer = HFTrainer()
    rows = tiny.rows(task)
    model, tokenizer = trainer(made(kind, task), rows, rows, metrics="auto", max_steps=1)
    with torch.no_grad():
        right = [
            int(model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False),
                      labels=torch.tensor([row["label"]]))[1].argmax()) == row["label"]
            for row in rows
        ]  # fmt: skip
    assert trainer.metrics["eval_accuracy"] == pytest.approx(sum(right) / len(right))


def test_small_batches_are_one_large_batch():
    task, logs = "text-classification", []
    for batch, windows in ((24, 1), (5, 5)):
        trainer = HFTrainer()
        trainer(
            made(MeanOverRows, task), tiny.rows(task), max_steps=1, logging_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=windows,
        )  # fmt: skip
        logs.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_the_loss_is_told_by_its_author_not_by_a_batch():
    """On rows of one class a weighted mean is the plain one; bfloat16 hides small differences."""
    task, model = "text-classification", made(WeightedClasses, "text-classification")[0]
    args, _ = parse({})
    assert TASKS[task](model, args).has_own_loss
    assert TASKS[task](model.bfloat16(), args).has_own_loss
    assert not TASKS[task](model, parse({"label_smoothing_factor": 0.1})[0]).has_own_loss
    assert not TASKS[task](made(Renamed, task)[0], args).has_own_loss
    # What fully_shard makes of a class: a new one, of torch's.
    plain = tiny.make(task, seed=0)[0]
    plain.__class__ = type("FSDPBert", (FSDPModule, type(plain)), {})
    assert not TASKS[task](plain, args).has_own_loss
    for task in TASKS:
        assert not TASKS[task](tiny.make(task, seed=0)[0], args).has_own_loss


def test_a_loss_over_tokens_is_their_mean():
    """Its chunks, which know the loss of the task alone, are left out."""
    task = "language-generation"
    whole = run(tiny.make(task, seed=0), task, learning_rate=0.0)[1]
    half = run(made(Halved, task), task, learning_rate=0.0)[1]
    assert half == pytest.approx([each / 2 for each in whole], rel=1e-5)


def test_a_loss_function_that_was_replaced_is_trained():
    """Llama's classifiers ask the function for their loss; BERT's do not."""

    def weighted(labels, pooled_logits, **_):
        return F.cross_entropy(pooled_logits, labels, WEIGHTS)

    config = LlamaConfig(
        vocab_size=105, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, num_labels=3,
        problem_type="single_label_classification",
    )  # fmt: skip
    found = []
    for parity in (False, True):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        model.loss_function = weighted
        base = model, tiny.make("text-classification", seed=0)[1]
        found.append(run(base, "text-classification", parity=parity)[1])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_loss_of_its_own_is_blended_with_a_teacher():
    task = "text-classification"
    losses = {}
    for alpha in (0.0, 0.5, 1.0):
        options = {"teacher": tiny.make(task, seed=5), "distillation": (1.5, alpha)}
        losses[alpha] = run(made(WeightedClasses, task), task, **options)[1][0]
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-5)
    assert losses[0.0] == pytest.approx(run(made(WeightedClasses, task), task)[1][0], rel=1e-6)


def test_a_forward_without_a_loss_trains_that_of_the_task():
    task = "language-modeling"
    found = run(made(WithoutLoss, task), task)[1]
    assert found == pytest.approx(run(tiny.make(task, seed=0), task)[1], rel=1e-5)
