"""The loss without all logits: the same loss and gradient, and less memory."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
)

from hflit.arguments import parse
from hflit.data.batching import IGNORE_INDEX
from hflit.tasks import TASKS
from hflit.tasks.chunks import CHUNK
from hflit.tasks.distillation import Distillation
from hflit.tasks.parts import token_loss
from tests.tasks.tiny import make

LARGE = ("language-generation", "sequence-sequence")


def batch_of(task):
    torch.manual_seed(5)
    lengths = torch.tensor([12, 7, 3])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 100, (3, 12)) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORE_INDEX),
    }


@pytest.mark.parametrize("school", [None, Distillation(None, 2.0, 0.3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("task", LARGE)
def test_chunks_change_nothing_but_rounding(task, smoothing, school, monkeypatch):
    """4 tokens at a time against all at once: loss and every gradient."""
    monkeypatch.setitem(CHUNK, "cpu", 4 * 105)
    found = []
    for is_chunked in (True, False):
        taught = None
        if school is not None:
            taught = Distillation(make(task, seed=1)[0].eval(), school.temperature, school.alpha)
        args, _ = parse({"label_smoothing_factor": smoothing})
        module = TASKS[task](make(task, seed=0)[0].train(), args, distillation=taught)
        assert module._heads_left_out
        module.__dict__["_heads_left_out"] = is_chunked
        loss = module._window_loss(batch_of(task), 7, 1)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.model.parameters()])
        found.append((loss.detach(), gradient))
    (loss, gradient), (whole_loss, whole) = found
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert (gradient - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("task", LARGE)
def test_no_more_logits_are_there_than_a_chunk(task, monkeypatch):
    sizes = []
    original = token_loss

    def noted(logits, labels, smoothing):
        sizes.append(tuple(logits.shape))
        return original(logits, labels, smoothing)

    monkeypatch.setattr("hflit.tasks.chunks.token_loss", noted)
    monkeypatch.setitem(CHUNK, "cpu", 4 * 105)
    module = TASKS[task](make(task, seed=0)[0].train(), parse({})[0])
    batch = batch_of(task)
    module._window_loss(batch, 7, 1).backward()
    tokens = module.count_items(batch)
    assert sum(rows for rows, _ in sizes) == tokens
    assert {rows for rows, _ in sizes} <= {4, tokens % 4}


def test_a_model_that_changes_its_logits_computes_them_all():
    """Cohere scales what its output layer gives, BART adds to it: their losses are the judge."""
    ids = torch.arange(5, 29).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tiny = {"vocab_size": 105, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    cohere = CohereForCausalLM(
        CohereConfig(
            **tiny, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, logit_scale=0.25,
        )
    )  # fmt: skip
    bart = BartForConditionalGeneration(
        BartConfig(
            **tiny, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0,
            max_position_embeddings=64, decoder_start_token_id=2,
        )
    )  # fmt: skip
    bart.final_logits_bias.normal_()
    for model, task, items in ((cohere, LARGE[0], 22), (bart, LARGE[1], 24)):
        module = TASKS[task](model.train(), parse({})[0])
        assert not module._heads_left_out
        assert model.training
        loss = module._window_loss(batch, items, 1)
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_asking_whether_a_head_is_plain_draws_no_random_numbers():
    module = TASKS[LARGE[0]](make(LARGE[0], seed=0)[0].train(), parse({})[0])
    module.model.transformer.drop.p = 0.5
    state = torch.get_rng_state()
    assert module._heads_left_out
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_starts_decoding_from_the_last_token_may_pad_with_0():
    """mBART takes the last token that is not padding, and the row asked with held nothing else."""
    config = MBartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
    )  # fmt: skip
    args, _ = parse({"use_cpu": True})
    module = TASKS["sequence-sequence"](MBartForConditionalGeneration(config), args)
    assert not module._heads_left_out  # a bias is added to what the head gives
