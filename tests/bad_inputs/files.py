"""Wrong files of data, and wrong checkpoints."""

import gzip
import json
import os
import pickle
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hflit import HFTrainer
from tests.bad_inputs.case import Case, labels
from tests.tasks import tiny

LINES = [json.dumps(row) for row in labels(*"abab")]


def file(name, content, **also):
    """A call that trains on a file of this content."""

    def call(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"train": str(path), **also}

    return call


def table(name, columns, cut=0):
    """A call that trains on a parquet file."""

    def call(folder):
        pq.write_table(pa.table(columns), folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - cut])
        return {"train": str(folder / name)}

    return call


def both(train, validation):
    """A call that trains on one file and evaluates on another."""

    def call(folder):
        (folder / "val").mkdir()
        return {"train": train(folder)["train"], "validation": validation(folder / "val")["train"]}

    return call


def mixed(folder):
    for name in ("a.csv", "b.jsonl"):
        (folder / name).write_text("text,label\nw1,a\n")
    return {"train": str(folder / "*.*")}


GOOD = file("train.jsonl", "\n".join(LINES))
DATA = [
    Case("a jsonl file that is cut off", ("train.jsonl, line 4", "cut off"),
         file("train.jsonl", "\n".join(LINES)[:-9])),
    Case("a jsonl file with a broken line", ("train.jsonl, line 2", "column"),
         file("train.jsonl", "\n".join([LINES[0], "{text: w1}", LINES[1]]))),
    Case("a jsonl file of words", ("train.jsonl, line 1", "{...}"),
         file("train.jsonl", '"w1"\n"w2"\n')),
    Case("a json file that is cut off", ("train.json, line", "cut off"),
         file("train.json", "[" + ",\n".join(LINES)[:-5])),
    Case("a jsonl file in another encoding", ("train.jsonl, line 2", "0xe9", "UTF-8"),
         file("train.jsonl", (LINES[0] + '\n{"text": "é", "label": "b"}\n').encode("latin-1"))),
    Case("a csv file in another encoding", ("train.csv, line 3", "UTF-8"),
         file("train.csv", "text,label\nw1,a\né,b\n".encode("latin-1"))),
    Case("a csv file in UTF-16", ("train.csv, line 1", "UTF-8"),
         file("train.csv", "text,label\nw1,a\nw2,b\n".encode("utf-16"))),
    Case("a csv file without a column", ("train.csv", "'label'", "'text', 'tag'", "columns=("),
         file("train.csv", "text,tag\nw1,a\nw2,b\n")),
    Case("a csv file without its header", ("train.csv", "'text'", "'w1', 'a'"),
         file("train.csv", "w1,a\nw2,b\n")),
    Case("a csv file with semicolons", ("train.csv", "'text'", "'text;label'"),
         file("train.csv", "text;label\nw1;a\nw2;b\n")),
    Case("a csv row with too many fields", ("train.csv, line 3", "3 fields", "names 2"),
         file("train.csv", "text,label\nw1,a\nw2,w3,b\n")),
    Case("csv rows that all have too many fields", ("train.csv, line 2", "3 fields", "names 2"),
         file("train.csv", "text,label\nw1,w2,a\nw2,w3,b\n")),
    Case("csv rows that end in a comma", ("train.csv, line 2", "3 fields", "names 2"),
         file("train.csv", "text,label\nw1,a,\nw2,b,\n")),
    Case("a csv file with two columns of one name", ("train.csv", "more than one column 'text'"),
         file("train.csv", "text,text,label\nw1,w2,a\nw2,w3,b\n")),
    Case("a stream of a csv file with too many fields", ("train.csv, line 2", "3 fields"),
         lambda folder: {"train": {"streaming": True, "path": file(
             "train.csv", "text,label\nw1,w2,a\nw2,w3,b\n")(folder)["train"]}}),
    Case("a folder of csv files with too many fields", ("train.csv, line 2", "3 fields"),
         lambda folder: {"train": str(Path(file(
             "train.csv", "text,label\nw1,w2,a\nw2,w3,b\n")(folder)["train"]).parent)}),
    Case("a tsv file with quotes in its texts", ("train.tsv", "row 1", "'quoting': 3"),
         file("train.tsv", 'text\tlabel\nw1\ta\n"w2 w3\tb\nw4\ta\n"w5" w6\tb\n')),
    Case("a csv row without its label", ("train.csv", "Row 1", "no label in 'label'"),
         file("train.csv", "text,label\nw1,a\nw2\nw3,b\n")),
    Case("a csv field without its closing quote", ("train.csv", "line 2", "quote"),
         file("train.csv", 'text,label\n"w1,a\nw2,b\n')),
    Case("a csv file of a header alone", ("train.csv", "no rows"),
         file("train.csv", "text,label\n")),
    Case("an empty file", ("train.csv", "empty"), file("train.csv", "")),
    Case("an empty jsonl file", ("train.jsonl", "empty"), file("train.jsonl", "\n")),
    Case("a text in the middle that is missing", ("train.jsonl", "Row 1", "no text in 'text'"),
         file("train.jsonl", "\n".join([LINES[0], '{"label": "b"}', LINES[1]]))),
    Case("a text in the middle that is a number", ("train.jsonl", "'text'", "row 1 holds 7"),
         file("train.jsonl", "\n".join([LINES[0], '{"text": 7, "label": "b"}', LINES[1]]))),
    Case("a parquet file without a column", ("train.parquet", "'label'", "'text', 'score'"),
         table("train.parquet", {"text": ["w1", "w2"], "score": [1, 2]})),
    Case("a parquet file of numbers", ("train.parquet", "'text'", "int64, not text"),
         table("train.parquet", {"text": [1, 2], "label": [0, 1]})),
    Case("a parquet file that is cut off", ("train.parquet", "cut off"),
         table("train.parquet", {"text": ["w1", "w2"], "label": [0, 1]}, cut=20)),
    Case("a parquet file that is none", ("train.parquet", "Parquet"),
         file("train.parquet", "text")),
    Case("an arrow file that is none", ("train.arrow",), file("train.arrow", "text")),
    Case("a gz file that is cut off", ("train.csv.gz", "cut off"),
         file("train.csv.gz", gzip.compress(b"text,label\nw1,a\nw2,b\n" * 50)[:-12])),
    Case("a gz file that is none", ("train.csv.gz", "gzip"),
         file("train.csv.gz", "text,label\nw1,a\n")),
    Case("a file of an unknown kind", ("train.xlsx", "csv, tsv, json"), file("train.xlsx", "PK")),
    Case("a file that is not there", ("'train.csv'", "seen from"), {"train": "train.csv"},
         FileNotFoundError),
    Case("a data set that is nowhere", ("'nobody/nothing'", "no file, no folder"),
         {"train": "nobody/nothing"}, FileNotFoundError),
    Case("files of two kinds", ("files of one kind",), mixed),
    Case("an empty folder", ("data",), lambda folder: {"train": _made(folder / "data")}),
    Case("a text file for a classifier", ("train.txt", "'label'", "'text'"),
         file("train.txt", "w1\nw2\n")),
    Case("a validation file without a column", ("val.csv", "'label'", "validation"),
         both(GOOD, file("val.csv", "text\nw1\n"))),
    Case("a validation file with other labels", ("'c'", "validation", "'a', 'b'"),
         both(GOOD, file("val.csv", "text,label\nw1,c\n"))),
    Case("a question whose answer is elsewhere", ("train.jsonl", "Row 1", "'w9'"),
         file("train.jsonl", '{"question": "w1", "context": "w2", "answers": "w2"}\n'
              '{"question": "w1", "context": "w2", "answers": "w9"}\n'), task="question-answering"),
]  # fmt: skip


