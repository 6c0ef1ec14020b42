"""`hflit check` finds what is wrong before any time is spent on training."""

import json
from pathlib import Path

import pytest

from hflit.cli import estimate
from hflit.cli.main import main
from tests.tasks.tiny import make


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
    assert "s an update" in out
    assert "GiB weights" in out
    assert "num_train_epochs" in out
    assert "Nothing is wrong." in out
    assert not Path("out").exists()


def base_words():
    return [
        *("--model.base", "base", "--data.train", "train.jsonl", "--data.validation", "val.jsonl"),
        *("--data.maxlength", "32"),
    ]


REFUSED = {
    ("--args.report_to", "wandb", "--args.output_dir", "out"): "report_to='wandb' cannot be used",
    ("--args.report_to", "tensorboard"): "report_to='tensorboard' writes into output_dir",
    ("--model.checkpoint", "true", "--args.output_dir", "out"): "checkpoint=True found nothing",
    ("--data.max_tokens_per_batch", "99", "--args.auto_find_batch_size", "true"): "Choose one.",
}


@pytest.mark.parametrize("words", REFUSED, ids=REFUSED.values())
def test_what_fit_refuses_is_refused(words, base, program):
    """Once `check` said that nothing is wrong."""
    given = base()
    assert (told := program("check", *given, *words)[2].removeprefix("hflit check: "))
    assert program("fit", *given, *words)[2].removeprefix("hflit fit: ") == told
    assert REFUSED[words] in told
    assert told.count("\n") == 1
    assert not Path("out").exists()


def test_a_checkpoint_to_go_on_from_is_read_and_nothing_is_changed(base, found, program):
    words = [*base(), "--args.output_dir", "out", "--args.save_strategy", "epoch"]
    words += ["--args.num_train_epochs", "1", "--args.report_to", "[mlflow, tensorboard]"]
    assert program("fit", *words, "--args.report_to", "none")[0] == 0
    half = Path("out/.checkpoint-9.999999999.part")  # a later fit removes it
    half.mkdir()
    before = sorted(Path().rglob("*"))
    words += ["--model.checkpoint", "true"]
    repeated = found(*words)[1]["wrong"]
    assert len(repeated) == 1
    assert "also stand in the training data" in repeated[0]
    wrong = found(*words, "--args.seed", "7")[1]["wrong"]
    assert "belongs to another run: seed=42 there, seed=7 here." in wrong[0]
    assert sorted(Path().rglob("*")) == before


def test_a_stream_is_checked_beside_a_plain_file(base, found):
    """Once the answer was 'train': there were no rows of that to look in."""
    words = [*base(), "--data.train={path: train.jsonl, streaming: true}", "--args.max_steps", "2"]
    status, report = found(*words)
    assert (status, report["wrong"]) == (0, [])


def test_a_class_is_the_same_as_a_whole_number_and_as_a_float(base, found):
    words = base()
    write("train.jsonl", [{"text": f"w{i} w1", "label": i % 3} for i in range(6)])
    write("val.jsonl", [{"text": f"w{i} w1", "label": float(i == 1)} for i in range(3)])
    wrong = "2 validation rows also stand in the training data: rows 0, 1 of the validation data."
    assert found(*words)[1]["wrong"] == [wrong]


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


TASKS_LEARN = {  # task -> what of the first input is learned, in the words of the tests
    "question-answering": ["w2"],
    "language-generation": ["w0 w1 w2"],
    "text-classification": [],
    "sequence-sequence": [],
}


@pytest.mark.parametrize("task", TASKS_LEARN)
def test_what_is_learned_of_an_input_is_marked(task, base, found):
    _, report = found(*base(task), task=task)
    parts = report["samples"][0]["parts"]
    learned = [text.replace("[SEP]", "").strip() for text, is_learned in parts if is_learned]
    expected = TASKS_LEARN[task]
    assert [text[: len(each)] for text, each in zip(learned, expected, strict=True)] == expected


def test_masked_tokens_are_marked_and_told(base, found):
    _, report = found(*base("language-modeling"))
    for sample in report["samples"]:
        marked = sum(len(text.split()) for text, is_learned in sample["parts"] if is_learned)
        assert marked == len(sample["label"].split()) > 0


