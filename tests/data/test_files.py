"""Rows from files of every kind, folders and patterns; damaged files are told by name and line."""

import bz2
import gc
import gzip
import io
import json
import lzma
import os
import warnings
import weakref
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.data.files import read_files
from hflit.data.formats import data_module
from hflit.data.labels import Labels
from hflit.data.questions import Questions
from hflit.data.sequences import Sequences
from hflit.data.texts import Texts
from tests.conftest import word_tokenizer

ROWS = [{"text": f"w{i} w1", "label": "NA" if i % 2 else "b"} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(folder):
    """The same rows in a file of every kind."""
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_csv(folder / "a.csv")
    rows.to_csv(folder / "a.tsv", sep="\t")
    rows.to_parquet(folder / "a.parquet")
    (folder / "a.jsonl").write_text(LINES)
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress(LINES.encode()))
    (folder / "a.tsv.xz").write_bytes(lzma.compress((folder / "a.tsv").read_bytes()))
    with zipfile.ZipFile(folder / "a.csv.zip", "w") as archive:
        archive.write(folder / "a.csv", "a.csv")
    rows.save_to_disk(folder / "saved")
    (folder / "a.arrow").write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
    (folder / "parts").mkdir()
    (folder / "parts" / "train.jsonl").write_text(LINES)
    (folder / "parts" / "validation.jsonl").write_text(LINES)


