"""The fenced blocks of a Markdown page, and how each is run."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from unittest import mock

from hflit.cli.main import main

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<excuse>[^\n]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'title="(?P<name>[\w./-]+)"')
PROGRAM = re.compile(r"(\w+=\S+ )*hflit ")  # with variables of its environment before it
VARIABLE = re.compile(r"\w+=")
RUN = ("python", "bash")
SHOWN = ("text", "")  # output, trees of files
FILES = ("csv", "json", "jsonl", "yaml", "python")  # with a title they become files


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        place: Page and line.
        language: As the page names it.
        code: What is in it.
        title: Name of the file that it is, or None.
        excuse: Why it is not run, or None.
    """

    place: str
    language: str
    code: str
    title: str | None
    excuse: str | None


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        indent, code = found["indent"], found["code"]
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        language = found["language"]
        if not language and PROGRAM.match(code):
            language = "bash"
        title = TITLE.search(found["info"])
        place = f"{page.name}:{line}"
        blocks.append(Block(place, language, code, title and title["name"], found["excuse"]))
    return blocks


def commands_of(block: Block) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and words of each command of a shell block without loops and pipes."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    counts = [sum(1 for _ in takewhile(VARIABLE.match, words)) for words in commands]
    return [
        (dict(word.split("=", 1) for word in words[:count]), words[count:])
        for words, count in zip(commands, counts, strict=True)
    ]


def _status(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:  # --print_config
        return end.code or 0


def run_block(block: Block, names: dict, here: bool = False) -> None:
    """Write a block that is a file; run any other, Python with the names that earlier ones made.

    With `here` the program `hflit` runs in this process, which has imported it already; a block
    with another program in it runs in a shell all the same.
    """
    if block.excuse or block.language in SHOWN:
        return
    if block.title and block.language in FILES:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.code, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.code, block.place, "exec"), names)
    elif here and all(words[0] == "hflit" for _, words in commands_of(block)):
        for variables, (_, *words) in commands_of(block):
            with warnings.catch_warnings(), mock.patch.dict(os.environ, variables):
                warnings.simplefilter("default")
                assert _status(words) == 0, f"{block.place}: hflit {shlex.join(words)}"
    else:
        script = block.code.replace("python ", f"{sys.executable} ")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block.place}\n{block.code}\n{done.stdout}\n{done.stderr}"