def _made(folder):
    folder.mkdir()
    return str(folder)


# Checkpoints.

RUN = {"per_device_train_batch_size": 8, "seed": 3, "learning_rate": 5e-4}


@cache
def written():
    """A run of two updates; its folder."""
    folder = mkdtemp()
    HFTrainer()(
        tiny.make("text-classification", 0), tiny.rows("text-classification"), max_steps=2,
        output_dir=folder, save_strategy="steps", save_steps=1, save_total_limit=2,
        **RUN,
    )  # fmt: skip
    return Path(folder)


def resumed(change=lambda folder: None, marked=True, **arguments):
    """A call that goes on from a checkpoint to which something was done."""

    def call(folder):
        checkpoint = folder / "checkpoint-2"
        shutil.copytree(written() / "checkpoint-2", checkpoint)
        if not marked:
            (checkpoint / "complete.json").unlink()
        change(checkpoint)
        return {"checkpoint": str(checkpoint), "max_steps": 3, **RUN, **arguments}

    return call


def gone(name):
    return lambda folder: (folder / name).unlink()


def short(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def one_bit(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return change


class Ran:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def pickled(folder):
    """Weights and optimizer as a pickle that runs code; nothing is left of the true ones."""
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as binary:
        pickle.dump(Ran(), binary)


def poisoned(name):
    def change(folder):
        torch.save(Ran(), folder / name)

    return change


def foreign(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "epoch=0-step=2.ckpt").write_bytes(b"PK")


def other_head(folder):
    model, _ = tiny.make("text-classification", 0, labels=5)
    model.save_pretrained(folder)


CHECKPOINTS = [
    Case("a checkpoint that is not there", ("'runs/checkpoint-9'", "there is no folder"),
         {"checkpoint": "runs/checkpoint-9"}),
    Case("the newest of no checkpoints", ("output_dir=", "no checkpoint-N",
         "Leave out checkpoint="),
         lambda folder: {"checkpoint": True, "output_dir": str(folder)}),
    Case("the newest of nowhere", ("checkpoint=True", "output_dir"), {"checkpoint": True}),
    Case("a checkpoint that is a number", ("checkpoint=7", "a folder"), {"checkpoint": 7},
         TypeError),
    Case("two checkpoints", ("resume_from_checkpoint='b'", "contradict"),
         {"checkpoint": "a", "resume_from_checkpoint": "b"}),
    Case("a checkpoint of Lightning", ("trainer_state.json is missing",), resumed(foreign)),
    Case("weights that are gone", ("model.safetensors is missing",),
         resumed(gone("model.safetensors"))),
    Case("weights that are cut off", ("model.safetensors has", "bytes instead of"),
         resumed(short("model.safetensors"))),
    Case("weights that were changed", ("model.safetensors was changed",),
         resumed(one_bit("model.safetensors"))),
    Case("an optimizer that was changed", ("optimizer.pt was changed",),
         resumed(one_bit("optimizer.pt"))),
    Case("a state that is gone", ("trainer_state.json is missing",),
         resumed(gone("trainer_state.json"))),
    Case("a mark that is cut off", ("complete.json cannot be read",),
         resumed(short("complete.json"))),
    Case("no optimizer", ("optimizer.pt is missing", "save_only_model"),
         resumed(gone("optimizer.pt"), marked=False)),
    Case("no random numbers", ("rng_state.pth is missing",),
         resumed(gone("rng_state.pth"), marked=False)),
    Case("a state that is no JSON", ("trainer_state.json cannot be read",),
         resumed(short("trainer_state.json"), marked=False)),
    Case("a schedule that is cut off", ("scheduler.pt is cut short",),
         resumed(short("scheduler.pt"), marked=False)),
    Case("pickled weights", ("model.safetensors is missing", "never read"),
         resumed(pickled, marked=False)),
    Case("an optimizer that runs code", ("optimizer.pt cannot be read",),
         resumed(poisoned("optimizer.pt"), marked=False)),
    Case("a schedule that runs code", ("scheduler.pt cannot be read",),
         resumed(poisoned("scheduler.pt"), marked=False)),
    Case("random numbers that run code", ("rng_state.pth cannot be read",),
         resumed(poisoned("rng_state.pth"), marked=False)),
    Case("the weights of another model", ("classifier", "(5, 32) there", "(3, 32) here"),
         resumed(other_head, marked=False)),
    Case("another batch size", ("per_device_train_batch_size=8 there", "=4 here"),
         resumed(per_device_train_batch_size=4)),
    Case("another rate", ("learning_rate=0.0005 there", "learning_rate=0.1 here"),
         resumed(learning_rate=0.1)),
    Case("another optimizer", ("optim='adamw_torch_fused' there", "optim='sgd' here"),
         resumed(optim="sgd")),
    Case("other moments", ("adam_beta1=0.9 there", "adam_beta1=0.5 here"), resumed(adam_beta1=0.5)),
    Case("other rows", ("rows=24 there", "rows=23 here"),
         resumed(train=tiny.rows("text-classification")[1:])),
    Case("another order of rows", ("data='", "there", "here"),
         resumed(train=tiny.rows("text-classification")[::-1])),
    Case("another seed", ("seed=3 there", "seed=4 here"), resumed(seed=4)),
    Case("another length", ("maxlength=64 there", "maxlength=16 here"), resumed(maxlength=16)),
    Case("another task", ("task='text-classification' there", "task='language-modeling' here"),
         resumed(task="language-modeling")),
]  # fmt: skip
CASES = [*DATA, *CHECKPOINTS]
