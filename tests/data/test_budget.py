"""Batches by tokens: within their budget, each row once an epoch, the same again for a seed."""

import datasets
import numpy as np
import pytest

from hflit import HFTrainer
from hflit.data.batching import BatchOrder
from hflit.data.budget import budgeted
from hflit.data.dealing import Deal

LENGTHS = np.random.default_rng(0).integers(1, 120, 500).tolist()


def padded(rows):
    return len(rows) * max(LENGTHS[row] for row in rows)


@pytest.mark.parametrize("tokens", [119, 256, 1000, 10**6])
def test_batches_stay_within_their_budget(tokens):
    batches = budgeted(LENGTHS, tokens, seed=3)
    epochs = [batches(epoch) for epoch in range(3)]
    for made in epochs:
        assert sorted(row for rows in made for row in rows) == list(range(500))
        assert max(map(padded, made)) <= tokens
    assert len({len(made) for made in epochs}) == 1
    assert epochs[0] != epochs[1]  # other batches each epoch
    assert batches(1) == budgeted(LENGTHS, tokens, seed=3)(1) != budgeted(LENGTHS, tokens, 4)(1)


def test_batches_are_nearly_full():
    made = budgeted(LENGTHS, 1000, seed=3)(0)
    real, computed = sum(LENGTHS), sum(map(padded, made))
    assert 1 - real / computed < 0.08  # rows of like length: little padding
    # Filled one after another, longest first, without rounding lengths.
    left, fewest = sorted(LENGTHS, reverse=True), 0
    while left:
        left, fewest = left[1000 // left[0] :], fewest + 1
    assert len(made) <= 1.1 * fewest


@pytest.mark.parametrize("world", [2, 3])
def test_processes_have_about_equally_much_to_do(world):
    whole = budgeted(LENGTHS, 700, 3, world)
    hands = [
        list(BatchOrder(500, 8, batches=whole, deal=Deal(rank, world))) for rank in range(world)
    ]
    assert len({len(hand) for hand in hands}) == 1
    real = [rows for hand in hands for rows in hand if not rows.is_blank]
    assert sorted(row for rows in real for row in rows) == list(range(500))
    for together in list(zip(*hands, strict=True))[:-1]:
        assert max(map(padded, together)) - min(map(padded, together)) <= 120


def test_a_row_above_the_budget_is_an_error():
    with pytest.raises(ValueError, match="less than the 30 tokens of row 1"):
        budgeted([3, 30, 4], 29, seed=0)


def test_the_call_trains_by_tokens_and_resumes(tiny_bert, ragged_rows, tmp_path):
    rows = ragged_rows(60)
    call = {"max_tokens_per_batch": 64, "logging_steps": 1, "num_train_epochs": 2, "seed": 5}
    whole = HFTrainer()
    whole(tiny_bert(), rows, **call)
    assert 0 <= whole.metrics["train_padding_share"] < 0.1
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]

    stop = whole.state.max_steps // 2 + 1  # in the second epoch
    saved = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": stop}
    HFTrainer()(tiny_bert(), rows, **call, **saved)
    again = HFTrainer()
    again(tiny_bert(), rows, **call, **saved, checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == losses


@pytest.mark.parametrize(
    "also",
    [
        {"parity": True},
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
    ],
)
def test_only_one_thing_makes_the_batches(tiny_bert, ragged_rows, also):
    with pytest.raises(ValueError, match="max_tokens_per_batch=64 makes batches its own way"):
        HFTrainer()(tiny_bert(), ragged_rows(8), max_tokens_per_batch=64, **also)


def test_a_stream_has_no_lengths(tiny_bert, ragged_rows):
    stream = datasets.Dataset.from_list(ragged_rows(8)).to_iterable_dataset()
    with pytest.raises(ValueError, match="max_tokens_per_batch=64 needs the lengths"):
        HFTrainer()(tiny_bert(), stream, max_tokens_per_batch=64, max_steps=1)


def test_padding_is_told_after_cutting(tiny_bert, ragged_rows, monkeypatch):
    shares = []
    for cost in (1e9, 0.0):
        monkeypatch.setattr("hflit.tasks.module.forward_cost", lambda *_, cost=cost: cost)
        trainer = HFTrainer()
        trainer(tiny_bert(), ragged_rows(32), per_device_train_batch_size=16)
        shares.append(trainer.metrics["train_padding_share"])
    assert shares[0] > 0.2
    assert shares[1] == 0  # every length a part of its own
