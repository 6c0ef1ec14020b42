"""What is tokenized, kept and read again."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pandas as pd
import pytest
from transformers import AutoTokenizer

from hflit.arguments import Arguments
from hflit.data import Labels, data_module
from hflit.data.files import read_files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A data sets cache of this test alone; the files that a run leaves in it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)

    def files():
        found = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path for path in found if path.suffix != ".lock")

    return files


@pytest.fixture
def tokenizer(tiny_bert):
    return tiny_bert()[1]


@pytest.fixture
def calls(monkeypatch):
    """Texts that have been tokenized, one entry a batch."""
    made = []
    encode = Labels.encode

    def counted(self, batch, *args):
        made.append(list(batch["text"]))
        return encode(self, batch, *args)

    monkeypatch.setattr(Labels, "encode", counted)
    return made


def opened(tokenizer, train, validation=None, columns=None, maxlength=12, head=None, **options):
    tokenization = Labels(tokenizer, columns, maxlength, head)
    module = data_module(
        train, validation, tokenization=tokenization, args=Arguments(use_cpu=True), **options
    )
    module.setup()
    return module


def stored(module, split="train"):
    return module.tokens[split].to_dict()


def encoded(tokenizer, rows, maxlength=12):
    """Token ids and labels, straight from the tokenizer."""
    texts = [row["text"] for row in rows]
    tokens = tokenizer(texts, truncation=True, max_length=maxlength, return_attention_mask=False)
    return {**tokens, "labels": [row["label"] for row in rows]}


KINDS = {"list": list, "pandas": pd.DataFrame, "Dataset": datasets.Dataset.from_list}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_reads_what_the_first_has_tokenized(
    kind, tokenizer, ragged_rows, cache, calls
):
    rows, others = ragged_rows(30), ragged_rows(9, seed=1)
    first = opened(tokenizer, KINDS[kind](rows), KINDS[kind](others))
    assert len(calls) == len(cache()) == 2
    second = opened(copy.deepcopy(tokenizer), KINDS[kind](rows), KINDS[kind](others))
    assert len(calls) == len(cache()) == 2
    del calls[:]
    for split, data in (("train", rows), ("validation", others)):
        assert stored(first, split) == stored(second, split) == encoded(tokenizer, data)


def test_a_cached_run_does_not_depend_on_what_the_tokenizer_has_seen(
    tokenizer, ragged_rows, cache, calls
):
    # A Rust tokenizer remembers the truncation and padding of its last call.
    rows = ragged_rows(30)
    opened(tokenizer, rows)
    tokenizer(["w1 w2 w3", "w1"], truncation=True, max_length=4, padding=True)
    del calls[:]
    opened(tokenizer, rows)
    assert calls == []


CHILD = """
import json, sys
from transformers import AutoTokenizer
from hflit.arguments import Arguments
from hflit.data import Labels, data_module
from hflit.data.files import read_files

def refuse(*args, **kwargs):
    raise AssertionError("tokenized again")

