"""token-detection: any masked-language base gets a discriminator that finds replaced tokens."""

import random

import datasets
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
)

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.loading import load_base
from hflit.metrics.detection import DetectionMetrics
from hflit.tasks import TASKS
from tests.conftest import WORDS, word_tokenizer

MAXLENGTH = 24
SETTINGS = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "logging_steps": 1,
}
WIDE = {"vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = {"intermediate_size": 64, "max_position_embeddings": 66}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
BASES = {
    "electra": lambda: ElectraForMaskedLM(
        ElectraConfig(**WIDE, **LONG, **DROPOUT, embedding_size=16)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**WIDE, **LONG, **DROPOUT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**WIDE, **LONG, pad_token_id=0)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=105, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=66
        )
    ),
}


def base(kind):
    torch.manual_seed(0)
    return BASES[kind](), word_tokenizer()


def pair(kind):
    return TASKS["token-detection"].load(load_base(base(kind)), {})


@pytest.fixture
def rows():
    words = random.Random(0)
    return [{"text": " ".join(words.choices(WORDS, k=words.randint(3, 40)))} for _ in range(30)]


def train(start, rows, validation=None, **arguments):
    trainer = HFTrainer()
    model, _ = trainer(
        start, rows, validation, task="token-detection", maxlength=MAXLENGTH, **arguments
    )
    return trainer, model


@pytest.mark.parametrize("kind", BASES)
def test_37_every_base_gets_a_proper_discriminator(kind, rows, tmp_path):
    """txtai crashes on BERT, and gives DistilBERT a masked-language head for 0/1 labels."""
    trainer, model = train(base(kind), rows, output_dir=str(tmp_path / "out"), **SETTINGS)
    expected = ElectraForPreTraining if kind == "electra" else None
    assert expected is None or isinstance(model.discriminator, expected)
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history[:-1])
    # Each half loads on its own, to the logits it has.
    ids = torch.tensor([[2, 10, 11, 3]])
    loader = expected or AutoModelForTokenClassification
    for name, kind_of_model in (("generator", type(model.generator)), ("discriminator", loader)):
        loaded = kind_of_model.from_pretrained(tmp_path / "out" / name)
        half = getattr(model, name)
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(ids).logits, half(ids).logits, rtol=0, atol=0, msg=name
            )


def test_a_saved_pair_trains_on(rows, tmp_path):
    _, first = train(base("electra"), rows, output_dir=str(tmp_path / "out"), **SETTINGS)
    _, second = train(str(tmp_path / "out"), rows, **{**SETTINGS, "learning_rate": 0.0})
    trained = second.state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(trained[name], weight), name


@pytest.mark.parametrize("kind", ["electra", "bert"])
def test_embeddings_are_shared(kind, rows):
    _, model = train(base(kind), rows, **SETTINGS)
    ours = model.generator.get_input_embeddings().weight
    assert model.discriminator.get_input_embeddings().weight is ours
    assert model.generator.get_output_embeddings().weight is ours  # still tied


@pytest.mark.parametrize("accumulation", [1, 3])
def test_parity_is_bit_identical_with_dropout(rows, accumulation):
    settings = {**SETTINGS, "gradient_accumulation_steps": accumulation}
    tokenizer = word_tokenizer()
    tokens = [
        tokenizer(r["text"], truncation=True, max_length=MAXLENGTH, return_special_tokens_mask=True)
        for r in rows
    ]
    theirs = pair("electra")
    trainer = Trainer(
        model=theirs,
        args=TrainingArguments(
            output_dir="reference",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=False,
            remove_unused_columns=False,
            **settings,
        ),  # fmt: skip
        train_dataset=datasets.Dataset.from_list([dict(t) for t in tokens]),
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    trainer.train()
    run, ours = train(pair_base("electra"), rows, merge=None, parity=True, **settings)
    figures = ("loss", "grad_norm", "learning_rate")
    expected = [{k: e[k] for k in figures} for e in trainer.state.log_history if "loss" in e]
    actual = [{k: e[k] for k in figures} for e in run.state.log_history if "loss" in e]
    assert actual == expected
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def pair_base(kind):
    return pair(kind), word_tokenizer()


def test_accumulation_equals_one_large_batch(rows):
    """The mean is over the masked tokens of the window, and over all its tokens."""
    torch.manual_seed(0)
    model = pair("bert").eval()
    model.train = lambda mode=True: model  # no dropout
    args = Arguments()
    task = TASKS["token-detection"](model, args)
    ids = torch.randint(5, 105, (8, 20))
    lengths = torch.randint(4, 21, (8,))
    mask = (torch.arange(20) < lengths[:, None]).long()
    labels = ids.masked_fill((ids % 3 > 0) | (mask == 0), -100)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}

    def gradient(parts):
        model.zero_grad()
        window = [{k: v[rows] for k, v in batch.items()} for rows in torch.arange(8).chunk(parts)]
        items = sum(task.count_items(part) for part in window)
        total = 0.0
        with pytest.MonkeyPatch.context() as patch:
            # What is sampled must not depend on the cut: always the most probable token.
            patch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
            for part in window:
                loss = task._window_loss(part, items, parts)
                loss.backward()
                total += float(loss.detach())
        return total, torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    loss, large = gradient(1)
    window_loss, window = gradient(4)
    assert window_loss == pytest.approx(loss, rel=1e-6)
    assert float((window - large).norm() / large.norm()) < 1e-6


def test_padding_is_not_scored():
    model = pair("bert").eval()
    ids = torch.tensor([[2, 10, 11, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, 12, -100, -100, -100, -100]])
    output = model(ids, mask, labels=labels)
    assert output.replaced[0, 4:].tolist() == [-100, -100]
    assert output.replaced[0, [0, 2, 3]].tolist() == [0, 0, 0]  # never masked, never replaced


@pytest.mark.parametrize("merge", ["concat", "pack", None])
def test_auto_metrics(rows, merge):
    trainer, _ = train(base("electra"), rows, rows[:9], merge=merge, metrics="auto", **SETTINGS)
    assert {"eval_precision", "eval_recall", "eval_f1", "eval_masked_loss"} <= set(trainer.metrics)


def test_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    metrics, guesses, truths = DetectionMetrics(), [], []
    for _ in range(3):
        logits = torch.randn(4, 7)
        replaced = torch.randint(0, 2, (4, 7))
        replaced[:, -1] = -100
        labels = torch.full((4, 7), -100)
        labels[:, 0] = 5
        outputs = {"logits": logits, "replaced": replaced, "sums": torch.tensor([8.0, 1.0])}
        metrics.update(outputs, {"labels": labels})
        guesses += (logits[:, :-1] > 0).flatten().tolist()
        truths += replaced[:, :-1].flatten().tolist()
    figures = metrics.compute()
    expected = precision_recall_fscore_support(truths, guesses, average="binary")[:3]
    assert [figures[k] for k in ("precision", "recall", "f1")] == pytest.approx(expected)
    assert figures["masked_loss"] == pytest.approx(2.0)  # 3 x 8 nats over 3 x 4 masked tokens


def test_label_smoothing_is_refused_before_weights_are_loaded(rows, tmp_path):
    """It was accepted, and changed no loss."""
    model, tokenizer = base("bert")
    model.config.save_pretrained(tmp_path)  # and no weights
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 means nothing to token-"):
        HFTrainer()(str(tmp_path), rows, task="token-detection", label_smoothing_factor=0.1)
