"""Every block of the documentation and the README runs, in the order a reader meets them.

Models come from a Hub on disk and keep their names; training stops after a few updates, which the
environment asks of the command line. The rest is word for word what the page says.
"""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.docs.blocks import FILES, RUN, SHOWN, read_blocks, run_block
from tests.docs.hub import make_hub

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
BLOCKS = {str(page.relative_to(ROOT)): read_blocks(page) for page in PAGES}
HEAVY = {"docs/coming_from.md"}  # imports txtai
HERE = {"docs/command_line.md"}  # calls the program 22 times, which takes 10 s each to import all
KINDS = {"warm": "good", "dull": "bad"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def desk(hub, tmp_path, monkeypatch):
    """The folder a reader sits in: a checkout of the repository, and files of their own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HFLIT_ARGS__MAX_STEPS", "2")
    for name in ("configs", "examples", "benchmarks", "tests", "pyproject.toml"):
        target = ROOT / name
        (shutil.copytree if target.is_dir() else shutil.copy)(target, tmp_path / name)
    for name in ("train.csv", "val.csv", "new.csv"):  # no row stands in two of them
        _write(tmp_path / name, "text,label")
    _write(tmp_path / "part-1.csv", "comment,mood")


def _write(file, header):
    rows = [
        f"a {kind} film seen {n} times in {file.stem},{label}"
        for n in range(20)
        for kind, label in KINDS.items()
    ]
    file.write_text("\n".join([header, *rows, ""]))


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_say_what_they_are(page):
    for block in BLOCKS[page]:
        is_file = block.title and block.language in FILES
        assert is_file or block.language in (*RUN, *SHOWN), block


def _mark(page):
    is_slow = page in HEAVY or any(
        block.language == "bash" and not block.excuse for block in BLOCKS[page]
    )
    marks = [pytest.mark.slow, pytest.mark.timeout(900)] * is_slow
    return pytest.param(page, marks=[*marks, *[pytest.mark.long] * (page == "README.md")])


# peft asks the Hub itself for the file, whatever lies in the cache; here is no network.
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("page", [_mark(page) for page, blocks in BLOCKS.items() if blocks])
def test_blocks_run(page):
    names = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        run_block(block, names, here=page in HERE)
