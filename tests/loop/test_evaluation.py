"""Evaluation by length: less padding, and figures and predictions in the order of the rows."""

import numpy as np
import pytest

from hflit import HFTrainer
from tests.tasks.tiny import make, rows

LIMITED = {"limit_val_batches": 1000}  # all of them, in the order of the rows
BATCH = 3


def evaluated(task, metrics, **options):
    """Evaluate random weights of which none learns, and the tokens that each batch took."""
    model, tokenizer = make(task, 0)
    taken = []

    def count(module, _, inputs):
        if not module.training and "input_ids" in inputs:
            taken.append(inputs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    trainer = HFTrainer()
    trainer(
        (model, tokenizer), rows(task), rows(task), task=task, metrics=metrics, max_steps=1,
        learning_rate=0.0, per_device_eval_batch_size=BATCH, use_cpu=True, cache=False, **options,
    )  # fmt: skip
    hook.remove()
    return trainer, taken


def test_a_dropped_last_batch_is_that_of_the_rows_in_their_order():
    """Longest first it would be the shortest rows; and their numbers were those of all rows."""
    seen = {}

    def count(prediction):
        seen[parity] = prediction.label_ids.tolist()
        return {}

    for parity in (False, True):
        model, tokenizer = make("text-classification", 0)
        HFTrainer()(
            (model, tokenizer), rows("text-classification"), rows("text-classification")[:8],
            metrics=count, max_steps=1, per_device_eval_batch_size=BATCH, parity=parity,
            dataloader_drop_last=True, use_cpu=True, cache=False,
        )  # fmt: skip
    assert seen[False] == seen[True] == [0, 1, 2, 0, 1, 2]


# Not those that draw masks for each batch: other batches are masked otherwise.
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("text-classification", {}),
        ("question-answering", {"stride": 8, "maxlength": 16}),
        ("sequence-sequence", {"generation_max_length": 8}),
        ("language-generation", {"merge": None}),
    ],
)
def test_figures_do_not_depend_on_the_order(task, options):
    by_length = evaluated(task, "auto", **options)[0].metrics
    in_turn = evaluated(task, "auto", **options, **LIMITED)[0].metrics
    figures = [name for name in in_turn if name.startswith("eval_")]
    assert len(figures) > 4
    for name in figures:
        if "second" not in name and "runtime" not in name:
            assert by_length[name] == pytest.approx(in_turn[name], rel=1e-6), name


def test_predictions_stand_in_the_order_of_the_rows():
    task, kept = "text-classification", []

    def metrics(prediction):
        kept.append(prediction)
        return {}

    wanted = {"include_for_metrics": ["inputs", "loss"]}
    evaluated(task, metrics, **wanted)
    evaluated(task, metrics, **wanted, **LIMITED)
    by_length, in_turn = kept
    np.testing.assert_array_equal(by_length.label_ids, in_turn.label_ids)
    tokens = [np.maximum(each.inputs, 0) for each in kept]  # padded with 0, and batches with -100
    np.testing.assert_array_equal(*tokens)
    np.testing.assert_allclose(by_length.predictions, in_turn.predictions, rtol=0, atol=1e-6)


def test_batches_hold_rows_of_like_length():
    task = "text-classification"
    _, tokenizer = make(task, 0)
    lengths = sorted((len(tokenizer(row["text"])["input_ids"]) for row in rows(task)), reverse=True)
    fewest = [
        len(lengths[start : start + BATCH]) * lengths[start]
        for start in range(0, len(lengths), BATCH)
    ]
    _, taken = evaluated(task, None)
    _, in_turn = evaluated(task, None, **LIMITED)
    assert taken == fewest
    assert sum(in_turn) > sum(taken)
