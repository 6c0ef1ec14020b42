"""`hflit check` finds what is wrong before any time is spent on training."""

import json
from pathlib import Path

import pytest


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def found(base, program):
    def found(*words, task="text-classification"):
        status, out, err = program("check", *words, "--json")
        assert not err.startswith("hflit check"), err
        return status, json.loads(out)

    return found


def test_a_sound_run_is_told_and_not_run(base, program):
    status, out, _ = program("check", *base(), "--args.num_train_epochs", "2")
    assert status == 1  # the tiny rows are the same in both files
    write("val.jsonl", [{"text": f"w{i} w9 w8 w7", "label": i % 3} for i in range(6)])
    status, out, _ = program("check", *base_words(), "--args.num_train_epochs", "2")
    assert status == 0, out
    assert "6 updates in 2 epochs of all weights" in out
    assert "label LABEL_0" in out
    assert "[CLS] w0 w1 w2 [SEP]" in out
    assert "num_train_epochs" in out
    assert "Nothing is wrong." in out
    assert not Path("out").exists()


def base_words():
    return [
        *("--model.base", "base", "--data.train", "train.jsonl", "--data.validation", "val.jsonl"),
        *("--data.maxlength", "32"),
    ]


def test_repeated_and_shared_rows_are_found(base, found):
    words = base()
    rows = [{"text": f"w{i} w1", "label": i % 3} for i in range(6)]
    write("train.jsonl", [*rows, rows[2]])
    write("val.jsonl", [{"text": "w99", "label": 0}, rows[4]])
    status, report = found(*words)
    assert status == 1
    assert report["wrong"] == [
        "1 training rows repeat earlier ones (rows 2 = 6).",
        "1 validation rows also stand in the training data: rows 1 of the validation data.",
    ]
    assert report["splits"]["train"]["labels"] == {"LABEL_0": 2, "LABEL_1": 2, "LABEL_2": 3}


def test_labels_that_only_validation_has_are_wrong(base, found):
    words = base()
    write("val.jsonl", [{"text": "w99", "label": 7}])
    status, report = found(*words)
    assert status == 1
    assert "Labels of the validation data that the training data lacks: 7" in report["wrong"][0]


def test_all_misaligned_answers_are_listed(base, found):
    words = base("question-answering")
    rows = [{"question": "w1", "context": f"w{i} w2", "answers": "w2"} for i in range(5)]
    for place in (1, 3):
        rows[place]["answers"] = "w77"
    write("train.jsonl", rows)
    status, report = found(*words)
    assert status == 1
    assert "2 train rows have misaligned answers: rows 1, 3." in report["wrong"]


def test_padding_and_cutting_are_shares(base, found):
    words = base()
    write("train.jsonl", [{"text": "w1 " * n, "label": n % 4 // 2} for n in (4, 6, 60, 50)])
    write("val.jsonl", [{"text": "w1 w3", "label": 0}])
    _, report = found(*words)
    train = report["splits"]["train"]
    assert train["tokens"] == 6 + 8 + 32 + 32
    assert train["padding"] == pytest.approx(1 - 78 / (4 * 32))
    assert train["longest"] == 2
    assert "50.0% of the train inputs fill maxlength=32: what is longer is cut." in report["notes"]


def test_whether_the_end_is_learned(base, found):
    _, report = found(*base("language-modeling"))
    assert "The end of a text (EOS) is not learned: the tokenizer adds none." in report["notes"]
