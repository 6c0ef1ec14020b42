"""The examples run, see their own asserts; each notebook is its script, with output."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from examples.make_notebooks import SCRIPTS

ROOT = Path(__file__).parent.parent


def test_all_four_are_there():
    assert len(SCRIPTS) == 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_its_script_with_output(script):
    notebook, source = jupytext.read(script.with_suffix(".ipynb")), jupytext.read(script)
    kept, written = ([(c.cell_type, c.source) for c in n.cells] for n in (notebook, source))
    assert kept == written, "the script has changed: make notebooks"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert {output.get("name", "") for cell in code for output in cell.outputs} <= {"stdout", ""}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "it was asked to write nothing"
