"""What a run starts from: its lengths, its padding token, its head, and what stays the caller's."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from hflit import HFTrainer
from hflit.loading import classifier_names, load_base, load_model, resolve_maxlength
from tests.conftest import word_tokenizer

UNLIMITED = int(1e30)  # what a tokenizer without a limit carries


@pytest.fixture
def tokenizer(tiny_bert):
    """A tokenizer without a limit of its own."""
    _, tokenizer = tiny_bert()
    tokenizer.model_max_length = UNLIMITED
    return tokenizer


def bert(positions=48):
    return BertConfig(
        vocab_size=105,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=positions,
    )


def roberta():
    small = bert(positions=66).to_dict() | {"model_type": "roberta", "pad_token_id": 1}
    return RobertaForSequenceClassification(RobertaConfig(**small))


def t5():
    config = T5Config(
        vocab_size=105,
        d_model=8,
        d_ff=8,
        d_kv=8,
        num_layers=1,
        num_heads=1,
        decoder_start_token_id=0,
        eos_token_id=3,
    )
    return T5ForSequenceClassification(config)


def gpt2():
    config = GPT2Config(
        vocab_size=105,
        n_embd=8,
        n_layer=1,
        n_head=1,
        n_positions=32,
        bos_token_id=3,
        eos_token_id=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2ForSequenceClassification(config)


def gpt2_tokenizer(**options):
    """One token a word, no special tokens around a text, and nothing to pad with."""
    words = Tokenizer(WordLevel({"[UNK]": 1, "<end>": 3, **{f"w{n}": 5 + n for n in range(100)}}))
    words.pre_tokenizer = Whitespace()
    options = {"unk_token": "[UNK]", "eos_token": "<end>", "model_max_length": UNLIMITED, **options}
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# Lengths.

MODELS = {
    "BERT": (lambda: AutoModelForSequenceClassification.from_config(bert()), 48),
    "RoBERTa": (roberta, 64),  # 66 positions, of which padding_idx + 1 = 2 are never reached
    "T5": (t5, None),
    "GPT-2": (gpt2, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_limits_the_length(name, tokenizer, tmp_path):
    # RoBERTa without a tokenizer limit took 66 and died of `index 66 is out of bounds`.
    make, limit = MODELS[name]
    model = make()
    for base in ((model, tokenizer), saved(model, tokenizer, tmp_path / "base")):
        start = load_base(base)
        assert resolve_maxlength(None, start) == limit
        assert resolve_maxlength(7, start) == 7
        if limit is None:
            assert resolve_maxlength(100_000, start) == 100_000
            continue
        assert resolve_maxlength(limit, start) == limit
        message = f"maxlength={limit + 1} is more than the {limit} tokens the model takes"
        with pytest.raises(ValueError, match=message):
            resolve_maxlength(limit + 1, start)


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_limits_the_default_length(name, tokenizer):
    make, _ = MODELS[name]
    tokenizer.model_max_length = 20
    start = load_base((make(), tokenizer))
    assert resolve_maxlength(None, start) == 20
    assert resolve_maxlength(30, start) == 30  # the model can, and the caller asked


def test_a_length_below_one_is_refused(tokenizer):
    start = load_base((MODELS["BERT"][0](), tokenizer))
    for length in (0, -1):
        with pytest.raises(ValueError, match=f"maxlength={length} must be at least 1"):
            resolve_maxlength(length, start)


@pytest.mark.parametrize(("length", "columns"), [(2, None), (3, ("text", "more", "label"))])
def test_a_length_without_room_for_text_is_refused(length, columns, tiny_bert):
    # The tokenizer then cut nothing at all: rows came out longer than maxlength.
    rows = [{"text": "w1 w2", "more": "w3", "label": label} for label in (0, 1)]
    with pytest.raises(ValueError, match=f"maxlength={length} leaves no room for text"):
        HFTrainer()(tiny_bert(), rows, columns=columns, maxlength=length, max_steps=1)
    HFTrainer()(tiny_bert(), rows, columns=columns, maxlength=length + 1, max_steps=1)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_the_default_length_fit_the_model(name, tokenizer):
    if name == "GPT-2":
        tokenizer = gpt2_tokenizer()
    text = " ".join(["w1"] * 90)
    rows = [{"text": text, "label": 0}, {"text": "w2", "label": 1}]
    trainer = HFTrainer()
    trainer((MODELS[name][0](), tokenizer), rows, max_steps=1)
    assert torch.isfinite(torch.tensor(trainer.metrics["train_loss"]))


# The padding token.


def test_25_a_padding_token_is_set_on_a_copy():
    """The caller's tokenizer got a `pad_token` in place."""
    tokenizer = gpt2_tokenizer()
    start = load_base((gpt2(), tokenizer))
    assert start.tokenizer.pad_token == "<end>"
    assert tokenizer.pad_token is None
    rows = [{"text": "w1", "label": 0}, {"text": "w1 w2 w3", "label": 1}]
    model, returned = HFTrainer()((gpt2(), tokenizer), rows, max_steps=1)
    assert tokenizer.pad_token is None
    assert returned.pad_token == "<end>"
    assert model.config.pad_token_id == 3  # else GPT-2 cannot find the last token of a row


