"""question-answering through the whole call: equal to transformers.Trainer, exact in windows."""

import json
import math
import random

import datasets
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2ForQuestionAnswering,
    LlamaConfig,
    LlamaForQuestionAnswering,
    T5Config,
    T5ForQuestionAnswering,
    Trainer,
    TrainingArguments,
)

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.data import data_module
from hflit.data.questions import Questions
from hflit.tasks.question_answering import QuestionAnswering
from tests.conftest import WORDS, word_tokenizer
from tests.data.test_questions import plain_tokenizer

CALL = {"task": "question-answering", "maxlength": 32, "stride": 8}


@pytest.fixture
def bert():
    """A two-layer BERT of width 32; the same seed, the same weights."""

    def make(dropout=0.0, **config):
        tokenizer = word_tokenizer()
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertForQuestionAnswering(BertConfig(**(settings | config)))
        return model, tokenizer

    return make


def llama():
    """A one-layer Llama of width 32."""
    tokenizer = plain_tokenizer("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForQuestionAnswering(config)
    return model, tokenizer


def rows(count, seed=0, unanswered=True):
    """Where is w1 in the context? In every fourth row it is not."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        words = rng.choices(WORDS[20:], k=rng.randint(6, 45))
        answers = {"text": [], "answer_start": []}
        if not unanswered or index % 4 < 3:
            words[rng.randrange(len(words))] = "w1"
            answers = {"text": ["w1"], "answer_start": [" ".join(words).index("w1")]}
        made.append({"question": "w0 w0", "context": " ".join(words), "answers": answers})
    return made


def spans_for(tokenizer, train, validation):
    """The same spans that the call makes, for transformers."""
    module = data_module(
        train,
        validation,
        tokenization=Questions(tokenizer, None, 32, 8),
        args=Arguments(use_cpu=True),
        cache=False,
    )
    module.setup()
    return module.tokens["train"], module.tokens["validation"]


def exact(prediction):
    (start, end), (first, last) = prediction.predictions, prediction.label_ids
    return {"exact": float(((start.argmax(-1) == first) & (end.argmax(-1) == last)).mean())}


CASES = {
    "default": {},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "metrics": exact},
    "accumulation": {"gradient_accumulation_steps": 3},  # means of means, as transformers has it
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity_is_bit_identical_with_dropout(bert, case):
    train, validation = rows(41), rows(11, seed=1)
    case = dict(case)
    metrics = case.pop("metrics", None)
    settings = {
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "logging_steps": 1,
        **case,
    }
    their_model, tokenizer = bert(dropout=0.1)
    spans, validation_spans = spans_for(tokenizer, train, validation)
    assert len(spans) > len(train)  # some contexts are long
    theirs = Trainer(
        model=their_model,
        args=TrainingArguments(output_dir="theirs", save_strategy="no", use_cpu=True, **settings),
        train_dataset=spans,
        eval_dataset=validation_spans,
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    theirs.train()
    trainer = HFTrainer()
    model, _ = trainer(
        bert(dropout=0.1), train, validation, metrics=metrics, parity=True, **CALL, **settings
    )

    def figures(history):
        times = ("runtime", "per_second")
        return [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in history]

    expected = figures(theirs.state.log_history)
    assert figures(trainer.state.log_history)[: len(expected)] == expected
    assert any("grad_norm" in entry for entry in expected)
    assert any("eval_exact" in entry for entry in expected) == (metrics is not None)
    for name, weight in their_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_default_stays_within_rounding_without_dropout_and_padding(bert):
    made = [(row, row["context"].split()) for row in rows(60)]
    full = [  # 27 words, two of the question and three special tokens: each row one whole span
        {**row, "context": " ".join(words + ["w2"] * (27 - len(words)))}
        for row, words in made
        if len(words) <= 27
    ]
    losses = []
    for parity in (True, False):
        trainer = HFTrainer()
        trainer(bert(), full[8:], full[:8], parity=parity, logging_steps=1, **CALL)
        history = trainer.state.log_history
        losses.append([e[n] for e in history for n in ("loss", "eval_loss") if n in e])
    assert len(losses[0]) > 6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


class BlindToPadding(Trainer):
    """transformers' Trainer with a loss in which padding does not compete for the answer."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        losses = [
            cross_entropy(
                outputs[f"{part}_logits"].masked_fill(inputs["attention_mask"] == 0, -1e9),
                inputs[f"{part}_positions"],
            )
            for part in ("start", "end")
        ]
        return (losses[0] + losses[1]) / 2