def forget_streams():
    """Close the files that pandas was reading for streams: here, not in some later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


NAMES = (
    *("a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.json", "a.csv.gz", "a.jsonl.gz", "saved"),
    *("a.arrow", "parts/t*.jsonl", "a.jsonl.bz2", "a.tsv.xz", "a.csv.zip", "parts/t*.js*"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    """A label called NA stays a label: pandas would take it for a missing value."""
    write(tmp_path)
    assert read_files(name).to_list() == ROWS
    assert read_files(tmp_path / name).to_list() == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_folder_of_tables_gives_the_same_rows(name, tmp_path):
    write(tmp_path)
    (tmp_path / "tables").mkdir()
    (tmp_path / name).rename(tmp_path / "tables" / name)
    assert read_files("tables")["train"].to_list() == ROWS
    assert list(read_files({"path": "tables", "streaming": True})["train"]) == ROWS


def test_a_name_with_brackets_is_a_name(tmp_path):
    """Once it was a pattern, which found another file."""
    (tmp_path / "[1].csv").write_text("text\nw1\n")
    (tmp_path / "1.csv").write_text("text\nw2\n")
    assert read_files("[1].csv")["text"][:] == ["w1"]


@pytest.mark.parametrize(
    ("names", "told"), [(["a.csv", "b.jsonl"], "Here are csv and json"), ([], "Here are none")]
)
def test_a_folder_of_two_kinds_or_none_is_refused(names, told, tmp_path):
    """Once one of the kinds was read, and the rows of the other were lost."""
    (tmp_path / "rows").mkdir()
    for name in names:
        (tmp_path / "rows" / name).write_text("text\nw1\n" if "csv" in name else '{"text": "w2"}\n')
    with pytest.raises(ValueError, match=f"rows: data come in files of one kind.*{told}"):
        read_files("rows")


@pytest.mark.parametrize("name", ["sep", "delimiter"])
def test_fields_may_be_parted_by_another_sign(name, tmp_path):
    (tmp_path / "a.csv").write_text("text;label\nw1;a\n")
    assert read_files({"path": "a.csv", name: ";"}).to_list() == [{"text": "w1", "label": "a"}]


def test_a_text_file_has_a_row_for_each_line_that_is_not_blank(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n  \n")
    assert read_files("a.txt")["text"][:] == ["w1 w2", "w3"]


def test_a_folder_holds_its_splits(tmp_path, tiny_bert):
    write(tmp_path)
    trainer = HFTrainer()
    trainer(tiny_bert(), "parts", "validation", max_steps=1, cache=False)
    assert "eval_loss" in trainer.metrics


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.tsv.xz", "parts/t*.jsonl"])
def test_a_mapping_names_a_split_or_a_stream(name, tmp_path):
    write(tmp_path)
    assert read_files({"path": name, "split": "train[2:]"}).to_list() == ROWS[2:]
    rows = read_files({"path": name, "streaming": True})
    assert isinstance(rows, datasets.IterableDataset)
    assert list(rows) == ROWS


def test_a_folder_or_a_text_file_streams_too(tmp_path):
    write(tmp_path)
    assert read_files({"path": "parts", "split": "validation"}).to_list() == ROWS
    assert list(read_files({"path": "parts", "streaming": True})) == ["train", "validation"]
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    texts = read_files({"path": "a.txt", "streaming": True})
    assert [row["text"] for row in texts] == ["w1 w2", "w3"]
    with pytest.raises(ValueError, match="written by save_to_disk, which takes no split"):
        read_files({"path": "saved", "split": "train"})
    with pytest.raises(ValueError, match='a.csv: Unknown split "test"'):
        read_files({"path": "a.csv", "split": "test"})


def test_a_streamed_file_gives_the_losses_of_its_rows(tmp_path, tiny_bert):
    write(tmp_path)
    losses = []
    for train in ("a.jsonl", {"path": "a.jsonl", "streaming": True}):
        trainer = HFTrainer()
        options = {"train_sampling_strategy": "sequential", "logging_steps": 1}
        trainer(tiny_bert(), train, max_steps=3, per_device_train_batch_size=2, **options)
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def parquet_of(*texts):
    content = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), content)
    return content.getvalue()


BROKEN = {
    "cut.jsonl": ((LINES + '{"text": "w1", "la').encode(), r"line 7: .*column \d+. The file may"),
    "cut.json": (json.dumps(ROWS)[:-9].encode(), r"cut.json, line 1: "),
    "latin.csv": ("text,label\nw1,a\ncafé,b\n".encode("latin-1"), "line 3: byte 0xe9 is no UTF-8"),
    "latin.jsonl": ('{"text": "caf\xe9"}\n'.encode("latin-1"), "line 1: byte 0xe9 is no UTF-8"),
    "wide.csv": (b"text,label\nw1,a\nw2,b,c\n", "line 3: 3 fields, but the header names 2"),
    "empty.csv": (b"", "the file is empty"),
    "empty.jsonl": (b"\n", "the file is empty"),
    "cut.csv.gz": (gzip.compress(b"text,label\nw1,a\n" * 99)[:-20], "cut off or no gz file"),
    "cut.csv.zip": (b"PK\x03\x04 and no more", "cut off or no zip file"),
    "cut.jsonl.bz2": (bz2.compress(LINES.encode())[:-9], "cut off or no bz2 file"),
    "half.jsonl": (b'{"text": "w1"}\n{"text": "\\ud83d"}\n', "line 2: it holds half a character"),
    "none.json": (b"[]", "none.json: it has no rows"),
    "none.parquet": (parquet_of(), "none.parquet: it has no rows"),
    "a.xlsx": (b"x", "which the name tells: csv, tsv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_told_by_name_and_line(name, tmp_path):
    content, told = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as raised:
        read_files(name)
    assert str(raised.value).startswith(name)
    assert "\n" not in str(raised.value)


def test_a_saved_data_set_without_rows_is_told_of(tmp_path):
    texts = datasets.Features({"text": datasets.Value("string")})
    datasets.Dataset.from_dict({"text": []}, texts).save_to_disk("none")
    with pytest.raises(ValueError, match="none: it has no rows"):
        read_files("none")


@pytest.mark.parametrize("name", ["no.csv", "./nothing", "no-*.jsonl", "no/such/file"])
def test_what_is_not_there_is_said_to_be_no_file(name):
    with pytest.raises(FileNotFoundError, match="No file is called"):
        read_files(name)


def test_a_missing_column_is_told_with_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("text,lable\nw1,a\n")
    data = data_module("a.csv", tokenization=Labels(word_tokenizer()), args=Arguments())
    data._length_column = lambda split: None
    with pytest.raises(ValueError, match="a.csv: Column 'label' is not in the training data"):
        data.setup()


# datasets leaves the file of a stream open that ends early.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("quoting", "texts"), [(3, ['"w1', 'w2"', "w3"]), (0, ["w1\t0\nw2", "w3"])]
)
def test_quotes_in_a_tsv_file_are_read_as_asked(quoting, texts, tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"w1\t0\nw2"\t1\nw3\t0\n')
    with pytest.raises(ValueError, match="row 0 has lines and tabs"):
        read_files("a.tsv")
    with pytest.raises(ValueError, match="row 0 has lines and tabs"):
        list(read_files({"path": "a.tsv", "streaming": True}))
    forget_streams()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.tsv").write_bytes((tmp_path / "a.tsv").read_bytes())
    with pytest.raises(ValueError, match="row 0 has lines and tabs"):
        read_files("tables")
    for read in ({"path": "a.tsv"}, {"path": "tables", "split": "train"}):
        assert read_files({**read, "quoting": quoting})["text"][:] == texts


def test_a_quoted_field_may_have_several_lines(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"w1\nw2"\t0\n"w3\tw4"\t1\n')
    assert read_files("a.tsv")["text"][:] == ["w1\nw2", "w3\tw4"]


@pytest.mark.parametrize("name", ["rows/a.csv", "rows", "rows/a.csv.gz"])
def test_a_file_is_read_again_if_rewritten_with_the_old_time(name, tmp_path, monkeypatch):
    """As `rsync -t` and `tar` do. Once the old rows came out of the cache, and their tokens."""
    (tmp_path / "rows").mkdir()
    file = tmp_path / ("rows/a.csv" if name == "rows" else name)

    def write(label):
        content = f"text,label\nw1,{label}\n".encode()
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        os.utime(file, (1e9, 1e9))

    def read():
        rows = read_files(name)
        return rows["train"] if name == "rows" else rows

    write("a")
    before, same = read(), read()
    assert before._fingerprint == same._fingerprint
    assert before["label"][:] == same["label"][:] == ["a"]
    write("b")
    after = read()
    assert after["label"][:] == ["b"]
    assert after._fingerprint != before._fingerprint
    calls = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append(k) or load(*a, **k))
    assert read()._fingerprint == after._fingerprint
    assert len(calls) == 1


def test_rows_are_let_go_before_they_are_read_again(tmp_path, monkeypatch):
    """On Windows a file that is open cannot be replaced."""
    read, load = [], datasets.load_dataset

    def watched(*names, **options):
        assert not any(rows() for rows in read)
        rows = load(*names, **options)
        read.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", watched)
    for label in "ab":
        (tmp_path / "a.csv").write_bytes(f"text,label\nw1,{label}\n".encode())
        os.utime(tmp_path / "a.csv", (1e9, 1e9))
        assert read_files("a.csv")["label"][:] == [label]
    assert len(read) == 3


@pytest.mark.parametrize("name", [".", "./", "../rows", "~x"])
def test_a_folder_may_be_named_by_where_one_is(name, tmp_path, monkeypatch):
    """`.` failed in datasets, and a name with ~ in front as if it were a user's home."""
    folder = tmp_path / "rows"
    (folder / "~x").mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / name / "train.csv").write_text("text,label\nw1,a\n")
    assert read_files(name)["train"].to_list() == [{"text": "w1", "label": "a"}]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", ["", {"path": ""}])
