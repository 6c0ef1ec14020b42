"""Makes docs/arguments.md: `python -m tests.arguments.documentation`."""

from dataclasses import MISSING, fields
from pathlib import Path

from hflit.arguments import Arguments
from hflit.fields import FIELDS
from tests.arguments.coverage import COVERAGE

PATH = Path(__file__).parents[2] / "docs" / "arguments.md"
HEAD = """# Arguments

Each of the {count} fields of `transformers.TrainingArguments` is a keyword of the call. For each
one a test set the value in the third column and saw the effect in the fourth; the last column says
whether `transformers.Trainer` did the same in the same test. This page is made from the tables that
hflit and its tests work from; `make test` fails when it is out of date.

| argument | what hflit does with it | tried | seen | same in transformers |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The page."""
    # Without those that depend on the machine.
    fixed = {f.name: f.default for f in fields(Arguments) if f.default is not MISSING}
    rows = []
    for name, row in COVERAGE.items():
        default = f" = {_shown(fixed[name])}" if fixed.get(name) is not None else ""
        beside = {key: value for key, value in row.beside.items() if not callable(value)}
        tried = ", ".join(_shown(each) for each in (row.value, *([beside] if beside else [])))
        tried = tried.replace(", `{", " with `{")
        cells = (f"`{name}`{default}", FIELDS[name].how, tried, row.effect, row.same)
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD.format(count=len(FIELDS)) + "\n".join(rows) + "\n"


def _shown(value: object) -> str:
    value = getattr(value, "value", value)  # of enums
    shown = f"{type(value).__name__}()" if " at 0x" in repr(value) else repr(value)
    return f"`{shown}`"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text())