Labels.encode = refuse
rows = json.load(open(sys.argv[1] + "/rows.json"))
tokenization = Labels(AutoTokenizer.from_pretrained(sys.argv[1]), None, 12)
module = data_module(rows, tokenization=tokenization, args=Arguments(use_cpu=True))
module.setup()
print(json.dumps(module.tokens["train"].to_dict()))
"""


def test_another_process_reads_the_cache(tokenizer, ragged_rows, cache, tmp_path):
    rows = ragged_rows(30)
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "rows.json").write_text(json.dumps(rows))
    first = opened(AutoTokenizer.from_pretrained(tmp_path / "base"), rows)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "base")],
        env={
            **os.environ,
            "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == stored(first) == encoded(tokenizer, rows)


def test_what_changes_the_tokens_is_tokenized_anew(tokenizer, cache):
    rows = [
        {"text": f"w{n} w{n + 1} new", "more": "w9", "label": ["neg", "pos"][n % 2]}
        for n in range(10)
    ]
    opened(tokenizer, rows)
    assert len(cache()) == 1

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["new"])
    cut_left = copy.deepcopy(tokenizer)
    cut_left.truncation_side = "left"
    lean = copy.deepcopy(tokenizer)
    lean.model_input_names = ["input_ids", "attention_mask"]
    other_rows = [{**rows[0], "text": "w5"}, *rows[1:]]
    renamed = {0: "pos", 1: "neg"}  # the classes of a head, in another order
    runs = [
        opened(larger, rows),
        opened(cut_left, rows, maxlength=4),
        opened(tokenizer, rows, maxlength=4),
        opened(tokenizer, rows, columns=("text", "more", "label")),
        opened(tokenizer, rows, columns=("more", "text", "label")),
        opened(tokenizer, rows, head=renamed),
        opened(lean, rows),
        opened(tokenizer, other_rows),
        opened(tokenizer, rows[::-1]),
    ]
    assert len(cache()) == 1 + len(runs)
    first = [stored(run)["input_ids"][0] for run in runs]
    # w0 is token 5 and w9 token 14; [UNK] is 1, [CLS] 2, [SEP] 3, and the new token comes last.
    assert first[0] == [2, 5, 6, 105, 3]
    assert first[1] == [2, 6, 1, 3]
    assert first[2] == [2, 5, 6, 3]
    assert first[3] == [2, 5, 6, 1, 3, 14, 3]
    assert first[4] == [2, 14, 3, 5, 6, 1, 3]
    assert stored(runs[5])["labels"][:2] == [1, 0]
    assert set(stored(runs[6])) == {"input_ids", "labels"}
    assert first[7] == [2, 10, 3]
    assert first[8] == [2, 14, 15, 1, 3]


def test_without_a_cache_nothing_is_written(
    tokenizer, ragged_rows, cache, tmp_path, monkeypatch, request
):
    # Not below tmp_path: processes make sockets there, whose paths may have 107 characters.
    elsewhere = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(elsewhere))
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    rows = ragged_rows(30)
    for data in (rows, pd.DataFrame(rows), datasets.Dataset.from_list(rows).shuffle(seed=0)):
        module = opened(tokenizer, data, rows, cache=False)
        assert module.tokens["train"].cache_files == []
    opened(tokenizer, rows, cache=False, tokenizers=2)
    assert cache() == []
    assert not any(tmp_path.joinpath("cache").glob("*"))
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_told(tokenizer, ragged_rows, cache, tmp_path):
    """As in a container whose home is not there: once it was pathlib's PermissionError."""
    rows, told = ragged_rows(8), "cache, which cannot be written. Set HF_HOME to a folder that can"
    tmp_path.joinpath("cache").touch()
    with pytest.raises(OSError, match=told):
        opened(tokenizer, rows)
    assert len(opened(tokenizer, rows, cache=False).tokens["train"]) == 8
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=told):
        read_files(tmp_path / "rows.csv")


def test_no_home_is_needed():
    """As in a container whose user has no entry: `import hflit` failed."""
    home = "import pathlib; pathlib.Path.home = lambda: 1 / 0; import hflit"
    assert subprocess.run([sys.executable, "-c", home], check=False).returncode == 0


def test_data_from_disk_are_left_as_they_are(tokenizer, ragged_rows, cache, tmp_path):
    datasets.Dataset.from_list(ragged_rows(30)).save_to_disk(tmp_path / "data")
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    for kept in (True, False):
        opened(tokenizer, datasets.load_from_disk(tmp_path / "data"), cache=kept)
    after = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 30, 1000])
def test_24_tokenizebatch_never_changes_the_result(rows_at_a_time, tokenizer, ragged_rows):
    rows = ragged_rows(30)
    module = opened(tokenizer, rows, tokenizebatch=rows_at_a_time, cache=False)
    assert stored(module) == encoded(tokenizer, rows)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("cached", [True, False])
def test_24_several_processes_give_the_same_rows(cached, tokenizer, ragged_rows, cache):
    rows = ragged_rows(31)
    module = opened(tokenizer, rows, tokenizers=2, cache=cached)
    assert stored(module) == encoded(tokenizer, rows)
    again = opened(tokenizer, rows, tokenizers=2, cache=cached)
    assert stored(again) == stored(module)


def test_progress_bars_are_left_as_they_were(tokenizer, ragged_rows):
    for turn, shown in (
        (datasets.disable_progress_bars, False),
        (datasets.enable_progress_bars, True),
    ):
        turn()
        opened(tokenizer, ragged_rows(4), cache=False)
        assert datasets.utils.logging.is_progress_bar_enabled() is shown


