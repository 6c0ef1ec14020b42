"""Options come from the call and the table of fields; who wins over whom."""

import dataclasses
import inspect
from pathlib import Path

import lightning.pytorch as L
import pytest
import transformers
import yaml

from hflit.arguments import parse
from hflit.cli.fit import config_text
from hflit.cli.options import DATA, call_of, given, make_parser, read_options, split_call
from hflit.pipeline import HFTrainer

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(scope="module")
def parser():
    return make_parser("fit", "Fine-tune a model.")


@pytest.fixture
def read(parser):
    def read(*argv):
        return call_of(parser, read_options(parser, argv, defaults=False))

    return read


def test_every_argument_field_and_flag_is_an_option_with_a_meaning(parser):
    helps = {action.dest: action.help for action in parser._actions}
    call = set(inspect.signature(HFTrainer.__call__).parameters) - {"self", "args"}
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    flags = set(inspect.signature(L.Trainer).parameters) - {"max_steps"}
    assert set(DATA) <= call
    for name in call:
        assert helps.get(f"model.{name}") or helps.get(f"data.{name}"), name
    assert all(helps[f"args.{name}"] for name in fields)
    assert all(helps[f"trainer.{name}"] for name in flags)
    assert "type: text, default: concat" in " ".join(parser.format_help().split())


def test_a_later_file_wins_and_an_option_wins_over_both(read, tmp_path):
    (tmp_path / "a.yaml").write_text("args: {learning_rate: 1e-3, seed: 1, max_steps: 5}\n")
    (tmp_path / "b.yaml").write_text("args: {seed: 2, max_steps: 6}\n")
    words = ["--args.max_steps", "7", "--config", "a.yaml", "--config=b.yaml"]
    assert read(*words) == {"learning_rate": 1e-3, "seed": 2, "max_steps": 7}


@pytest.mark.parametrize("text", ["", "# args:\n", "args:\n", "trainer:\nargs:\n  # seed: 1\n"])
def test_a_file_or_a_group_may_hold_nothing(text, read, tmp_path):
    """Once `trainer:` with all its lines in comments was a traceback."""
    (tmp_path / "a.yaml").write_text("args: {seed: 2}\n")
    (tmp_path / "b.yaml").write_text(text)
    assert read("--config", "a.yaml", "--config", "b.yaml") == {"seed": 2}
    (tmp_path / "c.yaml").write_text("trainer:\nargs: {learning_rate: 1e-3}\n")
    assert read("--config", "b.yaml", "--config", "c.yaml") == {"learning_rate": 1e-3}


@pytest.mark.parametrize(
    "text", ["args: {seed: 1}\nargs: {max_steps: 2}", "args: {seed: 1, seed: 2}"]
)
def test_a_name_that_stands_twice_in_a_file_is_told(text, read, tmp_path):
    """YAML keeps the last, and what stood under the first was lost."""
    (tmp_path / "run.yaml").write_text(f"model: {{base: one}}\n{text}\n")
    with pytest.raises(ValueError, match="stands twice in the group that begins in line"):
        read("--config", str(tmp_path / "run.yaml"))


def test_a_part_of_a_name_is_no_name(read, tmp_path):
    """Once it was taken for the option, and --conf for a file that wins over all."""
    for words, advice in (
        (("--args.learning_rat=1e-3",), "Did you mean --args.learning_rate?"),
        (("--args.lr", "1"), "Did you mean --args.learning_rate?"),
        (("--conf", "run.yaml"), "Unknown option --conf"),
        (("--trainer.max_steps", "1"), "Did you mean --args.max_steps?"),
    ):
        with pytest.raises(ValueError, match=advice.replace("?", "[?]")):
            read(*words)


