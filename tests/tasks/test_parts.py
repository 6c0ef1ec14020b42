"""Padding and logits that are not computed: the same loss and gradient without them."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from hflit import HFTrainer
from hflit.tasks.parts import (
    cheapest_cuts,
    logits_only_at,
    split_by_length,
    token_loss,
)
from tests.tasks.tiny import make


def cost(lengths, cuts, forward_cost):
    parts = itertools.pairwise(cuts)
    return sum(lengths[start] * (stop - start) + forward_cost for start, stop in parts)


def tokens_of_parts(lengths, cuts):
    """Of each part with more rows than one."""
    parts = itertools.pairwise(cuts)
    return [lengths[start] * (stop - start) for start, stop in parts if stop - start > 1]


@pytest.mark.parametrize("most", [np.inf, 100, 30, 0])
@pytest.mark.parametrize("forward_cost", [0, 5, 40, 1000])
def test_no_other_cuts_cost_less(forward_cost, most):
    lengths = np.sort(np.random.default_rng(0).integers(1, 60, 9))[::-1]
    every = [
        [0, *inner, 9] for count in range(9) for inner in itertools.combinations(range(1, 9), count)
    ]
    allowed = [cuts for cuts in every if max(tokens_of_parts(lengths, cuts), default=0) <= most]
    best = min(cost(lengths, cuts, forward_cost) for cuts in allowed)
    chosen = cheapest_cuts(lengths, forward_cost, most)
    assert chosen in allowed
    assert cost(lengths, chosen, forward_cost) == best


@pytest.mark.parametrize("side", ["right", "left"])
def test_parts_hold_every_token_once(side):
    torch.manual_seed(0)
    lengths = torch.randint(1, 20, (12,))
    mask = torch.arange(20) < lengths[:, None]
    mask = mask.flip(1) if side == "left" else mask
    batch = {
        "input_ids": torch.arange(240).view(12, 20) * mask,
        "attention_mask": mask.long(),
        "labels": torch.arange(12),
        "start": lengths // 2 + (20 - lengths if side == "left" else 0),  # a token of the row
        "scores": torch.rand(12, 20),  # fractions: labels of 20 classes, not tokens
    }
    parts = split_by_length(batch, 5, places=("start",))
    assert len(parts) > 1
    for part in parts:
        rows = part["labels"]
        assert part["input_ids"].shape[1] == int(lengths[rows].max())
        assert part["scores"].shape[1] == 20
        at = batch["start"][rows]
        token = part["input_ids"].gather(1, part["start"][:, None])
        assert torch.equal(token, batch["input_ids"][rows].gather(1, at[:, None]))
    assert sorted(torch.cat([part["labels"] for part in parts]).tolist()) == list(range(12))
    tokens = torch.cat([part["input_ids"][part["attention_mask"] > 0] for part in parts])
    assert sorted(tokens.tolist()) == sorted(batch["input_ids"][mask].tolist())


def test_a_batch_of_one_length_is_left_alone():
    batch = {"input_ids": torch.ones(4, 7), "attention_mask": torch.ones(4, 7)}
    assert split_by_length(batch, 1) == [batch]


def test_a_large_batch_of_one_length_is_cut_on_a_cpu():
    """At most 32 x forward_cost tokens a part: 96 are 4 rows of 21."""
    batch = {"input_ids": torch.arange(210).view(10, 21), "attention_mask": torch.ones(10, 21)}
    parts = split_by_length(batch, 3)
    assert max(len(part["input_ids"]) for part in parts) == 4
    assert len(parts) == 3
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_cutting_changes_nothing_but_rounding(tiny_bert, ragged_rows, monkeypatch, accumulation):
    parts = []  # of each micro-batch

    def split(*given):
        made = split_by_length(*given)
        parts.append(len(made))
        return made

    def losses(forward_cost):
        parts.clear()
        monkeypatch.setattr("hflit.tasks.module.forward_cost", lambda *_: forward_cost)
        monkeypatch.setattr("hflit.tasks.module.split_by_length", split)
        trainer = HFTrainer()
        trainer(
            tiny_bert(),
            ragged_rows(60),
            logging_steps=1,
            learning_rate=5e-4,
            gradient_accumulation_steps=accumulation,
        )
        return [e["loss"] for e in trainer.state.log_history if "loss" in e]

    whole = losses(1e9)
    assert set(parts) == {1}
    cut = losses(3.0)
    assert max(parts) > 1
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


def test_parity_never_cuts(tiny_bert, ragged_rows, monkeypatch):
    calls = []
    monkeypatch.setattr("hflit.tasks.module.split_by_length", lambda *_: calls.append(1))
    HFTrainer()(tiny_bert(), ragged_rows(20), parity=True)
    assert not calls


def test_logits_at_chosen_tokens_give_the_same_loss_and_gradient():
    """The output layer sees the masked tokens alone; every weight learns as before."""
    found = []
    for sparse in (True, False):
        model, _ = make("language-modeling", seed=0)
        ids = torch.arange(5, 29).reshape(2, 12)
        labels = ids.masked_fill(ids % 5 != 0, -100)
        chosen = labels != -100
        with logits_only_at(chosen, model) if sparse else nullcontext():
            logits = model(ids).logits
        assert logits.shape == ((int(chosen.sum()), 105) if sparse else (2, 12, 105))
        loss = token_loss(logits, labels)
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert model(ids).logits.shape == (2, 12, 105)  # the hook is gone
