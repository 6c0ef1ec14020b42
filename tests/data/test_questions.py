"""Questions, contexts and answers of every shape -> spans with the answer in the right place."""

import copy
import json
import logging
import random

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFD, StripAccents
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hflit.arguments import Arguments
from hflit.data import data_module
from hflit.data.answers import find_answer, read_answers
from hflit.data.batching import Collator
from hflit.data.encoding import encoded
from hflit.data.questions import Questions
from tests.conftest import WORDS, word_tokenizer


def plain_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words w0 to w99 with no CLS: GPT-2 adds no token, T5 an EOS behind each text, Llama a BOS."""
    specials = {"gpt2": ["<pad>", "<eos>"], "t5": ["<pad>", "</s>"], "llama": ["<pad>", "<s>"]}[
        kind
    ]
    vocabulary = {token: i for i, token in enumerate([*specials, "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    template = {"t5": ("$A </s>", "$A </s> $B </s>"), "llama": ("<s> $A", "<s> $A $B:1")}.get(kind)
    if template:
        tokenizer.post_processor = TemplateProcessing(
            single=template[0], pair=template[1], special_tokens=[(specials[1], 1)]
        )
    names = {"gpt2": ("bos_token", "eos_token"), "t5": ("eos_token",), "llama": ("bos_token",)}[
        kind
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left" if kind == "llama" else "right",
        pad_token="<pad>",
        unk_token="<unk>",
        **dict.fromkeys(names, specials[1]),
    )


def row(context, answers=None, question="w90"):
    return {"question": question, "context": context, "answers": answers}


def opened(rows, validation=None, tokenizer=None, maxlength=None, stride=4, **options):
    """A data module that has read its data and tokenized them in memory."""
    tokenization = Questions(tokenizer or word_tokenizer(), None, maxlength, stride, **options)
    args = Arguments(use_cpu=True, per_device_train_batch_size=2, max_steps=9)  # for streams
    module = data_module(
        rows, validation, tokenization=tokenization, args=args, cache=False, tokenizebatch=3
    )
    module.setup()
    return module


def spans_of(rows, **options):
    """Spans of the rows, with what evaluation needs."""
    return list(opened(rows, rows, **options).tokens["validation"])


def positions(spans):
    return [(span["start_positions"], span["end_positions"]) for span in spans]


def words(first, end):
    return " ".join(WORDS[first:end])


# What once broke, by its number in the list of inputs that broke txtai's trainer.


def test_27_span_without_the_answer_points_at_cls():
    """It was labelled with the last token, SEP."""
    # [CLS] w90 [SEP] and 5 words and [SEP]: w0-w4, w3-w7, w6-w9 with 2 words shared.
    spans = spans_of([row(words(0, 10), "w1")], maxlength=9, stride=2)
    assert positions(spans) == [(4, 4), (0, 0), (0, 0)]


def test_28_stride_as_long_as_the_context_is_refused_with_numbers():
    """The Rust tokenizer panicked, naming an effective length nobody had set."""
    with pytest.raises(ValueError, match=r"stride=128 .* 61 tokens .* maxlength=64"):
        Questions(word_tokenizer(), maxlength=64)
    # A row's question takes room too: 20 - 3 special tokens - 10 words leave 7.
    rows = [row(words(0, 30)), row(words(0, 30), question=words(50, 60))]
    with pytest.raises(ValueError, match=r"Row 1: .* 10 tokens leaves 7 .* stride=7"):
        opened(rows, maxlength=20, stride=7)
    assert len(spans_of(rows, maxlength=20, stride=6)) > 2


def test_28_question_longer_than_maxlength_is_refused_with_its_row():
    """`Truncation error`, without a row."""
    rows = [row(words(0, 5), "w1"), row(words(0, 5), "w1", question=words(0, 30))]
    with pytest.raises(ValueError, match=r"Row 1: .* 30 tokens leaves 0 .* maxlength=20"):
        opened(rows, maxlength=20)


def test_28_long_question_with_a_context_that_needs_no_cutting_is_kept():
    spans = spans_of([row(words(0, 3), "w1", question=words(50, 60))], maxlength=17, stride=4)
    assert positions(spans) == [(13, 13)]


def test_29_first_whole_word_wins_over_a_part_of_a_word():
    """`w3` was learned as `w30`."""
    assert positions(spans_of([row("w30 w3 w5", "w3")])) == [(4, 4)]
    assert find_answer("w3", "w30 w31") == (0, 2)  # no whole word: the first part of one
    assert find_answer("$5", "US$5 or $5") == (2, 4)  # a sign is no part of a word
    assert find_answer("京都", "私は京都に") == (2, 4)  # no spaces to go by


@pytest.mark.parametrize("answers", ["W3", {"text": ["w3"], "answer_start": [1]}, ["the w3"]])
def test_29_answer_not_in_its_context_is_refused_with_its_row(answers):
    """The whole run died of `substring not found`."""
    rows = [row("w1 w3 w5", "w3"), row("w1 w3 w5", answers)]
    with pytest.raises(ValueError, match=r"Row 1 of the training data: .*skip_misaligned=True"):
        opened(rows)
    with pytest.raises(ValueError, match=r"Row 1 of the validation data: "):
        opened(rows[:1], rows)


@pytest.mark.parametrize("start", ["x", float("inf"), [1], {}])
def test_a_start_that_is_no_number_is_told_by_its_row(start):
    """Once it was told in the words of `int()`, without a row."""
    rows = [row("w1 w3 w5", {"text": ["w3"], "answer_start": [start]})]
    with pytest.raises(ValueError, match=r"Row 0 of the training data: its answers are \{"):
        opened(rows)


def test_answers_of_several_shapes_may_stand_in_a_file(tmp_path):
    """Once they were read as their JSON: `"w2"`, with its quotes, was not in the context."""
    answers = ["w2", ["w1"], {"text": ["w0"], "answer_start": [0]}, {"text": "w2"}, None]
    rows = [row("w0 w1 w2", each) for each in answers]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert positions(spans_of(str(path))) == [(5, 5), (4, 4), (3, 3), (5, 5), (0, 0)]


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_29_misaligned_rows_are_left_out_when_asked(kind, caplog):
    rows = [row("w0 w1", answer) for answer in ("w9", "w2", "w3", "w1", "w8")]
    if kind == "stream":
        rows = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        spans = spans_of(rows, skip_misaligned=True)
    assert [span["row"] for span in spans] == [3]
    assert "4 of 5 training rows are left out" in caplog.text
    assert "The first is row 0." in caplog.text


def test_29_no_row_left_is_refused():
    with pytest.raises(ValueError, match="training data has no rows to keep"):
        opened([row("w1", "w2")], skip_misaligned=True)


NOTHING = [None, float("nan"), np.nan, "", "  ", [], [None], {"text": [], "answer_start": []}]
ANSWERS = [
    "w3",
    ["w3"],
    ["w3", "w5"],
    {"text": ["w3", "w5"], "answer_start": [4, 7]},
    {"text": "w3", "answer_start": 4.0},
    {"text": ["w3"]},
    {"text": np.array(["w3"]), "answer_start": np.array([4])},
    [{"text": "w3", "answer_start": 4}, {"text": "w5", "answer_start": 7}],
    {"text": [" w3 "], "answer_start": [3]},
]


@pytest.mark.parametrize("kind", ["rows", "pandas"])
def test_29_answers_of_all_shapes_may_stand_in_one_column(kind):
    """`["w3"]` and NaN were TypeErrors; Arrow holds one shape a column."""
    rows = [row("w30 w3 w5", answers) for answers in [*ANSWERS, *NOTHING]]
    spans = spans_of(pd.DataFrame(rows) if kind == "pandas" else rows)
    assert positions(spans) == [(4, 4)] * len(ANSWERS) + [(0, 0)] * len(NOTHING)


@pytest.mark.parametrize(
    "answers", [5, [5], {"answer_start": [1]}, {"text": ["w1"] * 2, "answer_start": [0]}]
)
def test_29_what_is_no_answer_is_refused_with_its_row(answers):
    with pytest.raises(ValueError, match="Row 0 of the training data: its answers are"):
        opened([row("w1", answers)])
    with pytest.raises(ValueError, match=r"mixes kinds: row 1 holds .* earlier rows hold"):
        opened([row("w1", "w1"), row("w1", 5)])


def test_30_answer_at_the_last_context_token():
    """Its start landed on SEP, behind its end: (6, 5); with padding on the padding: (23, 5)."""
    rows = [row("w9 w8 w3", "w3"), row(words(0, 20), "w4")]
    assert positions(spans_of(rows)) == [(5, 5), (7, 7)]
    batch = next(iter(opened(rows).train_dataloader()))[0]
    assert sorted(batch["start_positions"].tolist()) == [5, 7]
    assert torch.equal(batch["start_positions"], batch["end_positions"])


def test_30_answer_at_the_borders_of_overlapping_spans():
    """Span 1 of 100 words, answer w27 at its end: (31, 30)."""
    # 32 tokens hold [CLS] w90 [SEP], 28 words and [SEP]; every span begins 20 words on.
    spans = spans_of([row(words(0, 100), "w27")], maxlength=32, stride=8)
    assert positions(spans) == [(30, 30), (10, 10), (0, 0), (0, 0), (0, 0)]
    spans = spans_of([row(words(0, 100), words(18, 22))], maxlength=32, stride=8)
    assert positions(spans)[:2] == [(21, 24), (0, 0)]  # the second span has only a part of it


@pytest.mark.parametrize(
    ("kind", "null", "found"),
    [
        ("gpt2", 0, (3, 3)),  # w90 w1 w2 w3 w4, no special tokens: the first token
        ("t5", 0, (4, 4)),  # w90 </s> w1 w2 w3 w4 </s>
        ("llama", 0, (3, 3)),  # <s> w1 w2 w3 w4 w90, which pads on the left
    ],
)
def test_30_tokenizers_without_cls(kind, null, found):
    """`None is not in list`."""
    rows = [row("w1 w2 w3 w4", "w3"), row("w1 w2 w3 w4")]
    assert positions(spans_of(rows, tokenizer=plain_tokenizer(kind))) == [found, (null, null)]


def test_30_a_special_token_typed_into_the_text_is_not_the_null_token():
    tokenizer = plain_tokenizer("gpt2")
    spans = spans_of([row("w1 <eos> w2", question="w90 w91")], tokenizer=tokenizer)
    assert tokenizer.bos_token_id in spans[0]["input_ids"]
    assert positions(spans) == [(0, 0)]


def test_31_tokens_lead_back_to_the_characters_and_rows():
    """Rows and offsets were dropped, so that no metric could be computed."""
    rows = [row("w1 w2", "w2"), row("w30  w3", "w30")]
    spans = spans_of(rows)
    assert [span["row"] for span in spans] == [0, 1]
    # [CLS] w90 [SEP] and two words and [SEP]
    assert [span["char_starts"] for span in spans] == [
        [-1, -1, -1, 0, 3, -1],
        [-1, -1, -1, 0, 5, -1],
    ]
    assert [span["char_ends"] for span in spans] == [[-1, -1, -1, 2, 5, -1], [-1, -1, -1, 3, 7, -1]]
    module = opened(rows, rows)
    batch = next(iter(module.val_dataloader()))
    assert batch["row"].tolist() == [0, 1]
    assert batch["char_ends"].shape == batch["input_ids"].shape
    train = {"input_ids", "token_type_ids", "start_positions", "end_positions"}
    assert set(module.tokens["train"].column_names) == train


def test_31_rows_keep_their_numbers_in_other_processes_and_streams():
    rows = [row(words(n, n + 3), WORDS[n]) for n in range(8)]
    for data in (
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ):
        assert [span["row"] for span in spans_of(data)] == list(range(8))
    split = encoded(
        datasets.Dataset.from_list(rows), opened(rows).tokenization, "validation",
        batch_size=1000, processes=2, is_cached=False, is_shared=False,
    )  # fmt: skip
    assert split["row"][:] == list(range(8))


# Padding before the tokens.


def test_left_padding_puts_the_question_second_and_moves_the_positions():
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    rows = [row("w9 w8 w3", "w3"), row(words(0, 6), "w4"), row("w1")]
    tokenization = Questions(tokenizer)
    encoded = tokenization({name: [r[name] for r in rows] for name in tokenization.names})
    # [CLS] and the context come first
    assert list(zip(encoded["start_positions"], encoded["end_positions"], strict=True)) == [
        (3, 3),
        (5, 5),
        (0, 0),
    ]
    spans = [{k: encoded[k][i] for k in encoded} for i in range(3)]
    batch = Collator(tokenization.padding, "left", tokenization.finish)(
        [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in s.items()} for s in spans]
    )
    # 10 tokens; 3, 0 and 5 of them are padding
    assert batch["start_positions"].tolist() == [6, 5, 5]
    assert batch["end_positions"].tolist() == [6, 5, 5]
    assert batch["null_positions"].tolist() == [3, 0, 5]
    for index, answer in enumerate(("w3", "w4", "[CLS]")):
        token = batch["input_ids"][index, batch["start_positions"][index]]
        assert tokenizer.convert_ids_to_tokens(int(token)) == answer
    assert batch["char_starts"][0, :4].tolist() == [-1, -1, -1, -1]


# Decoding start..end gives back the answer.


@pytest.mark.parametrize("kind", ["bert", "bert left", "gpt2", "t5", "llama"])
def test_every_answer_decodes_back(kind):
    rng = random.Random(0)
    tokenizer = word_tokenizer() if kind.startswith("bert") else plain_tokenizer(kind)
    tokenizer.padding_side = "left" if kind == "bert left" else tokenizer.padding_side
    for _ in range(50):
        stride = rng.randint(0, 12)
        gap = rng.choice([" ", "  ", "\n"])
        rows = []
        for _ in range(4):
            context = rng.choices(WORDS, k=rng.randint(1, 60))
            first = rng.randrange(len(context))
            answer = gap.join(context[first : first + rng.randint(1, stride + 1)])
            before = len(gap.join([*context[:first], ""]))
            answers = {"text": [answer], "answer_start": [before]}
            rows.append(row(gap.join(context), answers, " ".join(rng.choices(WORDS, k=5))))
        maxlength = rng.randint(stride + 12, 48)
        answered = set()
        for span in spans_of(rows, tokenizer=tokenizer, maxlength=maxlength, stride=stride):
            context, answers = (rows[span["row"]][name] for name in ("context", "answers"))
            (text,), (at,) = answers.values()
            start, end, null = (span[f"{name}_positions"] for name in ("start", "end", "null"))
            inside = [i for i, begin in enumerate(span["char_starts"]) if begin >= 0]
            begins, stops = span["char_starts"][inside[0]], span["char_ends"][inside[-1]]
            if begins <= at and stops >= at + len(text):
                assert context[span["char_starts"][start] : span["char_ends"][end]] == text
                assert tokenizer.decode(span["input_ids"][start : end + 1]).split() == text.split()
                answered.add(span["row"])
            else:
                assert (start, end) == (null, null)
        # Neighbours share `stride` tokens, so an answer up to one longer is whole in one of them.
        assert answered == set(range(len(rows)))


def test_tokens_that_share_a_character_all_belong_to_the_answer():
    """A byte-level tokenizer spreads an emoji over four tokens."""
    alphabet = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    bytewise = Tokenizer(BPE(alphabet, []))
    bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="!")
    (span,) = spans_of([row("a \U0001f600 b", "\U0001f600", question="q")], tokenizer=fast)
    assert positions([span]) == [(3, 6)]  # q, a, blank, four bytes, blank, b


def test_an_accent_behind_its_letter_needs_no_token_of_its_own():
    """Once such answers were trained as none: no token reached to their last character."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "a", "cafe", "b", "q"])}
    stripping = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    stripping.normalizer = Normalizers([NFD(), StripAccents()])
    stripping.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=stripping, pad_token="<pad>")
    for answer in ("caf\u00e9", "cafe\u0301"):
        (span,) = spans_of([row(f"a {answer} b", answer, question="q")], tokenizer=fast)
        assert positions([span]) == [(2, 2)]  # q, a, cafe, b


