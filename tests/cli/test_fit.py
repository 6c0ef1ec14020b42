"""`hflit fit`, `validate` and `test`: the same run as the call's, again from what it left."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from transformers import BertForSequenceClassification

import hflit
from hflit import HFTrainer
from hflit.cli.evaluate import evaluate_model
from hflit.cli.fit import is_resumable, read_call, resuming, show_figures
from hflit.tasks import TASKS

ROOT = str(Path(hflit.__file__).parent.parent)
TRAIN = ("--args.max_steps", "6", "--args.logging_steps", "1", "--args.eval_strategy", "epoch")


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_saved_configuration_gives_the_same_losses_as_the_run_and_the_call(base, program):
    options = [*base(), *TRAIN, "--args.hub_token", "secret"]
    status, out, err = program("fit", *options, "--args.output_dir", "one")
    assert (status, err) == (0, "")
    assert "After 6 updates" in out
    assert "secret" not in Path("one/config.yaml").read_text()
    program("fit", "--config", "one/config.yaml", "--args.output_dir", "two")
    trainer = HFTrainer()
    trainer(
        "base",
        "train.jsonl",
        maxlength=32,
        max_steps=6,
        logging_steps=1,
        use_cpu=True,
    )
    called = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(called) == 6
    assert losses("one") == losses("two") == called
    config = yaml.safe_load(Path("one/config.yaml").read_text())
    assert config["data"] == {"train": "train.jsonl", "validation": "val.jsonl", "maxlength": 32}


def test_figures_are_shown_by_the_names_they_have(capsys):
    show_figures({"eval_f1_[neg]": 0.5, "eval_[/x]": 1}, "After")
    assert re.findall(r"eval_\S+", capsys.readouterr().out) == ["eval_[/x]", "eval_f1_[neg]"]


def test_without_an_output_dir_nothing_is_written(base, program):
    options = base()
    before = sorted(Path().rglob("*"))
    assert "Nothing was saved" in program("fit", *options, "--args.max_steps", "1")[1]
    assert sorted(Path().rglob("*")) == before


def test_a_home_folder_that_no_shell_expanded_is_one_folder(base, program, monkeypatch):
    """Once the model was in the home folder, and config.yaml in one called ~."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    options = [*base(), "--args.max_steps", "2", "--args.save_strategy", "epoch"]
    options += ["--args.output_dir", "~/one"]
    assert program("fit", *options)[0] == 0
    assert Path("home/one/config.yaml").exists()
    assert not Path("~").exists()
    assert is_resumable(read_call("fit", "", options, ())[2]["output_dir"])
    assert program("validate", *options)[1].startswith(
        f"{Path('home/one').absolute()} on val.jsonl"
    )
    Path("home/two").touch()
    options[-1] = "~/two"
    assert "two' is a file. Name a folder." in program("fit", *options)[2]


def test_a_pair_with_adapters_is_validated_and_asked(base, program):
    """Its halves have one each; once nothing but `fit` knew."""
    options = base("language-modeling")
    options[options.index("language-modeling")] = "token-detection"
    run = [*options, *TRAIN, "--model.lora", "true", "--model.metrics", "auto"]
    run += ["--args.output_dir", "out"]
    assert program("fit", *run)[0] == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    status, out, err = program("validate", *run, "--json")
    assert status == 0, err
    assert json.loads(out)["eval_loss"] == pytest.approx(last["eval_loss"])
    status, out, err = program("predict", "--model", "out", "--data", "val.jsonl")
    assert status == 0, err
    assert set(json.loads(out.splitlines()[0])) == {"tokens", "scores"}


@pytest.mark.parametrize("task", TASKS)
def test_validate_finds_the_figures_of_the_run(task, base, program):
    if task == "token-detection":
        options = base("language-modeling")
        options[options.index("language-modeling")] = task
    else:
        options = base(task)
    run = [*options, *TRAIN, "--args.output_dir", "out", "--model.metrics", "auto"]
    assert program("fit", *run)[0] == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    status, out, _ = program("validate", *run, "--json")
    figures = json.loads(out)
    assert status == 0
    compared = [n for n in last if n.startswith("eval_") and "runtime" not in n and "per_" not in n]
    assert {n: figures[n] for n in compared} == pytest.approx({n: last[n] for n in compared})
    status, out, _ = program("test", *run, "--data.test", "val.jsonl", "--json")
    assert json.loads(out).keys() >= {"test_loss"}


