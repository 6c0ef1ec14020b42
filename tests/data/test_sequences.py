"""Sources and targets -> token ids and labels, checked by row; all in memory, no network."""

import copy
import logging

import datasets
import pandas as pd
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    DataCollatorForSeq2Seq,
    LEDConfig,
    LEDForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hflit.data import data_module
from hflit.data.sequences import Sequences, references
from hflit.loading import load_base, resolve_maxlength
from tests.conftest import WORDS

PAD, EOS, IGNORED = 0, 1, -100
ROWS = [
    {"source": "w1 w2 w3", "target": "w4 w5"},
    {"source": "w6", "target": "w7 w8 w9 w10"},
    {"source": "w1 w2", "target": "w3"},
]
FORMATS = {
    "dataset": datasets.Dataset.from_list,
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "rows": list,
}


def sequence_tokenizer(side="right", **settings):
    """Words and an end: as T5's, it puts nothing first and has no limit. w1 is token 4."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
        **settings,
    )


def mbart_tokenizer(target="de_DE"):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b", "en_XX", "de_DE", "ro_RO", "<mask>"]
    return MBartTokenizer(
        vocab=[(piece, -1.0) for piece in pieces], src_lang="en_XX", tgt_lang=target
    )


def batches(train, validation=None, tokenizer=None, columns=None, parity=False, **settings):
    """The validation batches; those of the training rows, in their order, without validation."""
    args = TrainingArguments(
        output_dir="unused",
        report_to=[],
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        train_sampling_strategy="sequential",
        use_cpu=True,
    )
    tokenization = Sequences(tokenizer or sequence_tokenizer(), columns, **settings)
    data = data_module(
        train, validation, tokenization=tokenization, args=args, cache=False, parity=parity
    )
    data.setup()
    if validation is not None:
        return list(data.val_dataloader())
    return [batch for window in data.train_dataloader() for batch in window]


def test_source_and_target_are_padded_each_to_its_own_longest():
    (batch,) = batches(ROWS)
    assert batch["input_ids"].tolist() == [[4, 5, 6, EOS], [9, EOS, PAD, PAD], [4, 5, EOS, PAD]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 3]
    assert batch["labels"].tolist() == [
        [7, 8, EOS, IGNORED, IGNORED],
        [10, 11, 12, 13, EOS],
        [6, EOS, IGNORED, IGNORED, IGNORED],
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_equal_those_of_transformers_collator(side):
    tokenizer = sequence_tokenizer(side)
    encoded = [tokenizer(row["source"], text_target=row["target"]) for row in ROWS]
    expected = DataCollatorForSeq2Seq(tokenizer)(encoded)
    (batch,) = batches(ROWS, tokenizer=tokenizer, parity=True)
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
    (batch,) = batches(ROWS, tokenizer=tokenizer)  # to the right, whatever its side
    for name, values in batches(ROWS)[0].items():
        assert torch.equal(batch[name], values), name


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_formats_give_identical_batches(form):
    (expected,) = batches(ROWS)
    given = form(ROWS)
    before = copy.deepcopy(given)
    (batch,) = batches(given, prefix="")
    assert all(torch.equal(batch[name], values) for name, values in expected.items())
    assert str(given) == str(before)  # the caller's rows stay as they were


def test_stream_gives_the_same_rows():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert torch.equal(batches(ROWS, stream)[0]["labels"], batches(ROWS)[0]["labels"])
    assert list(references(stream.select_columns(["source", "target"])))[2] == ["w3"]


def test_prefix_stands_before_each_source_and_no_target():
    (batch,) = batches(ROWS, prefix="w99 ")
    assert batch["input_ids"][:, 0].tolist() == [102, 102, 102]
    assert torch.equal(batch["labels"], batches(ROWS)[0]["labels"])


def test_columns_may_have_other_names():
    rows = [{"more": 1, "de": row["target"], "en": row["source"]} for row in ROWS]
    (batch,) = batches(rows, columns=("en", "de"))
    assert torch.equal(batch["labels"], batches(ROWS)[0]["labels"])


def test_22_tokenizer_without_limit_cuts_nothing():
    """T5 has neither positions nor, without `model_max_length`, a limit: 1e30 is none."""
    tokenizer = sequence_tokenizer()
    config = T5Config(vocab_size=103, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    base = load_base((T5ForConditionalGeneration(config), tokenizer))
    assert tokenizer.model_max_length > 1e29
    assert resolve_maxlength(None, base, "target_maxlength") is None
    long = [{"source": "w1 " * 700, "target": "w2 " * 600}]
    (batch,) = batches(long, maxlength=resolve_maxlength(None, base))
    assert batch["input_ids"].shape == (1, 701)
    assert batch["labels"].shape == (1, 601)


def test_a_model_may_have_fewer_positions_for_targets(tmp_path):
    """LED was given targets longer than it has positions for: an IndexError of torch."""
    config = LEDConfig(
        vocab_size=103, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, attention_window=4,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=16,
    )  # fmt: skip
    base = load_base((LEDForConditionalGeneration(config), sequence_tokenizer()))
    assert resolve_maxlength(None, base) == 64
    assert resolve_maxlength(None, base, "target_maxlength") == 16
    with pytest.raises(ValueError, match="target_maxlength=17 is more than the 16 tokens"):
        resolve_maxlength(17, base, "target_maxlength")


def test_23_targets_have_a_length_of_their_own():
    """They were cut to the length of the sources: 20 tokens to 4."""
    rows = [{"source": "w1 " * 10, "target": "w2 " * 20}]
    (batch,) = batches(rows, maxlength=4)
    assert batch["input_ids"].tolist() == [[4, 4, 4, EOS]]
    assert batch["labels"].tolist() == [[5] * 20 + [EOS]]
    (batch,) = batches(rows, maxlength=4, target_maxlength=6)
    assert batch["labels"].tolist() == [[5] * 5 + [EOS]]


def test_23_targets_are_tokenized_as_targets():
    """mBART ends a source with its language, and a target with another."""
    english, german = 6, 7
    rows = [{"source": "a b", "target": "b a"}]
    (batch,) = batches(rows, tokenizer=mbart_tokenizer())
    assert batch["input_ids"].tolist() == [[4, 5, 2, english]]
    assert batch["labels"].tolist() == [[5, 4, 2, german]]


def test_target_language_is_part_of_the_cache_key():
    german, romanian = (Sequences(mbart_tokenizer(to)).settings for to in ("de_DE", "ro_RO"))
    assert german != romanian
    assert german == Sequences(mbart_tokenizer("de_DE")).settings


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("column", ["source", "target"])
def test_23_missing_text_is_named_by_its_row(form, column):
    """A prefix and a missing source used to be a bare TypeError."""
    rows = [*ROWS, {**ROWS[0], column: None}]
    with pytest.raises(ValueError, match=f"Row 3 of the training data has no text in '{column}'"):
        batches(form(rows), prefix="w9 ")
    with pytest.raises(ValueError, match=f"Row 3 of the validation data .* '{column}'"):
        batches(ROWS, form(rows))


def test_23_nan_is_a_missing_text():
    frame = pd.DataFrame({"source": ["w1", float("nan")], "target": ["w1", "w2"]})
    with pytest.raises(ValueError, match="Row 1 of the training data has no text in 'source'"):
        batches(frame, prefix="w9 ")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_first_reference_is_learned_and_all_are_compared_with(form):
    rows = [{"source": "w1", "target": ["w2", "w3 w4"]}, {"source": "w5", "target": ["w6"]}]
    (batch,) = batches(form(rows))
    assert batch["labels"].tolist() == [[5, EOS], [9, EOS]]
    given = datasets.Dataset.from_list(rows)
    assert list(references(given)) == [["w2", "w3 w4"], ["w6"]]
    # One target in training and several in validation go together.
    assert torch.equal(batches(ROWS, form(rows))[0]["labels"], batch["labels"])


BROKEN = {
    "none": (None, "Row 1 of the training data has no text"),
    "no reference": ([], "Row 1 of the training data has no text"),
    "a missing one": (["w1", None], r"Row 1 .* has \['w1', None\] in 'target', not a list"),
}


@pytest.mark.parametrize(("targets", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_references_are_named_by_their_row(targets, message):
    rows = [{"source": "w1", "target": ["w2"]}, {"source": "w5", "target": targets}]
    with pytest.raises(ValueError, match=message):
        batches(rows)


def test_other_kinds_of_targets_are_refused():
    with pytest.raises(ValueError, match="holds int64, not text: row 0 is 3"):
        batches([{"source": "w1", "target": 3}])
    with pytest.raises(ValueError, match=r"has \[3\] in 'target', not a list of texts"):
        batches([{"source": "w1", "target": [3]}])
    with pytest.raises(ValueError, match="has no rows"):
        batches(ROWS, datasets.Dataset.from_list(ROWS).select([]))


def test_cut_rows_are_reported_for_sources_and_targets(caplog):
    with caplog.at_level(logging.WARNING, logger="hflit.data.encoding"):
        batches(ROWS, maxlength=3, target_maxlength=4)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 training rows reach maxlength=3 tokens; what is longer was cut.",
        "1 of 3 training rows reach target_maxlength=4 tokens; what is longer was cut.",
    ]


@pytest.mark.parametrize("name", ["maxlength", "target_maxlength"])
def test_length_without_room_for_text_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=1 leaves no room for text"):
        Sequences(sequence_tokenizer(), **{name: 1})