# The data stay the caller's, in all formats.


def test_formats_give_identical_batches():
    rows = [
        row(
            words(n, n + 3 + 5 * (n % 3)),
            {"text": [WORDS[n + 1]], "answer_start": [len(WORDS[n]) + 1]},
        )
        for n in range(9)
    ] + [row("w1 w2", {"text": [], "answer_start": []})]
    expected = None
    for data in (rows, datasets.Dataset.from_list(rows), pd.DataFrame(rows), pl.DataFrame(rows)):
        module = opened(data, data, maxlength=12)
        batches = [batch for window in module.train_dataloader() for batch in window]
        batches += list(module.val_dataloader())
        expected = expected or batches
        assert len(batches) == len(expected) > 5
        for batch, other in zip(batches, expected, strict=True):
            assert batch.keys() == other.keys()
            assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_callers_data_is_never_changed():
    rows = [row("w1 w2 ", "w2", question="  w90 "), row("w1", ["w1"]), row("w3")]
    before = copy.deepcopy(rows)
    frame = pd.DataFrame(rows)
    opened(rows, rows)
    opened(frame)
    assert rows == before
    pd.testing.assert_frame_equal(frame, pd.DataFrame(before))


def test_question_loses_the_blanks_before_it():
    ids = [span["input_ids"] for span in spans_of([row("w1"), row("w1", question="  \n w90")])]
    assert ids[0] == ids[1]


