"""The last layer computes the tokens that are read, for the same logits and gradients."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from hflit import HFTrainer
from hflit.tasks.last_layer import (
    READ_EACH_TOKEN,
    READ_THE_FIRST_TOKEN,
    chosen_tokens_only,
    first_token_only,
)
from hflit.tasks.parts import logits_only_at
from tests.tasks.tiny import TEXTS, make

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "num_labels": 3,
    "attn_implementation": "sdpa",
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "camembert": CamembertConfig(**SMALL),
    "distilbert": DistilBertConfig(
        vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40,
        num_labels=3,
    ),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "roberta": RobertaConfig(**SMALL),
    "xlm-roberta": XLMRobertaConfig(**SMALL),
}  # fmt: skip
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}


def make_model(kinds, name, **changes):
    """In double precision, far from its small start, so that all of it matters."""
    (kind,) = (each for each in kinds if each.config_class is type(CONFIGS[name]))
    torch.manual_seed(0)
    model = kind(type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), **changes})).double()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.3 * torch.randn_like(each))
    return model


def classifier(name, **changes):
    return make_model(READ_THE_FIRST_TOKEN, name, **changes)


def masked(name, **changes):
    return make_model(READ_EACH_TOKEN, name, **changes)


def last_layer(model):
    """And the module that its middle is computed in."""
    body = model.base_model
    if hasattr(body, "transformer"):
        return body.transformer.layer[-1], body.transformer.layer[-1].ffn.lin1
    return body.encoder.layer[-1], body.encoder.layer[-1].intermediate.dense


def batch(packed=False):
    """Four rows of up to twelve tokens, of which 2, 4, 1 and 0 are chosen."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 3:] = 0
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[0, [3, 11]] = chosen[1, [0, 2, 3, 6]] = chosen[2, 1] = True
    if packed:  # two texts in each row
        documents = (torch.arange(12) >= 5).long() + mask
        mask = (documents[:, :, None] == documents[:, None, :])[:, None]
    return {"input_ids": ids, "attention_mask": mask}, chosen


def run(model, fast, packed=False):
    """Logits, gradients, and how many tokens the last layer's middle was given."""
    inputs, chosen = batch(packed)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer, middle = last_layer(inner)
    seen = []
    watch = middle.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    model.zero_grad()
    if type(inner) in READ_EACH_TOKEN:
        with logits_only_at(chosen, inner) if fast else nullcontext():
            logits = model(**inputs).logits
        logits = logits if fast else logits[chosen]
        (logits * torch.arange(50)).sum().backward()
    else:
        with first_token_only(model) if fast else nullcontext():
            logits = model(**inputs).logits
            (logits * torch.arange(1, 4)).sum().backward()
    watch.remove()
    assert "forward" not in vars(layer)
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen


def assert_same(model, fast_tokens, packed=False):
    theirs, expected, all_tokens = run(model, fast=False, packed=packed)
    ours, gradients, seen = run(model, fast=True, packed=packed)
    assert set(all_tokens) == {12}
    assert set(seen) == {fast_tokens}
    # Of double precision; sums in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kinds", [READ_THE_FIRST_TOKEN, READ_EACH_TOKEN])
def test_all_kinds_are_tried(kinds):
    assert {type(each) for each in CONFIGS.values()} == {each.config_class for each in kinds}


@pytest.mark.parametrize("name", CONFIGS)
def test_classifiers(name):
    assert_same(classifier(name).eval(), fast_tokens=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_masked_language_models(name, packed):
    assert_same(masked(name).eval(), fast_tokens=4, packed=packed)


def test_no_token_is_chosen():
    model = masked("bert")
    inputs, chosen = batch()
    with logits_only_at(torch.zeros_like(chosen), model):
        logits = model(**inputs).logits
    assert logits.shape == (0, 50)
    logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [classifier, masked])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_checkpointed_layers(make, name, reentrant):
    model = make(name, **NO_DROPOUT[name]).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, fast_tokens=1 if make is classifier else 4)
    *_, seen = run(model, fast=True)
    assert len(seen) == 2  # in the forward, and again in the backward


def test_adapters():
    adapter = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "key", "value"], init_lora_weights=False
    )
    assert_same(get_peft_model(classifier("bert"), adapter).double().eval(), fast_tokens=1)


@pytest.mark.parametrize(
    ("make", "kind"), [(classifier, "SEQ_CLS"), (masked, "FEATURE_EXTRACTION")]
)
def test_a_learned_prefix_needs_all_of_the_layer(make, kind):
    prefix = PrefixTuningConfig(task_type=kind, num_virtual_tokens=3)
    assert_same(get_peft_model(make("bert"), prefix).double().eval(), fast_tokens=12)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_hidden_states": True},
        {"attn_implementation": "eager", "output_attentions": True},
        {"attn_implementation": "eager"},
        {"is_decoder": True},
        {"chunk_size_feed_forward": 12},
        {"num_hidden_layers": 0},
    ],
)
def test_what_shows_or_needs_the_other_tokens_computes_them(changes):
    model = classifier("bert", **changes).eval()
    layers = model.base_model.encoder.layer
    with first_token_only(model):
        assert not any("forward" in vars(each) for each in layers)


def test_other_models_compute_all_tokens():
    tagger = BertForTokenClassification(CONFIGS["bert"])
    for other in (tagger, masked("bert"), nn.Linear(2, 2)):
        with first_token_only(other):
            assert not any("forward" in vars(each) for each in other.modules())
    chosen = batch()[1]
    for other in (tagger, classifier("bert")):
        assert chosen_tokens_only(chosen, other)[1] is chosen


def test_twice_is_once():
    model = classifier("bert").eval()
    with first_token_only(model):
        last = last_layer(model)[0]
        ours = last.forward
        with first_token_only(model):
            assert last.forward is ours
        assert last.forward is ours


def test_attention_drops_as_much_as_before():
    """Where all tokens count alike, one is left out or counts twice."""
    model = classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5).train()
    attention = last_layer(model)[0].attention.self
    read = []
    attention.register_forward_hook(lambda _, inputs, outputs: read.append(outputs[0]))
    with torch.no_grad():
        for each in (attention.query, attention.key, attention.value):
            each.weight.zero_()
            each.bias.zero_()
        attention.value.bias.fill_(1.0)  # so that what is read is the sum of the weights
    run(model, fast=True)
    sums = read[-1]
    assert sums.shape == (4, 1, 32)
    by_head = sums.unflatten(-1, (4, 8))
    assert (by_head - by_head[..., :1]).abs().max() < 1e-12
    # Row 0 has 12 tokens, each with a twelfth; dropped or doubled they make sixths.
    sixths = by_head[0, 0, :, 0] * 6
    torch.testing.assert_close(sixths, sixths.round(), rtol=0, atol=1e-9)
    assert (sixths - 6).abs().max() > 0.5
    model.eval()
    run(model, fast=True)
    torch.testing.assert_close(read[-1], torch.ones_like(read[-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parity", [False, True])
def test_a_call_switches_it_on_by_default_and_off_for_parity(tmp_path, parity):
    base, tokenizer = make("text-classification", seed=0)
    seen = []
    last_layer(base)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    HFTrainer()(
        (base, tokenizer), rows, rows, max_steps=2, parity=parity, cache=False,
        eval_strategy="steps", eval_steps=1, output_dir=str(tmp_path), save_strategy="no",
    )  # fmt: skip
    assert seen
    assert (set(seen) == {1}) is not parity
