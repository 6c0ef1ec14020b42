"""Tokens reach nothing that a run writes, says or shows; foreign code runs only where asked for."""

import json
import logging
from pathlib import Path

import pytest
from transformers import BertConfig

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.cli.check import check
from hflit.cli.main import main
from hflit.report.page import write_page
from hflit.saved import load_saved, read_run
from tests.tasks import tiny

SECRET = "hf_QwErTyUiOpAsDfGh"
ROWS = tiny.rows("text-classification")


def run(**arguments):
    trainer = HFTrainer()
    base = tiny.make("text-classification", 0)
    trainer(base, ROWS, ROWS, **{"max_steps": 2, "output_dir": "out", **arguments})
    return trainer


@pytest.mark.filterwarnings("ignore:push_to_hub_token is now called:FutureWarning")
@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_a_token_is_nowhere(name, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "out/board")
    caplog.set_level(logging.DEBUG)
    trainer = run(**{name: SECRET}, save_strategy="steps", save_steps=1, logging_steps=1,
                  report_to="tensorboard", log_level="debug", lora={"r": 2})  # fmt: skip
    write_page(Path("out"), read_run(Path("out")), None)
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert {"README.md", "run.json", "training_args.json", "report.html"} <= {f.name for f in files}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    written = capfd.readouterr()
    assert SECRET not in caplog.text + written.out + written.err
    assert SECRET not in repr(trainer.state) + repr(trainer.saved) + repr(vars(trainer))
    arguments, _ = parse({name: SECRET})
    assert arguments.hub_token == SECRET
    assert SECRET not in repr(arguments) + str(arguments) + json.dumps(arguments.to_dict())


@pytest.mark.filterwarnings("ignore:push_to_hub_token is now called:FutureWarning")
def test_errors_and_checks_hide_tokens():
    found = check({"base": tiny.make("text-classification", 0), "train": ROWS, "hub_token": SECRET})
    assert SECRET not in json.dumps(found, default=str)
    with pytest.raises(ValueError, match="hub_token=<hidden>") as error:
        parse({"hub_token": SECRET, "push_to_hub_token": "other"})
    assert SECRET not in str(error.value)
    with pytest.raises(TypeError) as error:
        parse({"hub_token": [SECRET]})
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("key", ["token", "storage_options"])
def test_a_token_in_a_mapping_of_data_is_nowhere(key, tmp_path, capfd):
    """Once it stood in the model card, and in everything else that tells of a run."""
    tiny.make("text-classification", 0)[0].save_pretrained("base")
    tiny.make("text-classification", 0)[1].save_pretrained("base")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    value = {"password": SECRET} if key == "storage_options" else SECRET
    parts = {"path": "rows.jsonl", key: value}
    config = {
        "model": {"base": "base"},
        "data": dict.fromkeys(("train", "validation", "test"), parts),
        "args": {"max_steps": 2, "use_cpu": True, "output_dir": "out"},
    }
    Path("run.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert main(["report", "--model", "out", "--rows", "1"]) == 0
    assert main(["validate", "--config", "run.yaml"]) == 0
    main(["check", "--config", "run.yaml", "--json"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "run.yaml", "--print_config"])
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    names = {"README.md", "run.json", "config.yaml", "report.html"}
    assert names <= {file.name for file in files}
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    written = capfd.readouterr()
    assert "out on rows.jsonl:" in written.out
    assert SECRET not in written.out + written.err


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path("ran").touch()
class MineConfig(BertConfig):
    model_type = "mine"
class Mine(BertForSequenceClassification):
    config_class = MineConfig
"""


def mine(folder):
    """A folder with a model of a kind that transformers does not know, and its code."""
    model, tokenizer = tiny.make("text-classification", 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {
            "AutoConfig": "mine.MineConfig",
            "AutoModel": "mine.Mine",
            "AutoModelForSequenceClassification": "mine.Mine",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE)
    assert BertConfig.model_type == "bert"
    return str(folder)


def test_code_of_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    base = mine(tmp_path / "base")
    call = {"max_steps": 1, "output_dir": "out", "maxlength": 16}
    for load in (lambda: HFTrainer()(base, ROWS, **call), lambda: load_saved(base)):
        with pytest.raises(ValueError, match="code of its own.*trust_remote_code=True"):
            load()
    teacher = {"base": tiny.make("text-classification", 0), "train": ROWS, "teacher": base}
    with pytest.raises(ValueError, match="code of its own"):
        HFTrainer()(**teacher, **call)
    assert not Path("ran").exists()
    # Once it was taken for a model of no task, until transformers had loaded it.
    assert load_saved(base, trust_remote_code=True).task == "text-classification"
    HFTrainer()(**teacher, trust_remote_code=True, **call)
    model, _ = HFTrainer()(base, ROWS, trust_remote_code=True, **call)
    assert type(model).__name__ == "Mine"
    assert Path("ran").exists()
