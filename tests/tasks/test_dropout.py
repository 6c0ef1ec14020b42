"""Dropout in less time: the distribution of torch's, and the gradient of what was drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hflit import HFTrainer
from hflit.tasks import dropout
from hflit.tasks.dropout import fast_dropout
from tests.tasks import tiny

ROWS, HEADS, LENGTH, WIDTH = 3, 4, 7, 8
SEES = torch.rand(ROWS, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.4
MASKS = {
    "none": {},
    "of each head": {"attn_mask": SEES},
    "of each row": {"attn_mask": SEES[:, :1]},
    "of all": {"attn_mask": SEES[0, 0]},
    "causal": {"is_causal": True},
}


@pytest.fixture
def given():
    """Queries, keys and values, as a layer's projections leave them: heads after lengths."""
    torch.manual_seed(1)
    made = (torch.randn(ROWS, LENGTH, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    return [each.transpose(1, 2) for each in made]


def attend(query, key, value, seed=3, **options):
    torch.manual_seed(seed)
    with fast_dropout():
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, **options)


@pytest.mark.parametrize("block", [1, LENGTH**2 * 3, LENGTH**2 * HEADS * 2, 2**18])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_gradient_are_those_of_the_weights_that_stay(
    given, mask, block, monkeypatch
):
    """Values that are a unit matrix show which of the weights stay."""
    monkeypatch.setattr(dropout, "BLOCK", block)
    query, key, value = given
    unit = torch.eye(LENGTH).expand(ROWS, HEADS, LENGTH, LENGTH)
    stays = (attend(query, key, unit, **MASKS[mask]) != 0).float()

    sees = MASKS[mask].get("attn_mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    sees = sees.tril() if mask == "causal" else sees
    scores = (query @ key.mT / math.sqrt(WIDTH)).masked_fill(~sees, -torch.inf)
    p = round(0.3 * 65536) / 65536
    expected = torch.softmax(scores, dim=-1) * stays / (1 - p) @ value

    found = attend(*given, **MASKS[mask])
    torch.testing.assert_close(found, expected)
    above = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, given, above) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_query_that_sees_nothing_reads_zeros_as_in_torch(given):
    sees = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
    sees[0, :, 2] = False
    found = attend(*given, attn_mask=sees)
    assert torch.equal(found[0, :, 2], torch.zeros(HEADS, WIDTH))
    assert torch.equal(F.scaled_dot_product_attention(*given, sees)[0, :, 2], found[0, :, 2])
    for gradient in torch.autograd.grad(found.sum(), given):
        assert gradient.isfinite().all()


def test_the_mean_of_attention_over_many_draws_is_that_without_dropout(given):
    """Of 2,000 draws, within 5 standard errors."""
    whole = F.scaled_dot_product_attention(*given)
    with torch.no_grad():
        draws = torch.stack([attend(*given, seed=seed) for seed in range(2000)])
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - whole).abs() < 5 * error).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_go_as_asked_and_the_others_make_up_for_them(p):
    """Of a million, within 5 standard deviations; the numbers that stay are drawn independently."""
    ones = torch.ones(1000, 1000, requires_grad=True)
    torch.manual_seed(0)
    with fast_dropout():
        dropped = F.dropout(ones, p)
    share = round(p * 65536) / 65536
    goes = dropped == 0
    assert abs(goes.double().mean() - share) < 5 * math.sqrt(p * (1 - p) / 1e6)
    for step in (1, 2, 3, 4, 1000):  # a neighbour in the same number, the next one, the next row
        both = (goes.flatten()[step:] & goes.flatten()[:-step]).double().mean()
        assert abs(both - share**2) < 5 * math.sqrt(p**2 * (1 - p**2) / 1e6)
    torch.testing.assert_close(dropped[~goes].unique(), torch.tensor([1 / (1 - share)]))
    dropped.backward(2 * torch.ones_like(dropped))
    assert torch.equal(ones.grad, 2 * dropped.detach())


def test_each_call_draws_anew_and_a_seed_gives_the_same_again():
    def draws():
        torch.manual_seed(5)
        with fast_dropout():
            return [nn.Dropout(0.5)(torch.ones(64)) for _ in range(3)]

    first, again = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-6])
def test_what_a_sixteen_bit_number_cannot_tell_is_left_to_torch(p):
    def dropped():
        torch.manual_seed(0)
        return F.dropout(torch.ones(1000), p)

    expected = dropped()
    with fast_dropout():
        assert torch.equal(dropped(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.0},
        {"attn_mask": torch.randn(LENGTH, LENGTH), "dropout_p": 0.3},
        {"dropout_p": 0.3, "dtype": torch.bfloat16},
        {"dropout_p": 0.3, "enable_gqa": True, "heads": 2},
    ],
    ids=["no dropout", "a mask of floats", "half precision", "grouped heads"],
)
def test_other_attention_is_that_of_torch(given, options):
    query, *others = (each.to(options.get("dtype", torch.float32)) for each in given)
    others = [each[:, : options.get("heads", HEADS)] for each in others]
    wanted = {k: v for k, v in options.items() if k not in ("dtype", "heads")}

    def read():
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(query, *others, **wanted)

    expected = read()
    with fast_dropout():
        assert torch.equal(read(), expected)


def losses(task="text-classification", **arguments):
    model, tokenizer = tiny.make(task, seed=1)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    for layer in model.base_model.encoder.layer:
        layer.attention.self.dropout.p = 0.2
    trainer = HFTrainer()
    settings = {"logging_steps": 1, "max_steps": 4, "learning_rate": 1e-2, "seed": 3}
    trainer((model, tokenizer), tiny.rows(task), task=task, **settings, **arguments)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_in_the_backward_drop_the_same(reentrant):
    checkpointed = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    assert losses(**checkpointed) == losses()


@pytest.mark.parametrize("arguments", [{}, {"parity": True}], ids=["default", "parity"])
def test_a_run_draws_in_bulk_unless_it_is_to_be_that_of_transformers(arguments, monkeypatch):
    drawn = []
    own = dropout._kept
    monkeypatch.setattr(dropout, "_kept", lambda *given: drawn.append(0) or own(*given))
    losses(**arguments)
    assert bool(drawn) == (not arguments)
