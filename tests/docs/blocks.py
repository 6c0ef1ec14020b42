"""The fenced blocks of a Markdown page, and how each is run."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<excuse>[^\n]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'title="(?P<name>[\w./-]+)"')
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
        if not language and code.startswith("hflit "):
            language = "bash"
        title = TITLE.search(found["info"])
        place = f"{page.name}:{line}"
        blocks.append(Block(place, language, code, title and title["name"], found["excuse"]))
    return blocks


def run_block(block: Block, names: dict) -> None:
    """Write a block that is a file; run any other, Python with the names that earlier ones made."""
    if block.excuse or block.language in SHOWN:
        return
    if block.title and block.language in FILES:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.code, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.code, block.place, "exec"), names)
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
