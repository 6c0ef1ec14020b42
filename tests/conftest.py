"""Fixtures for every test: models and rows made in memory, no network, and no trace on disk."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{n}" for n in range(100)]


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets cache of this session, in place of the one in the home folder."""
    return tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(autouse=True)
def _leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, datasets_cache: Path
) -> Iterator[None]:
    """Give each test its own current directory, a throw-away cache and one thread."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer of the words w0 to w99: one token a word."""
    vocabulary = {token: index for index, token in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture
def tiny_bert() -> Callable[..., tuple[BertForSequenceClassification, PreTrainedTokenizerFast]]:
    """Make a two-layer BERT of width 32 and its tokenizer; the same seed, the same weights."""

    def make(num_labels: int = 2, dropout: float = 0.0, seed: int = 0, **config):
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
            "num_labels": num_labels,
            "pad_token_id": tokenizer.pad_token_id,
        }
        with torch.random.fork_rng():  # the test's own random numbers stay as they were
            torch.manual_seed(seed)
            model = BertForSequenceClassification(BertConfig(**(settings | config)))
        return model, tokenizer

    return make


@pytest.fixture
def ragged_rows() -> Callable[..., list[dict]]:
    """Make rows with texts of 4 to 29 words and labels from 0 to `classes - 1`."""

    def make(n: int, classes: int = 2, seed: int = 0) -> list[dict]:
        rng = random.Random(seed)
        return [
            {"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 29))), "label": index % classes}
            for index in range(n)
        ]

    return make
