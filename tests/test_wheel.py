"""The wheel by itself: installed beside its dependencies, away from the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.docs.blocks import read_blocks
from tests.docs.hub import make_hub

ROOT = Path(__file__).parent.parent
SCRIPT = """
from hflit import HFTrainer

rows: list[dict[str, str]] = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]


def accuracy(base: str) -> float:
    trainer = HFTrainer()
    model, tokenizer = trainer(base, rows, validation=rows, metrics="auto", learning_rate=1e-4)
    model.save_pretrained("model")
    labels: list[str] = [found["label"] for found in trainer.predict(rows)]
    print(labels, len(tokenizer), trainer.state.global_step)
    return trainer.metrics["eval_accuracy"]
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder),
        cwd=ROOT,
    )
    (wheel,) = folder.glob("hflit-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter that has hflit from the wheel alone, and all it needs from this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("hflit/**/*") if "__pycache__" not in
        path.parts and path.is_file()
    }  # fmt: skip
    assert {name for name in names if ".dist-info/" not in name} == packaged
    assert "hflit/py.typed" in names


def test_quickstart_runs_from_the_wheel(python, tmp_path):
    """Word for word, in a folder that is not the repository."""
    script = []
    for block in read_blocks(ROOT / "docs" / "index.md"):
        if block.title:
            (tmp_path / block.title).write_text(block.code)
        elif block.language == "python":
            script.append(block.code)
    script.append("import hflit; print(hflit.__file__)")
    (tmp_path / "quickstart.py").write_text("\n".join(script))
    told = run(python, "quickstart.py", cwd=tmp_path, env=_alone(make_hub(tmp_path / "hub")))
    assert str(python.parent.parent) in told.splitlines()[-1]
    assert (tmp_path / "runs" / "first" / "model.safetensors").exists()


def test_program_runs_from_the_wheel(python, tmp_path):
    told = run(python.parent / "hflit", "--help", cwd=tmp_path, env=_alone(tmp_path))
    assert "predict" in told


def test_strict_mypy_has_no_complaint_about_a_user_script(python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    checked = ["--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache"]
    told = run(sys.executable, "-m", "mypy", *checked, "script.py", cwd=tmp_path, env=_alone())
    assert "no issues found" in told

    # The types are hflit's own, not Any: what the signature does not say is found.
    (tmp_path / "wrong.py").write_text(SCRIPT.replace("learning_rate=1e-4", "maxlength='long'"))
    wrong = [sys.executable, "-m", "mypy", *checked, "wrong.py"]
    done = subprocess.run(wrong, cwd=tmp_path, env=_alone(), capture_output=True, text=True)
    assert 'expected "int | None"' in done.stdout


def _alone(hub=None):
    """The environment without the repository on the path of imports."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return rest if hub is None else {**rest, "HF_HUB_CACHE": str(hub)}
