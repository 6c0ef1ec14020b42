"""The same seed, model and rows through `transformers.Trainer` and through hflit."""

import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification

from hflit import HFTrainer
from tests.reference import assert_same_run, ours, reference

SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "logging_steps": 1,
}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


@pytest.fixture
def rows(ragged_rows):
    return ragged_rows(61), ragged_rows(13, seed=1)


CASES = {
    "default": {},
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_first_step": True,
        "metrics": accuracy,
    },
    "epoch strategies": {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "metrics": accuracy,
    },
    "warmup and cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "bf16": {"bf16": True},
    "1.5 epochs": {"num_train_epochs": 1.5},
    "max_steps": {"max_steps": 11},
    "data_seed": {"data_seed": 7, "seed": 11},
    "no clipping": {"max_grad_norm": 0.0},
    "sgd on plateau": {
        "optim": "sgd",
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation and all": {
        "gradient_accumulation_steps": 3,
        "bf16": True,
        "lr_scheduler_type": "cosine",
        "label_smoothing_factor": 0.1,
    },
}


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity_is_bit_identical_with_dropout(tiny_bert, rows, case):
    settings = {**SETTINGS, **case}
    theirs = reference(*tiny_bert(dropout=0.1), *rows, **settings)
    mine = ours(*tiny_bert(dropout=0.1), *rows, **settings)
    assert_same_run(mine, theirs)
    # We evaluate the final weights once more than transformers does, if nothing else has.
    more = len(mine[0].log_history) - len(theirs[0].log_history)
    assert more == ("eval_strategy" not in case)


def test_weights_used_twice_are_rounded_once_in_bf16(tiny_bert, rows):
    """Lightning's autocast rounds them at each use, and sums their gradients in float32."""
    _, tokenizer = tiny_bert()
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=len(tokenizer), **layers, **sizes)

    def albert():
        torch.manual_seed(0)
        return AlbertForSequenceClassification(config)

    settings = {**SETTINGS, "learning_rate": 5e-3, "bf16": True}
    theirs = reference(albert(), tokenizer, *rows, **settings)
    assert_same_run(ours(albert(), tokenizer, *rows, **settings), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_default_stays_within_rounding_without_dropout(tiny_bert, rows, smoothing):
    settings = {**SETTINGS, "label_smoothing_factor": smoothing}
    theirs, *_ = reference(*tiny_bert(), *rows, **settings)
    state, *_ = ours(*tiny_bert(), *rows, parity=False, **settings)
    expected = [entry["loss"] for entry in theirs.log_history if "loss" in entry]
    actual = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert len(actual) == 16  # 61 rows in batches of 8, twice
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("labels", ["classes", "several", "scores"])
def test_accumulation_equals_one_large_batch(tiny_bert, ragged_rows, labels):
    """transformers 5.23 takes the same windows with a loss four times too large."""
    rows = ragged_rows(8, classes=3)
    if labels == "several":
        rows = [{**row, "label": [row["label"] % 2, 1, 0]} for row in rows]
    if labels == "scores":
        rows = [{**row, "label": row["label"] + 0.5} for row in rows]
    classes = 1 if labels == "scores" else 3

    def run(batch, accumulation):
        trainer = HFTrainer()
        model, _ = trainer(
            tiny_bert(num_labels=classes),
            rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            learning_rate=1.0,
            optim="sgd",
        )
        return trainer.state.log_history[0], model

    large, large_model = run(8, 1)
    window, window_model = run(2, 4)
    assert window["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert window["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-6)
    # One step of SGD at rate 1: the weights differ by what the gradients differ by.
    for name, weight in large_model.state_dict().items():
        torch.testing.assert_close(window_model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_parity_warns_of_the_loss_it_copies(tiny_bert, rows):
    with pytest.warns(UserWarning, match="3 times too large"):
        ours(*tiny_bert(), *rows, gradient_accumulation_steps=3, max_steps=1)