@pytest.mark.parametrize(
    "limit", [["--trainer.limit_val_batches", "1"], ["--args.dataloader_drop_last", "true"]]
)
def test_validate_takes_as_many_batches_as_the_run(limit, base, program):
    """Once both were dropped in silence here."""
    run = [*base(), *TRAIN, "--args.output_dir", "out", "--args.per_device_eval_batch_size", "5"]
    run += ["--args.learning_rate", "0.01"]  # else all rows have the same loss
    limited = [*run, *limit]
    assert program("fit", *limited)[0] == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    found = [json.loads(program("validate", *words, "--json")[1]) for words in (limited, run)]
    assert found[0]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found[1]["eval_loss"] != pytest.approx(last["eval_loss"], rel=1e-5)
    words = [*limited, "--data.test", "val.jsonl", "--json"]
    assert json.loads(program("test", *words)[1])["test_loss"] == found[0]["eval_loss"]


@pytest.mark.parametrize("argument", ["bf16_full_eval", "fp16_full_eval"])
def test_validate_takes_half_weights_as_the_run_did(argument, base, program):
    """Once they were whole here."""
    run = [*base(), *TRAIN, "--args.output_dir", "out"]
    assert program("fit", *run, f"--args.{argument}", "true")[0] == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    (last,) = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1:]
    words = ([*run, f"--args.{argument}", "true", "--json"], [*run, "--json"])
    half, whole = (json.loads(program("validate", *each)[1])["eval_loss"] for each in words)
    assert half == last != whole


def test_a_figure_that_is_no_number_is_null_in_json(base, program, monkeypatch):
    """Once it was NaN, which no other program reads as JSON."""
    figures = {"eval_loss": float("nan"), "eval_top": float("inf"), "eval_accuracy": 0.5}
    monkeypatch.setattr("hflit.cli.evaluate.evaluate_model", lambda *_: figures)
    out = program("validate", *base(), "--json")[1]
    assert out == '{"eval_loss": null, "eval_top": null, "eval_accuracy": 0.5}\n'


@pytest.mark.parametrize("limit", ["0", "0.01"])
def test_validate_of_no_batch_is_refused(limit, base, program):
    """Once it said that the accuracy was 0.0."""
    words = [*base(), "--trainer.limit_val_batches", limit, "--model.metrics", "auto"]
    assert program("fit", *base(), *TRAIN, "--args.output_dir", "out")[0] == 0
    status, out, err = program("validate", *words, "--args.output_dir", "out")
    assert (status, out) == (2, "")
    assert "limit_val_batches=0" in err
    assert "leaves no batch to evaluate." in err


def test_validate_names_what_it_evaluates_and_refuses_a_random_head(base, program):
    options = base("language-modeling")
    Path("val.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": "w2", "label": 1}\n')
    options[options.index("language-modeling")] = "text-classification"
    status, _, err = program("validate", *options, "--data.train", "val.jsonl")
    assert status == 2
    assert "base has no trained head for text-classification" in err
    assert "--data.test must be given" in program("test", *options)[2]


def test_a_head_that_would_be_made_anew_for_other_labels_is_not_evaluated(tiny_bert, ragged_rows):
    trainer = HFTrainer()
    trainer(tiny_bert(num_labels=3), ragged_rows(12), max_steps=1, output_dir="out")
    rows = [{"text": "w1", "label": "LABEL_0"}, {"text": "w2", "label": "another"}]
    with pytest.raises(ValueError, match=r"out has no trained head .* classifier.weight"):
        evaluate_model("out", rows, {"task": "text-classification"})


def named(rows, *names):
    """Rows whose labels have names in place of numbers."""
    return [{**row, "label": names[row["label"]]} for row in rows]