def test_an_empty_name_is_told(split, name, tiny_bert):
    """Once it stood for the current folder."""
    options = {"tokenization": Labels(tiny_bert()[1]), "args": Arguments()}
    with pytest.raises(ValueError, match="name of the data is empty"):
        data_module(**{"train": ROWS, split: name}, **options)


KINDS = {  # the first fields of a column, the last one, and what the column holds
    "leading zeros": ("001", "A1", ["001", "A1"]),
    "leading zeros alone": ("007", "10", ["007", "10"]),
    "leading zeros and a fraction": ("007", "0.5", ["007", "0.5"]),
    "flags": ("True", "maybe", ["True", "maybe"]),
    "all flags": ("True", "FALSE", [True, False]),
    "fractions": ("1.50", "x", ["1.50", "x"]),
    "numbers and a text": ("1", "x", ["1", "x"]),
    "numbers and a fraction": ("1", "0.5", [1.0, 0.5]),
    "blanks around": (" 1", "2 ", [1, 2]),
    "nothing first": ("", "3", [None, 3]),
    "long numbers": ("12345678901234567890", "12345678901234567891", None),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_a_csv_is_of_one_kind(kind, streaming, tmp_path):
    """Once the first 10,000 rows decided: 001 and A1 became the classes '001', '1' and 'A1'."""
    first, last, found = KINDS[kind]
    lines = [f"w1,{first}"] * 10_050 + [f"w2,{last}"]
    Path("a.csv").write_text("\n".join(["text,label", *lines]))
    rows = read_files({"path": "a.csv", "streaming": streaming})
    labels = [row["label"] for row in rows]
    expected = found or [first, last]
    assert labels == [expected[0]] * 10_050 + [expected[1]]
    assert list(map(type, labels[-2:])) == list(map(type, expected))
    as_text = read_files({"path": "a.csv", "streaming": streaming}, numbers=["text"])
    assert [row["label"] for row in as_text][-2:] == [first or None, last]
    forget_streams()


NUMERALS = {  # kind of rows -> a csv file of them, in which all is digits or truth values
    Questions: "question,context,answers\n1,1990,1990\n",
    Sequences: "source,target\n12,46\n",
    Texts: "text\nTrue\n",
}


@pytest.mark.parametrize("kind", NUMERALS)
def test_only_labels_of_a_csv_are_numbers(kind, tmp_path):
    """Once the target 46 was no text, and the answer 1990 no answer."""
    Path("a.csv").write_text(NUMERALS[kind])
    tokenization = kind(
        word_tokenizer(), maxlength=64, **{"stride": 4} if kind is Questions else {}
    )
    data = data_module("a.csv", "a.csv", tokenization=tokenization, args=Arguments(), cache=False)
    data.setup()
    header, line = NUMERALS[kind].split()
    for rows in data.rows.values():
        assert rows[0] == dict(zip(header.split(","), line.split(","), strict=True))


def test_validation_labels_are_texts_where_those_of_training_are(tmp_path, tiny_bert):
    """Once 1 was not among the labels '1' and 'x'."""
    Path("a.csv").write_text("text,label\nw1,1\nw2,x\n")
    Path("b.csv").write_text("text,label\nw1,1\n")
    options = {"tokenization": Labels(tiny_bert()[1]), "args": Arguments(), "cache": False}
    data = data_module("a.csv", "b.csv", **options)
    data.setup()
    assert data.rows["validation"]["label"][:] == ["1"]
    assert data.tokens["validation"]["labels"][:] == [0]


def test_each_split_of_a_folder_has_columns_and_kinds_of_its_own(tmp_path):
    """Once the first file in the alphabet gave all of them theirs, and any split its kinds."""
    for name, lines in {
        "train.csv": "id,text,label\n1,w1,0.5\n2,w2,1\n",
        "validation.csv": "text,id,label\nw1,3,1\n",
        "test.csv": "id,text,label\n4,w1,?\n",
        "notes.csv": "a,b\n1,2\n",  # no split, so it is not read
        ".ipynb_checkpoints/train-checkpoint.csv": "id,text\n1,w1\n",
        "._train.csv": "\xb0",
    }.items():
        file = Path("d", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines)
    rows = read_files("d")
    assert rows["train"].to_list()[1] == {"id": 2, "text": "w2", "label": 1.0}
    assert rows["validation"].to_list() == [{"text": "w1", "id": 3, "label": 1}]
    assert rows["test"].to_list() == [{"id": 4, "text": "w1", "label": "?"}]
    streams = read_files({"path": "d", "streaming": True})
    assert {split: list(each) for split, each in streams.items()} == {
        split: each.to_list() for split, each in rows.items()
    }
    assert read_files({"path": "d", "split": "train[1:]"}).to_list() == rows["train"].to_list()[1:]
    named = {"path": "d", "data_files": "test.csv"}
    assert read_files(named, numbers=())["train"].to_list() == [
        {"id": "4", "text": "w1", "label": "?"}
    ]
    Path("d/test.csv").write_text("id,text\n5,w3\n")  # as Kaggle has it
    assert read_files("d")["train"].to_list() == rows["train"].to_list()
    assert read_files("d")["test"].to_list() == [{"id": 5, "text": "w3"}]


def test_a_csv_without_a_head_has_numbered_columns(tmp_path):
    Path("a.csv").write_text("w1,007\nw2,8x\n")
    rows = read_files({"path": "a.csv", "header": None})
    assert rows.to_list() == [{"0": "w1", "1": "007"}, {"0": "w2", "1": "8x"}]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_lengths_in_a_csv_are_numbers(strategy, tmp_path, tiny_bert):
    lines = [f"{'w1 ' * n},{n % 2},{n + 2}" for n in range(1, 9)]
    Path("a.csv").write_text("\n".join(["text,label,length", *lines]))
    given = {"train_sampling_strategy": strategy, "max_steps": 1, "cache": False}
    trainer = HFTrainer()
    trainer(tiny_bert(), "a.csv", **given)
    assert trainer.state.global_step == 1


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_damaged_stream_is_told_by_its_file(tmp_path):
    Path("a.csv").write_text("text,label\n" + "w1,1\n" * 50 + "w1,1,2\n")
    with pytest.raises(ValueError, match="a.csv, line 52: 3 fields"):
        read_files({"path": "a.csv", "streaming": True})
    forget_streams()


@pytest.mark.parametrize("kind", ["parquet", "rows", "frame"])
def test_labels_that_are_text_in_training_are_text_in_a_csv(tmp_path, tiny_bert, kind):
    table = pa.table({"text": ["w1", "w2"], "label": pa.array(["007", "008"], pa.large_string())})
    pq.write_table(table, "a.parquet")
    train = {"parquet": "a.parquet", "rows": table.to_pylist(), "frame": table.to_pandas()}[kind]
    Path("b.csv").write_text("text,label\nw1,007\n")
    options = {"tokenization": Labels(tiny_bert()[1]), "args": Arguments(), "cache": False}
    data = data_module(train, "b.csv", **options)
    data.setup()
    assert data.tokens["validation"]["labels"][:] == [0]


def test_a_folder_is_read_as_its_files_are(tmp_path):
    """Once 007 was 7 in it, and blank lines were rows."""
    for folder in ("tables", "texts"):
        Path(folder).mkdir()
    Path("tables/a.csv").write_text("id\n007\n")
    Path("texts/a.txt").write_text("one\n\ntwo\n   \n")
    assert read_files("tables", numbers=())["train"]["id"][:] == ["007"]
    assert read_files("texts")["train"]["text"][:] == ["one", "two"]
    streamed = read_files({"path": "texts", "streaming": True})["train"]
    assert [row["text"] for row in streamed] == ["one", "two"]