def test_a_padding_token_that_is_there_stays():
    start = load_base((gpt2(), gpt2_tokenizer(pad_token="w99")))
    assert start.tokenizer.pad_token == "w99"


def test_nothing_to_pad_with_is_refused():
    with pytest.raises(ValueError, match="no padding token. Set tokenizer.pad_token"):
        load_base((gpt2(), gpt2_tokenizer(eos_token=None)))


def test_gpt2_reads_each_row_at_its_last_token():
    # One batch of ragged rows gives each row the loss it has alone.
    rows = [{"text": "w1 w2 w3 w4", "label": 0}, {"text": "w5", "label": 1}]
    model = gpt2()
    trainer = HFTrainer()
    trainer((copy.deepcopy(model), gpt2_tokenizer()), rows, max_steps=1, learning_rate=0.0)
    model.eval()
    alone = [
        model(torch.tensor([ids]), labels=torch.tensor([label])).loss
        for ids, label in (([6, 7, 8, 9], 0), ([10], 1))
    ]
    expected = torch.stack(alone).mean().item()
    assert trainer.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)


# What is the caller's stays so.


@pytest.mark.parametrize("kind", ["names", "scores", "several labels"])
def test_14_25_what_the_caller_passed_is_unchanged(kind, tiny_bert, ragged_rows):
    """The caller's config was rewritten, and his tokenizer and columns changed in place."""
    labels = {"names": ["neg", "pos"], "scores": [0.5, 2.0], "several labels": [["a", "b"], ["a"]]}
    model, tokenizer = tiny_bert(num_labels=1 if kind == "scores" else 2)
    tokenizer.padding_side = "left"
    rows = [
        {"body": row["text"], "kind": copy.copy(labels[kind][row["label"]])}
        for row in ragged_rows(8)
    ]
    columns, arguments = ["body", "kind"], {"max_steps": 2, "lr_scheduler_kwargs": {}}
    given = (rows, columns, arguments)
    before = copy.deepcopy(given)
    config, internals = model.config.to_dict(), tokenizer.backend_tokenizer.to_str()
    inner = model.bert.config.to_dict()
    HFTrainer()((model, tokenizer), rows, rows, columns=columns, **arguments)
    assert given == before
    assert model.config.to_dict() == config
    assert model.bert.config.to_dict() == inner
    assert tokenizer.backend_tokenizer.to_str() == internals
    assert tokenizer.padding_side == "left"


def test_the_callers_model_is_trained_in_place(tiny_bert, ragged_rows):
    model, tokenizer = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    trained, _ = HFTrainer()((model, tokenizer), ragged_rows(8), max_steps=1)
    weights = model.state_dict()
    assert not torch.equal(weights["classifier.weight"], before["classifier.weight"])
    for name, weight in trained.state_dict().items():
        assert weight.data_ptr() == weights[name].data_ptr()