# Memory.


def bytes_per_token(module, split="train"):
    """Bytes of all Arrow buffers, for each token that is stored."""
    table = module.tokens[split].data.table
    tokens = sum(len(ids) for ids in module.tokens[split]["input_ids"])
    return table.nbytes / tokens


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("columns", [None, ("text", "text2", "label")])
def test_ten_bytes_a_token_at_most(cached, columns, tokenizer, cache):
    # By hand, a row of 7 tokens: 7 * (4 + 1) for ids and types, 2 * 4 for the offsets, 8 for the
    # label, which makes 51 / 7 = 7.3 bytes a token.
    rows = [{"text": "w1 w2 w3 w4 w5", "text2": "w6 w7", "label": n % 2} for n in range(1000)]
    assert bytes_per_token(opened(tokenizer, rows, columns=columns, cache=cached)) < 10
    if cached and columns is None:
        (file,) = cache()
        assert file.stat().st_size / 7000 < 10


def test_17_one_long_row_does_not_pad_the_others(tokenizer, cache):
    """999 rows of 7 tokens and one of 402 were stored as 402,000 tokens for 7,395 real ones."""
    rows = [{"text": "w1 w2 w3 w4 w5", "label": n % 2} for n in range(1000)]
    rows[500]["text"] = " ".join(["w6"] * 400)
    for data in (rows, pd.DataFrame(rows), datasets.Dataset.from_list(rows)):
        module = opened(tokenizer, data, maxlength=None)
        lengths = [len(ids) for ids in module.tokens["train"]["input_ids"]]
        assert sum(lengths) == 999 * 7 + 402 == 7395
        assert bytes_per_token(module) < 10
    # Only the batch with the long row is padded to it: 8 rows of 402, the rest 7 wide.
    widths = [batch["input_ids"].shape for (batch,) in module.train_dataloader()]
    assert sorted(widths) == [(8, 7)] * 124 + [(8, 402)]


# Truncation.


def test_cut_rows_are_reported(tokenizer, caplog):
    rows = [
        {"text": " ".join(["w1"] * length), "label": length % 2} for length in (2, 3, 9, 10, 11)
    ]
    with caplog.at_level(logging.WARNING, logger="hflit"):
        opened(tokenizer, rows, rows[:3], maxlength=12, cache=False)
    # 10 words and two special tokens just fit, 11 words are cut: both reach the limit.
    assert "2 of 5 training rows reach maxlength=12 tokens" in caplog.text
    assert "validation" not in caplog.text


def test_nothing_is_reported_where_nothing_is_cut(tokenizer, caplog):
    rows = [{"text": "w1 w2", "label": 0}, {"text": "w3", "label": 1}]
    with caplog.at_level(logging.WARNING, logger="hflit"):
        opened(tokenizer, rows, maxlength=12, cache=False)
        opened(tokenizer, rows, maxlength=None, cache=False)
    assert caplog.text == ""


# Loaders.


def test_batches_follow_the_arguments(tokenizer, ragged_rows):
    rows = ragged_rows(20)

    def rows_of(**arguments):
        tokenization = Labels(tokenizer, None, 12)
        args = Arguments(use_cpu=True, **arguments)
        module = data_module(rows, rows, tokenization=tokenization, args=args, cache=False)
        module.setup()
        train = [[len(batch["labels"]) for batch in window] for window in module.train_dataloader()]
        return train, [len(batch["labels"]) for batch in module.val_dataloader()]

    train, validation = rows_of(
        per_device_train_batch_size=6, per_device_eval_batch_size=7, gradient_accumulation_steps=2
    )
    assert (train, validation) == ([[6, 6], [6, 2]], [7, 7, 6])
    train, validation = rows_of(per_device_train_batch_size=6, dataloader_drop_last=True)
    assert train == [[6], [6], [6]]
    assert validation == [8, 8]  # transformers.Trainer leaves them out here too


def test_validation_keeps_the_order_of_the_rows(tokenizer, ragged_rows):
    rows = ragged_rows(20)
    module = opened(tokenizer, rows, rows, cache=False)
    batches = list(module.val_dataloader())
    found = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == encoded(tokenizer, rows)["input_ids"]