def test_batches_of_one_row_show_one_input(base, found):
    """Once this was an IndexError."""
    words = [*base("language-modeling"), "--args.per_device_train_batch_size", "1"]
    assert len(found(*words)[1]["samples"]) == 1
    write("train.jsonl", [{"text": "w1 w2 w3"}])
    assert len(found(*words)[1]["samples"]) == 1


def test_texts_with_brackets_are_shown_as_they_are(base, program):
    """Once `[/neg]` was an error of the markup, and `[neg]` a label without a name."""
    words = base()
    names = ["[neg]", "[/neg]", ":smile:"]
    write("train.jsonl", [{"text": f"w{i} w1", "label": names[i % 3]} for i in range(9)])
    write("val.jsonl", [{"text": "w9", "label": "[/new]"}])
    assert "lacks: '[/new]'" in " ".join(program("check", *words)[1].split())
    write("val.jsonl", [{"text": "w9", "label": "[neg]"}])
    status, out, _ = program("check", *words)
    assert status == 0
    assert all(f"label {name} " in out for name in names)
    words = [*base("sequence-sequence"), "--data.prefix", "[INST] w1 [/INST] "]
    assert "[INST] w1 [/INST] " in program("check", *words)[1]


def test_labels_are_shown_in_color(base, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["check", *base("question-answering")])
    assert "\x1b[1;32mw2 " in capsys.readouterr().out  # bold green


@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch", 2), ("sgd", 0)])
def test_memory_is_counted(optim, moments, base, found):
    """Weights and gradients, the optimizer's moments, and activations that grow with the batch."""
    words = [*base(), "--args.optim", optim, "--args.per_device_train_batch_size"]
    costs = [found(*words, size)[1]["estimate"] for size in ("4", "8")]
    model = make("text-classification", 0)[0]
    weights = sum(4 * each.numel() for each in model.parameters())
    steps = 4 * len(list(model.parameters()))  # Adam counts its updates for each
    for cost in costs:
        memory = cost["memory"]
        buffers = sum(each.numel() * each.element_size() for each in model.buffers())
        assert memory["weights"] == weights + buffers
        assert memory["gradients"] == weights
        assert memory["optimizer"] == moments * weights + (steps if moments else 0)
        assert memory["total"] == sum(memory.values()) - memory["total"]
        assert cost["seconds_per_update"] > 0
    small, large = (cost["memory"]["activations"] for cost in costs)
    assert large == pytest.approx(2 * small, rel=0.1)


def test_memory_that_is_not_there_is_wrong(base, found, monkeypatch):
    words = base()
    write("val.jsonl", [{"text": "w99", "label": 0}])
    needed = found(*words)[1]["estimate"]["memory"]["total"]
    monkeypatch.setattr(estimate, "MOST", 10)
    monkeypatch.setattr(estimate, "_free", lambda args: needed - 1)
    status, report = found(*words)
    assert status == 1
    assert report["wrong"] == ["A run needs 0.00 GiB or more; 0.00 GiB are free."]
    monkeypatch.setattr(estimate, "_free", lambda args: needed)
    assert found(*words)[0] == 0
    monkeypatch.setattr(estimate, "_free", lambda args: 5000)  # too little to try
    status, report = found(*words)
    assert (status, "seconds_per_update" in report["estimate"]) == (1, False)


def test_adapters_and_teachers_are_part_of_the_estimate(base, found):
    words = base()
    plain = found(*words)[1]["estimate"]["memory"]
    taught = found(*words, "--model.teacher", "base")[1]["estimate"]["memory"]
    assert taught["weights"] == 2 * plain["weights"]
    assert taught["gradients"] == plain["gradients"]
    adapted = found(*words, "--model.lora", "{r: 2}")[1]["estimate"]["memory"]
    assert adapted["gradients"] < plain["gradients"] / 2
    _, report = found(*words, "--model.quantize", "true", "--model.lora", "true")
    assert "Time and memory are not estimated for quantized weights." in report["notes"]


def test_updates_are_those_of_all_processes(base, found, monkeypatch):
    # The tests may run in a process that has no script.
    monkeypatch.setattr("hflit.loop.strategies._is_interactive", lambda: False)
    words = [*base(), "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    _, report = found(*words, "--args.num_train_epochs", "1")
    assert report["updates"] == 2  # 24 rows, 8 in each of two processes
