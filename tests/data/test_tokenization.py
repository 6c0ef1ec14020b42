"""Straight from the Rust tokenizer into Arrow: the ids are those of the tokenizer's own call."""

import pyarrow as pa
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hflit.data.texts import Texts
from hflit.data.tokenization import encode_texts
from tests.conftest import word_tokenizer

NAMES = ["input_ids", "token_type_ids", "special_tokens_mask"]
TEXTS = ["w1 w2 w3 w4 w5 w6", "", "w7", "unknown w8 [SEP] w9"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("maxlength", [None, 5])
@pytest.mark.parametrize("pairs", [False, True])
def test_ids_are_those_of_the_call(side, maxlength, pairs):
    tokenizer = word_tokenizer()
    tokenizer.truncation_side = side
    texts = [TEXTS, TEXTS[::-1]] if pairs else [TEXTS]
    expected = tokenizer(
        *texts,
        truncation=maxlength is not None,
        max_length=maxlength,
        return_special_tokens_mask=True,
        return_token_type_ids=True,
    )
    found = encode_texts(tokenizer, texts, maxlength, NAMES)
    for name in NAMES:
        assert isinstance(found[name], pa.ListArray)
        assert found[name].to_pylist() == expected[name], name
    assert not pairs or any(map(any, expected["token_type_ids"]))


def test_a_template_that_gives_single_texts_a_type_keeps_it():
    tokenizer = word_tokenizer()
    backend = tokenizer.backend_tokenizer

    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", special_tokens=ends
    )
    expected = tokenizer(TEXTS, return_token_type_ids=True)["token_type_ids"]
    assert encode_texts(tokenizer, [TEXTS], None, NAMES)["token_type_ids"].to_pylist() == expected
    assert any(map(any, expected))


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text, *args, **options):
            return super().__call__([each + " w1" for each in text], *args, **options)

    plain = word_tokenizer()
    own = Shouting(tokenizer_object=plain.backend_tokenizer)
    found = encode_texts(own, [["w2"]], None, ["input_ids"])
    assert found["input_ids"] == [plain("w2 w1").input_ids]


@pytest.mark.parametrize("maxlength", [None, 6])
def test_texts_end_unless_they_were_cut(maxlength):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "w99"
    eos, bare = tokenizer.eos_token_id, tokenizer(TEXTS, add_special_tokens=False).input_ids
    found = Texts(tokenizer, maxlength=maxlength, merge=None)({"text": TEXTS})["input_ids"]
    longest = maxlength or 99
    expected = [row[:longest] + [eos] * (len(row) < longest) for row in bare]
    assert found == expected


def test_the_role_of_a_token_is_part_of_the_cache_key():
    keys = []
    for end, splits in [("w98", False), ("w99", False), ("w99", True)]:
        tokenizer = word_tokenizer()
        tokenizer.eos_token, tokenizer.split_special_tokens = end, splits
        keys.append(Texts(tokenizer, merge=None).settings)
    assert all(keys.count(key) == 1 for key in keys)
