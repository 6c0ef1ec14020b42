"""What makes a wrong input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.tasks import tiny


class Case(NamedTuple):
    """A call with something wrong in it.

    Attributes:
        what: What is wrong.
        told: What the error must say: what, where, and what to do.
        call: Keywords of the call, made in an empty folder; what is not among them is right.
        error: Type of the error.
        task: The task.
        trains: Whether it can be known only in training.
    """

    what: str
    told: tuple[str, ...]
    call: Callable[[Path], dict[str, Any]] | dict[str, Any]
    error: type[Exception] = ValueError
    task: str = "text-classification"
    trains: bool = False

    def keywords(self, folder: Path) -> dict[str, Any]:
        """The whole call."""
        given = dict(self.call(folder) if callable(self.call) else self.call)
        task = given.setdefault("task", self.task)
        known = task if task in tiny.TASKS else "text-classification"
        given.setdefault("max_steps", 2)
        if "base" not in given:
            given["base"] = tiny.make(known, 0)
        if "train" not in given:
            given["train"] = tiny.rows(known)
        if known == "question-answering" and "stride" not in given:
            given |= {"stride": 4, "maxlength": given.get("maxlength", 32)}
        return given


def rows(*changes: dict[str, Any] | Any, task: str = "text-classification") -> list[Any]:
    """Good rows, of which number 3 and those behind it are replaced; a dict changes a row."""
    found: list[Any] = tiny.rows(task)[:8]
    for number, change in enumerate(changes, 3):
        found[number] = {**found[number], **change} if isinstance(change, dict) else change
    return found


def labels(*values: Any) -> list[dict[str, Any]]:
    """Rows with these labels."""
    return [{"text": f"w{number} w1", "label": value} for number, value in enumerate(values)]
