"""What the README says about this repository is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tree_names_every_file_of_the_package_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\n(hflit/\n.*?)^```", text, re.M | re.S)
    named, folder = set(), ""
    for line in tree.splitlines():
        if line.endswith("/") or re.match(r" *\w+/ {2,}", line):
            folder = line.split("/")[0].strip()
        elif line.startswith("  ") and not line.startswith("    "):
            folder = "hflit"
        named |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py", line)}
    files = {f"{file.parent.name}/{file.name}" for file in ROOT.glob("hflit/**/*.py")}
    assert {name for name in named ^ files if not name.endswith("__init__.py")} == set()