def test_default_differs_from_transformers_by_the_padding_alone(bert):
    train, settings = rows(41), {"per_device_train_batch_size": 8, "logging_steps": 1}
    model, tokenizer = bert()
    theirs = BlindToPadding(
        model=model,
        args=TrainingArguments("theirs", save_strategy="no", use_cpu=True, **settings),
        train_dataset=spans_for(tokenizer, train, train)[0],
        processing_class=tokenizer,
    )
    theirs.train()
    trainer = HFTrainer()
    trainer(bert(), train, **CALL, **settings)
    found, expected = (
        [entry["loss"] for entry in state.log_history if "loss" in entry]
        for state in (trainer.state, theirs.state)
    )
    assert len(expected) > 20
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["bert", "llama"])  # llama pads on the left
def test_accumulation_equals_one_large_batch(bert, kind):
    """Though transformers' own loss would differ: it depends on the padding of each batch."""
    short = [row for row in rows(60) if len(row["context"].split()) < 27][:8]
    assert len({len(row["context"].split()) for row in short}) > 4  # ragged

    def run(batch, accumulation):
        trainer = HFTrainer()
        model, _ = trainer(
            bert() if kind == "bert" else llama(),
            short,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            learning_rate=1.0,
            optim="sgd",
            **CALL,
        )
        return trainer.state.log_history[0], model

    large, large_model = run(8, 1)
    window, window_model = run(2, 4)
    assert window["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert window["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-6)
    for name, weight in large_model.state_dict().items():
        torch.testing.assert_close(window_model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_loss_equals_the_models_own(bert):
    """Of rows without padding, also where a position lies past the end, which is ignored."""
    model, _ = bert()
    module = QuestionAnswering(model, Arguments(use_cpu=True))
    batch = {
        "input_ids": torch.randint(5, 100, (4, 12)),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
        "start_positions": torch.tensor([0, 3, 12, 5]),
        "end_positions": torch.tensor([0, 7, 12, 11]),
    }
    expected = model(**batch).loss
    found = module.summed_loss(module(batch), batch) / module.count_items(batch)
    torch.testing.assert_close(found, expected)
    assert module.count_items(batch) == 3
    assert "loss" not in module(batch)


def test_learns_and_reports_squads_figures(bert, tmp_path):
    trainer = HFTrainer()
    model, _ = trainer(
        bert(),
        rows(200),
        rows(40, seed=1),
        metrics="auto",
        eval_strategy="epoch",
        num_train_epochs=4,
        learning_rate=3e-3,
        metric_for_best_model="f1",
        output_dir=str(tmp_path),
        save_strategy="no",
        **CALL,
    )
    f1 = [entry["eval_f1"] for entry in trainer.state.log_history if "eval_f1" in entry]
    assert len(f1) == 4
    assert f1[-1] > 90
    names = {"exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"}
    names |= {f"best_{short}{end}" for short in ("exact", "f1") for end in ("", "_thresh")}
    assert {f"eval_{name}" for name in names} <= set(trainer.metrics)
    assert json.loads(json.dumps(trainer.metrics, allow_nan=False))

    # transformers 5 has no question-answering pipeline; the folder is what from_pretrained takes.
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path)("w0 w0", "w5 w1 w7", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).start_logits, model(**inputs).start_logits)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_models_without_cls(kind):
    tokenizer = plain_tokenizer(kind)
    torch.manual_seed(0)
    if kind == "llama":
        model, tokenizer = llama()
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2
        )
        model = GPT2ForQuestionAnswering(config)
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
        model = T5ForQuestionAnswering(config)
    trainer = HFTrainer()
    trainer((model, tokenizer), rows(9), rows(5, seed=1), metrics="auto", max_steps=2, **CALL)
    assert math.isfinite(trainer.metrics["eval_loss"])
    assert 0 <= trainer.metrics["eval_f1"] <= 100


def test_formats_train_to_the_same_weights(bert):
    data = rows(12)
    weights = []
    for kind in (data, datasets.Dataset.from_list(data), pd.DataFrame(data)):
        model, _ = HFTrainer()(bert(dropout=0.1), kind, max_steps=2, **CALL)
        weights.append(model.qa_outputs.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_base_with_other_classes_gets_two_scores_a_token(bert, tmp_path):
    model, tokenizer = bert(num_labels=5)
    model.bert.save_pretrained(tmp_path)  # its config says five classes
    tokenizer.save_pretrained(tmp_path)
    model, _ = HFTrainer()(str(tmp_path), rows(4), max_steps=1, **CALL)
    assert model.config.num_labels == model.qa_outputs.out_features == 2


def test_label_smoothing_is_refused_before_weights_are_loaded(bert, tmp_path):
    model, tokenizer = bert()
    model.config.save_pretrained(tmp_path)  # and no weights
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 means nothing to question-"):
        HFTrainer()(str(tmp_path), rows(4), label_smoothing_factor=0.1, **CALL)


def test_misaligned_rows_are_left_out_of_the_run_when_asked(bert):
    data = rows(6, unanswered=False)
    data[2]["answers"] = "nowhere"
    with pytest.raises(ValueError, match="Row 2 of the training data"):
        HFTrainer()(bert(), data, **CALL)
    trainer = HFTrainer()
    trainer(bert(), data, data, metrics="auto", skip_misaligned=True, max_steps=1, **CALL)
    assert "eval_NoAns_f1" not in trainer.metrics  # the row without a place is not scored
    with pytest.raises(ValueError, match="skip_misaligned=True means nothing to text-class"):
        HFTrainer()(bert(), [{"text": "w1", "label": 0}], skip_misaligned=True)


def test_answers_of_a_validation_stream_may_be_of_any_shape(bert):
    """Once it ended in an error of Arrow, after training."""
    given = [{"question": "w0", "context": "w5 w1 w7", "answers": a} for a in ("w1", ["w7"], None)]
    stream = datasets.IterableDataset.from_generator(lambda: iter(given))
    found = []
    for validation in (given, stream):
        trainer = HFTrainer()
        trainer(bert(), rows(8), validation, metrics="auto", max_steps=1, **CALL)
        found.append({k: v for k, v in trainer.metrics.items() if "exact" in k or "f1" in k})
    assert found[0] == found[1]
