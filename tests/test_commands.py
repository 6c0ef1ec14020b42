"""Every command that README and docs print runs, word for word, one after the other.

The environment makes each run three updates long, where the command does not say otherwise.
"""

import csv
import json
import os
import re
import shlex

import datasets
import mlflow
import pytest

from hflit.cli.main import main
from tests import stand_ins
from tests.stand_ins import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ROWS = [("w1 w2 w3", "good"), ("w4 w5", "bad"), ("w6 w1", "good"), ("w7 w8 w9", "bad")]


def pages():
    return "".join((ROOT / page).read_text() for page in PAGES)


def commands(page):
    """Variables and what follows `hflit`, of each command in the blocks of a page."""
    for block in re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"([A-Z_]+=\S+ )*hflit ", line):
                words = shlex.split(line, comments=True)
                start = words.index("hflit")
                yield dict(word.split("=", 1) for word in words[:start]), words[start + 1 :]


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    stand_ins.build(tmp_path, *stand_ins.MODELS, *stand_ins.DATA)
    others = [(f"{text} w{i}", label) for i, (text, label) in enumerate(ROWS * 5)]
    for name, text in re.findall(r"`(\w+\.yaml)`\n\n```yaml\n(.*?)```", pages(), re.S):
        (tmp_path / name).write_text(text)
    write("train.csv", ["text", "label"], others)
    write("val.csv", ["text", "label"], ROWS)
    write("new.csv", ["text"], [row[:1] for row in ROWS])
    write("part-1.csv", ["comment", "mood"], others)
    monkeypatch.setenv("HFLIT_ARGS__MAX_STEPS", "3")
    monkeypatch.setenv("HFLIT_ARGS__USE_CPU", "true")
    return tmp_path


def test_every_page_with_commands_is_known():
    assert {page for page in PAGES if list(commands(page))} >= {"README.md", "docs/command_line.md"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))])
def test_the_commands_of_a_page_run(page, folder, monkeypatch, capsys):
    for variables, words in commands(page):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
                if name == "MLFLOW_TRACKING_URI":
                    mlflow.set_tracking_uri(value)
            try:
                status = main(words)
            except SystemExit as end:  # help, or a configuration that is only printed
                status = end.code
        told = capsys.readouterr()
        # `check` ends with 1 at rows that stand twice, as they do in the real data of this folder.
        assert status in ((0, 1) if words[0] == "check" else (0, None)), f"{words}: {told.err}"
        if "--json" in words:
            assert json.loads(told.out)
        if "--output" in words:
            assert os.path.exists(words[words.index("--output") + 1])


@pytest.mark.slow
def test_the_first_path_of_the_page_leads_to_predictions(folder):
    for _, words in list(commands("docs/command_line.md"))[:4]:
        assert main(words) == 0
    assert (folder / "runs/first/report.html").exists()
    table = datasets.Dataset.from_parquet("predictions.parquet", cache_dir="cache")
    assert table.column_names == ["label", "score"]
    assert len(table) == len(ROWS)
    assert set(table["label"]) <= {"good", "bad"}