def test_a_head_is_not_evaluated_on_labels_that_it_does_not_know(tiny_bert, ragged_rows):
    """Once other names were taken for its own by their rank."""
    trainer = HFTrainer()
    call, rows = {"task": "text-classification"}, ragged_rows(12)
    known = named(rows, "bad", "good")
    trainer(tiny_bert(), known, known, max_steps=1, output_dir="out")
    with pytest.raises(ValueError, match="tells bad, good apart, .* has the labels 'dull', 'warm'"):
        evaluate_model("out", named(rows, "dull", "warm"), call)
    found = [evaluate_model("out", each, call)["eval_loss"] for each in (known, rows)]
    assert found == [pytest.approx(trainer.metrics["eval_loss"])] * 2
    # A head without names does not say what it is asked for.
    HFTrainer()(tiny_bert(), rows, max_steps=1, output_dir="numbered")
    assert "eval_loss" in evaluate_model("numbered", named(rows, "dull", "warm"), call)


def test_a_head_is_evaluated_on_rows_of_one_class(tiny_bert, ragged_rows):
    """Once a classifier was said to need two."""
    HFTrainer()(tiny_bert(), named(ragged_rows(12), "bad", "good"), max_steps=9, output_dir="out")
    figures = [
        evaluate_model("out", named(rows, "bad", "good"), {"task": "text-classification"})
        for rows in (ragged_rows(12), ragged_rows(12)[::2], ragged_rows(12)[1::2])
    ]
    whole, *halves = [each["eval_loss"] for each in figures]
    assert whole == pytest.approx(sum(halves) / 2)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


def test_a_regression_is_evaluated_on_whole_numbers(tiny_bert, ragged_rows):
    """Once they were taken for classes, of which its head has too few."""
    trainer = HFTrainer()
    rows = [{**row, "label": float(row["label"])} for row in ragged_rows(12)]
    scores = [{**rows[0], "label": 0.5}, *rows[1:]]
    trainer(tiny_bert(num_labels=1), scores, rows, max_steps=1, output_dir="out")
    figures = evaluate_model("out", rows, {"task": "text-classification"})
    assert figures["eval_loss"] == pytest.approx(trainer.metrics["eval_loss"])


def test_an_adapter_is_fitted_validated_and_asked(base, program):
    run = [*base(), *TRAIN, "--model.lora", "true", "--args.output_dir", "out"]
    assert program("fit", *run)[0] == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    figures = json.loads(program("validate", *run, "--json")[1])
    last = [entry for entry in history if "eval_loss" in entry][-1]
    assert figures["eval_loss"] == pytest.approx(last["eval_loss"])
    status, out, _ = program("predict", "--model", "out", "--data", "val.jsonl")
    assert status == 0
    assert json.loads(out.splitlines()[0]).keys() == {"label", "score"}


def test_a_run_goes_on_from_its_checkpoint(base, program):
    saved = [*base(), *TRAIN, "--args.save_strategy", "steps", "--args.save_steps", "3"]
    assert program("fit", *saved, "--args.output_dir", "whole")[0] == 0
    shutil.copytree("whole/checkpoint-3", "part/checkpoint-3")
    words = [*saved, "--args.output_dir", "part", "--model.checkpoint"]
    assert program("fit", *words, "part/checkpoint-3")[0] == 0
    assert losses("part") == losses("whole")
    assert program("fit", *words, "true")[0] == 0
    status, out, _ = program("validate", *words, "part/checkpoint-3")
    assert status == 0
    assert out.startswith("part/checkpoint-3 on val.jsonl:")


def test_the_command_that_goes_on_takes_a_learning_rate_found(base, program):
    """Once find_learning_rate, still in that command, was refused there."""
    words = [*base(), *TRAIN, "--args.save_strategy", "steps", "--args.save_steps", "3"]
    words += ["--model.find_learning_rate", "true", "--args.output_dir"]
    assert program("fit", *words, "whole")[0] == 0
    shutil.copytree("whole/checkpoint-3", "part/checkpoint-3")
    command = shlex.split(resuming("fit", [*words, "part"]))
    assert program(*command[command.index("fit") :])[0] == 0
    assert losses("part") == losses("whole")
    assert Path("part/config.yaml").read_text() == Path("whole/config.yaml").read_text().replace(
        "output_dir: whole", "output_dir: part"
    )