def test_missing_texts_are_refused_with_their_row():
    with pytest.raises(ValueError, match="Row 1 of the training data has no text in 'question'"):
        opened([row("w1"), row("w1", question=None)])
    with pytest.raises(ValueError, match="Row 0 of the training data has no text in 'context'"):
        opened([row(None, "w1")])


def test_empty_context_has_no_answer():
    assert positions(spans_of([row("")])) == [(0, 0)]


def test_slow_tokenizer_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(ValueError, match="Slow does not tell which characters"):
        Questions(tokenizer)


def test_settings_hold_all_that_decides_the_spans():
    tokenizer = word_tokenizer()
    variants = [
        Questions(tokenizer, maxlength=40, stride=4),
        Questions(tokenizer, maxlength=40, stride=5),
        Questions(tokenizer, maxlength=41, stride=4),
        Questions(tokenizer, maxlength=40, stride=4, skip_misaligned=True),
        Questions(tokenizer, ("q", "c"), maxlength=40, stride=4),
    ]
    for change in ({"padding_side": "left"}, {"cls_token": "[SEP]"}):
        other = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(other, name, value)
        variants.append(Questions(other, maxlength=40, stride=4))
    assert len({repr(each.settings) for each in variants}) == 7


def test_reading_answers_twice_changes_nothing():
    for answers in [*ANSWERS, *NOTHING]:
        once = read_answers(answers)
        assert read_answers(once) == once