def test_the_environment_stands_below_files(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HFLIT_ARGS__LEARNING_RATE", "0.5")
    monkeypatch.setenv("HFLIT_DATA__COLUMNS", "[a, b]")
    (tmp_path / "a.yaml").write_text("args: {learning_rate: 0.25}\n")
    assert read("--config", "a.yaml") == {"learning_rate": 0.25, "columns": ["a", "b"]}


def test_a_misspelled_variable_of_the_environment_is_told(read, monkeypatch):
    monkeypatch.setenv("HFLIT_ARGS__SEDE", "3")
    with pytest.warns(UserWarning, match=r"HFLIT_ARGS__SEDE is no option\. .*HFLIT_ARGS__SEED\?"):
        assert read() == {}
    monkeypatch.delenv("HFLIT_ARGS__SEDE")
    for name in ("HFLIT_DEBUG", "HFLIT_CACHE__SIZE", "HFLIT_ARGS__SEED"):  # no option, or one
        monkeypatch.setenv(name, "3")
    assert read() == {"seed": 3}  # a warning would be an error here


def test_a_value_at_its_default_is_given_too(read):
    """Once `--args.bf16 false` was lost here, and the run went on in bfloat16."""
    call = read("--args.bf16", "false", "--trainer.precision", "bf16-mixed")
    assert call == {"bf16": False, "precision": "bf16-mixed"}
    with pytest.raises(ValueError, match="bf16=False and precision='bf16-mixed' contradict"):
        parse(call)
    call = read("--trainer.precision", "32-true", "--args.bf16", "true")
    with pytest.raises(ValueError, match="bf16=True and precision='32-true' contradict"):
        parse(call)


def test_a_default_on_the_command_line_wins_over_a_file(read, tmp_path):
    (tmp_path / "a.yaml").write_text("args: {learning_rate: 1e-3}\ndata: {validation: x.csv}\n")
    words = ["--config", "a.yaml", "--args.learning_rate", "5e-5", "--data.validation", "null"]
    assert read(*words) == {"learning_rate": 5e-5}


def test_yaml_takes_no_for_a_word(read, tmp_path):
    (tmp_path / "a.yaml").write_text("args: {eval_strategy: no, report_to: none, fsdp: true}\n")
    call = read("--config", "a.yaml")
    assert call == {"eval_strategy": "no", "report_to": "none", "fsdp": True}


TEXTS = ["# ", "1", "no", "~", "[INST] w1 [/INST] ", "a: b", "- w1", '"w1"', "{x}", " ", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_is(text, read, tmp_path, monkeypatch):
    """Once `--data.prefix "# "` was no prefix: YAML reads a comment there."""
    assert read("--data.prefix", text) == read(f"--data.prefix={text}") == {"prefix": text}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"prefix": text}}))
    assert read("--config", "a.yaml") == {"prefix": text}
    monkeypatch.setenv("HFLIT_DATA__PREFIX", text)
    assert read() == {"prefix": text}


def test_a_text_may_be_none_and_is_no_number(read, tmp_path):
    (tmp_path / "a.yaml").write_text("data: {merge: null}\n")
    assert read("--config", "a.yaml") == read("--data.merge", "null") == {"merge": None}
    (tmp_path / "b.yaml").write_text("data: {prefix: 1}\n")
    with pytest.raises(
        ValueError, match=r"^--data.prefix: 1 is not text\. In a file, put it in quotes\.$"
    ):
        read("--config", "b.yaml")


def test_a_mapping_names_data(read, tmp_path):
    (tmp_path / "a.yaml").write_text("data: {train: {path: a.csv, split: 'train[:9]'}}\n")
    assert read("--config", "a.yaml") == {"train": {"path": "a.csv", "split": "train[:9]"}}
    words = ["--data.train.path=a.csv", "--data.train.streaming=true"]
    assert read(*words) == {"train": {"path": "a.csv", "streaming": True}}


def test_objects_are_made_of_their_classes(read):
    call = read(
        "--trainer.callbacks+=transformers.EarlyStoppingCallback",
        "--trainer.callbacks.early_stopping_patience=2",
        "--model.metrics=json.dumps",
        "--model.lora={r: 4}",
    )
    assert call["callbacks"][0].early_stopping_patience == 2
    assert callable(call["metrics"])
    assert call["lora"] == {"r": 4}


def test_no_is_a_word_under_an_older_name_too(read):
    assert read("--args.evaluation_strategy", "no") == {"evaluation_strategy": "no"}


def test_an_older_name_is_taken_and_not_shown(read, parser):
    assert read("--args.evaluation_strategy", "epoch") == {"evaluation_strategy": "epoch"}
    assert "evaluation_strategy" not in parser.format_help()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_read(path, read):
    groups = yaml.safe_load(path.read_text())
    assert read("--config", str(path)).keys() <= {
        name for group in groups.values() for name in group
    }
    assert read("--config", str(path))["base"] == groups["model"]["base"]