def test_the_command_that_goes_on_holds_no_token_and_one_checkpoint():
    """It is printed where logs are kept; and two checkpoints contradict each other."""
    words = ["--args.hub_token", "hf_secret", "--args.resume_from_checkpoint=one", "--args.seed=3"]
    command = resuming("fit", [*words, "--model.checkpoint", "two"])
    assert shlex.split(command)[-4:] == ["fit", "--args.seed=3", "--model.checkpoint", "true"]
    mapping = "{path: a.csv, token: hf_secret}"
    words = [
        "--data.train",
        mapping,
        f"--data.validation={mapping}",
        "--data.train.token",
        "hf_secret",
    ]
    words += ["--args.lr_scheduler_kwargs", "{a: 1}"]
    command = shlex.split(resuming("fit", words))
    assert command[command.index("fit") + 1 : -2] == [
        *("--data.train", '{"path": "a.csv"}', '--data.validation={"path": "a.csv"}'),
        *("--args.lr_scheduler_kwargs", "{a: 1}"),
    ]


@pytest.mark.timeout(100)
def test_processes_that_the_program_starts_end_in_figures(base, program):
    """Once in an AttributeError, after all the work."""
    words = [*base(), "--args.max_steps", "1", "--args.output_dir", "out", "--trainer.devices", "2"]
    status, out, err = program("fit", *words, "--trainer.strategy", "ddp_fork")
    assert status == 0, err
    assert "After 1 updates" in out
    assert "Seed 42, 2 processes." in Path("out/README.md").read_text()


@pytest.mark.timeout(100)
def test_a_mistake_is_one_line_in_processes_that_the_program_starts_too(base, program):
    """It was the traceback of one of them, and the exit status 1."""
    words = [*base(), "--data.columns", "[text, lab]", "--trainer.devices", "2"]
    status, out, err = program("fit", *words, "--trainer.strategy", "ddp_fork")
    assert (status, out) == (2, "")
    told = "hflit fit: train.jsonl: Column 'lab' is not in the training data, which has 'text', "
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_a_full_disk_at_the_end_is_told_in_a_line(base, program, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    words = [*base(), "--args.max_steps", "1", "--args.output_dir", "out"]
    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full)
    status, _, err = program("fit", *words)
    assert status == 2
    assert "The model cannot be written to out: Error while serializing: No space left" in err


def test_what_a_callback_of_transformers_asks_for_is_told_in_a_line(base, program):
    callback = ("--trainer.callbacks", "transformers.EarlyStoppingCallback")
    status, _, err = program("fit", *base(), "--args.max_steps", "1", *callback)
    assert status == 2
    assert err.splitlines()[-1].startswith("hflit fit: EarlyStoppingCallback requires")


@pytest.mark.parametrize("name", ["--model.checkpoint", "--args.resume_from_checkpoint"])
def test_the_configuration_of_a_run_that_went_on_is_that_of_the_whole_run(name, base, program):
    """Once it held the checkpoint, and gave nothing to train, or an error in another folder."""
    saved = [*base(), *TRAIN, "--args.save_strategy", "steps", "--args.save_steps", "3"]
    assert program("fit", *saved, "--args.output_dir", "one")[0] == 0
    config = Path("one/config.yaml").read_text()
    words = [*saved, "--args.output_dir", "one", name, "one/checkpoint-3"]
    assert program("fit", *words)[0] == 0
    assert Path("one/config.yaml").read_text() == config
    assert program("fit", "--config", "one/config.yaml", "--args.output_dir", "two")[0] == 0
    assert losses("two") == losses("one")


def test_the_program_runs_as_a_process(base):
    done = subprocess.run(
        [sys.executable, "-m", "hflit", "fit", *base(), "--args.max_steps", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.returncode == 0, done.stderr
    assert "After 1 updates" in done.stdout
    assert re.fullmatch(r"100.00 % of the weights learn; .* MB.\n", done.stderr)
