"""`hflit verify-resume`: whether a stopped run goes on bit for bit, tried on the run itself."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from hflit.cli.fit import read_call
from hflit.verify import verify_resume

ABOUT = (
    "Train a few updates of a run, stop, resume, and compare with the same updates without a stop. "
    "Nothing is left behind; the exit status is 1 at a difference."
)


def run(command: str, argv: Sequence[str]) -> int:
    """Try it, and print the first difference."""
    needed = ("model.base", "data.train")
    _, config, call = read_call(command, ABOUT, argv, needed, _add_options)
    steps, stop = config.get("steps", 8), config.get("stop")
    difference = verify_resume(steps, stop, **call)
    if difference is not None:
        print(f"Not the same: {difference}.")
        return 1
    print(
        f"The same to the bit: {steps} updates, with and without a stop after update "
        f"{stop or steps // 2}: losses, learning rates, gradient norms and final weights."
    )
    return 0


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=8, help="Updates of the whole run.")
    parser.add_argument("--stop", type=int | None, help="Update to stop after; by default half.")