def test_a_printed_configuration_can_be_read_again(parser, capsys, tmp_path):
    with pytest.raises(SystemExit):
        parser.parse_args(["--args.seed", "7", "--print_config"])
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    config = read_options(parser, ["--config", "all.yaml"], defaults=False)
    asked, defaults = given(parser, config), parser.get_defaults().as_dict()
    changed = {
        name: value
        for group, values in asked.items()
        for name, value in values.items()
        if value != defaults[group][name]
    }
    assert changed == {"seed": 7}
    assert parse(split_call(call_of(parser, config))[1])[0].seed == 7  # no two contradict
    assert set(yaml.safe_load((tmp_path / "all.yaml").read_text())) == {
        *("model", "data", "args", "trainer")
    }


def test_a_printed_configuration_holds_no_secret(parser, capsys):
    for name in ("hub_token", "push_to_hub_token"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--args.{name}", "hf_secret", "--args.seed=7", "--print_config"])
        printed = capsys.readouterr().out
        assert "seed: 7" in printed
        assert "hf_secret" not in printed


def test_a_file_that_is_not_utf8_is_told_by_what_stands_before_it(parser, tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model:\n  task: caf\xe9\n")
    with pytest.raises(ValueError, match=r"--config is not UTF-8: .*task: caf.*Save it as UTF-8"):
        read_options(parser, ["--config", "latin.yaml"])


def test_metrics_that_cannot_be_imported_say_why(read, tmp_path, monkeypatch):
    """Once the answer was that metrics= must be a function."""
    (tmp_path / "broken_metrics.py").write_text("import no_such_package\ndef score(p): return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"metrics=broken_metrics\.score: .*no_such_package"):
        read("--model.metrics", "broken_metrics.score")


TYPED = {"run_name": "1e23456", "project": "-1.5E-3", "trackio_space_id": "2024"}


def test_texts_that_look_like_numbers_stay_texts(parser, capsys):
    """Once YAML held 1e5 without quotes, which the parser reads as a number."""
    words = [f"--args.{name}={value}" for name, value in TYPED.items()]
    words += ["--data.columns", "[1e5, null, 2024]", "--args.learning_rate", "1e-5"]
    config = read_options(parser, words, defaults=False)
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--print_config"])
    printed = capsys.readouterr().out
    for text in (config_text(parser, config), printed):
        Path("again.yaml").write_text(text)
        again = read_options(parser, ["--config", "again.yaml"], defaults=False)
        assert {name: again.args[name] for name in TYPED} == TYPED
        assert again.data.columns == ["1e5", None, "2024"]
        assert again.args.learning_rate == 1e-5


def test_an_empty_group_beside_them_changes_no_value(parser):
    Path("a.yaml").write_text("data:\n  columns: ['1e5']\nargs:\n  learning_rate: 1e-5\nmodel:\n")
    config = read_options(parser, ["--config", "a.yaml"], defaults=False)
    assert (config.data.columns, config.args.learning_rate) == (["1e5"], 1e-5)


def test_a_name_may_look_like_half_a_list(read):
    assert read("--data.columns", "[a, 'b]") == {"columns": "[a, 'b]"}
    assert read("--data.columns", '["a", null]') == {"columns": ["a", None]}


def test_a_number_for_a_name_is_told(parser):
    Path("a.yaml").write_text("data:\n  columns: [1e5, text]\n")
    with pytest.raises(ValueError, match=r"columns: 100000\.0 is not text.*put it in quotes"):
        read_options(parser, ["--config", "a.yaml"], defaults=False)


def test_another_file_for_config_is_not_shown_whole(parser):
    """Once all rows of the data stood in the error."""
    Path("train.csv").write_text("text,label\n" + "w1 w2,good\n" * 1000)
    with pytest.raises(ValueError, match="holds no groups of options: text,label w1") as error:
        read_options(parser, ["--config", "train.csv"])
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("words", [["--args.output_dir", ""], ["--args.output_dir="]])
def test_an_empty_folder_for_the_model_is_refused(words, read):
    """Once it trained, and saved nothing."""
    with pytest.raises(ValueError, match=r"--args\.output_dir is empty\. Name a folder"):
        read(*words)
