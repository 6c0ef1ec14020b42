"""Folders that a run left, and what is said where their files are cut off."""

import json
from pathlib import Path

import pytest

from hflit import HFTrainer
from hflit.cli.main import main
from hflit.saved import load_saved, read_run
from tests.tasks import tiny

ROWS = [{"other": row["text"], "label": row["label"]} for row in tiny.rows("text-classification")]


@pytest.fixture
def left():
    """Train and save, with a checkpoint after each update; return the folder."""

    def run(**arguments):
        for each in tiny.make("text-classification", 0):
            each.save_pretrained("base")
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        HFTrainer()("base", "rows.jsonl", "rows.jsonl", columns=("other", None, "label"),
                    max_steps=2, save_strategy="steps", save_steps=1, output_dir="out",
                    use_cpu=True, **arguments)  # fmt: skip
        return Path("out")

    return run


def test_a_checkpoint_knows_what_its_run_was_given(left, capsys, monkeypatch):
    """Once the columns were those of the task, and the run was said to have no validation data."""
    folder = left()
    assert load_saved(folder / "checkpoint-1").settings == read_run(folder)
    Path("best").symlink_to("out/checkpoint-2")
    assert read_run(Path("best"))["columns"] == ["other", None, "label"]
    assert main(["report", "--model", "out/checkpoint-2"]) == 0
    assert "Confusion matrix" in Path("out/checkpoint-2/report.html").read_text()
    assert "no validation data" not in capsys.readouterr().out
    assert read_run(Path("out/logs")) == {}
    (folder / "run.json").unlink()
    monkeypatch.setenv("HOME", str(folder.absolute()))
    for words in ([], ["--data", "rows.jsonl"]):
        assert main(["report", "--model=~/checkpoint-2", *words]) == 0
        assert "no run.json, which tells what the run was given" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[1]", '{"task": "text-cl', "\udcff"])
def test_a_damaged_run_file_is_named(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"run\.json (is no JSON|holds list)"):
        read_run(tmp_path)


def test_a_file_that_is_cut_off_is_told(left, capsys):
    """Once with a traceback, or by a place in a text without the name of its file."""
    folder = left(lora={"r": 2})
    files = ("adapter_model.safetensors", "tokenizer.json", "adapter_config.json")
    for name, command in (*((each, "predict") for each in files), ("trainer_state.json", "report")):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        words = ["--data", "rows.jsonl"] if command == "predict" else ["--rows", "0"]
        assert main([command, "--model", "out", *words]) == 2
        written = capsys.readouterr().err
        place = "out" if name in files[:2] else f"out/{name}"
        assert f" {place} " in written, written
        assert "perhaps cut off" in written
        (folder / name).write_bytes(whole)
    whole = Path("base/tokenizer.json").read_text()
    Path("base/tokenizer.json").write_text(whole[:50])
    assert main(["fit", "--model.base", "base", "--data.train", "rows.jsonl"]) == 2
    assert "The tokenizer in base cannot be read" in capsys.readouterr().err
