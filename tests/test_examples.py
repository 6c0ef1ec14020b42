"""The examples run, see their own asserts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.make_notebooks import SCRIPTS

ROOT = Path(__file__).parent.parent


def test_all_four_are_there():
    assert len(SCRIPTS) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "it was asked to write nothing"