def test_a_saved_base_is_left_as_it_is(tiny_bert, ragged_rows, tmp_path):
    path = saved(*tiny_bert(), tmp_path / "base")
    before = {file: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    HFTrainer()(tmp_path / "base", ragged_rows(8, classes=3), max_steps=1)
    HFTrainer()(path, ragged_rows(8), max_steps=1)
    assert {file: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before


# Heads.


@pytest.mark.parametrize("head", [BertModel, BertForQuestionAnswering])
def test_a_model_with_another_head_is_refused(head, tokenizer, ragged_rows):
    model = head(bert())
    message = f"base holds a {head.__name__}; .*AutoModelForSequenceClassification"
    with pytest.raises(ValueError, match=message):
        load_model(load_base((model, tokenizer)), AutoModelForSequenceClassification, {})
    with pytest.raises(ValueError, match=message):
        HFTrainer()((model, tokenizer), ragged_rows(4), max_steps=1)


def test_14_a_head_of_another_width_is_refused(tiny_bert, ragged_rows):
    """`num_labels=3` was written over a two-way head: `Target 2 is out of bounds`."""
    model, tokenizer = tiny_bert(num_labels=2)
    message = "model with 2 classes, but the training data has 3"
    with pytest.raises(ValueError, match=message):
        HFTrainer()((model, tokenizer), ragged_rows(9, classes=3), max_steps=1)
    assert model.config.num_labels == 2
    model, tokenizer = tiny_bert(num_labels=3)
    rows = [{"text": "w1", "label": label} for label in ("no", "yes")]
    with pytest.raises(ValueError, match="model with 3 classes, but the training data has 2"):
        HFTrainer()((model, tokenizer), rows, max_steps=1)


@pytest.mark.parametrize(
    ("labels", "classes"), [(("no", "yes"), 2), (tuple("abcd"), 4), ((0.5, 1.0), 1)]
)
def test_14_a_saved_head_of_another_width_is_made_anew(labels, classes, tiny_bert, tmp_path):
    """A saved three-way head with two-label data was a size mismatch, with no option."""
    path = saved(*tiny_bert(num_labels=3), tmp_path / "base")
    rows = [{"text": "w1", "label": label} for label in labels]
    model, _ = HFTrainer()(path, rows, max_steps=1, output_dir=str(tmp_path / "run"))
    assert model.classifier.weight.shape[0] == model.config.num_labels == classes
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert again.classifier.weight.shape[0] == classes


def test_a_base_without_a_head_gets_one(tokenizer, tmp_path):
    path = saved(BertModel(bert()), tokenizer, tmp_path / "base")
    assert classifier_names(load_base(path)) is None
    rows = [{"text": "w1", "label": label} for label in "abc"]
    model, _ = HFTrainer()(path, rows, max_steps=1)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.classifier.weight.shape[0] == 3


@pytest.mark.parametrize("base", [None, 3, ("a", "b"), ["model"]])
def test_a_base_of_another_kind_is_refused(base, ragged_rows):
    with pytest.raises(TypeError, match="Pass a hub id, a folder or .model, tokenizer."):
        HFTrainer()(base, ragged_rows(4))


def test_a_tokenizer_by_name_is_refused(tiny_bert, ragged_rows):
    model, _ = tiny_bert()
    with pytest.raises(TypeError, match="The tokenizer in base is str. Load it first"):
        HFTrainer()((model, "bert-base-uncased"), ragged_rows(4))


def test_26_a_config_without_a_padding_token_trains():
    """`config.pad_token_id` is no attribute of every config any more."""
    config = RwkvConfig(
        vocab_size=105, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        context_length=64,
    )  # fmt: skip
    assert not hasattr(config, "pad_token_id")
    rows = [{"text": "w1 w2 w3"}, {"text": "w4 w5"}]
    trainer = HFTrainer()
    base = RwkvForCausalLM(config), word_tokenizer()
    trainer(base, rows, task="language-generation", max_steps=1, maxlength=8, cache=False)
    assert trainer.state.global_step == 1
