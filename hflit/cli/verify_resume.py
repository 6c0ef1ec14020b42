"""`hflit verify-resume`: whether a stopped run goes on bit for bit, tried on the run itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hflit.cli.fit import read_call
from hflit.verify import verify_resume

ABOUT = (
    "Train a few updates of a run, stop, resume, and compare with the same updates without a stop. "
    "--steps N: how many updates (8). --stop N: after which to stop (the middle). Nothing is left "
    "behind; the exit status is 1 at a difference."
)


def run(command: str, argv: Sequence[str]) -> int:
    """Try it, and print the first difference."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stop", type=int, default=None)
    try:
        own, words = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    _, _, call = read_call(command, ABOUT, words, ("model.base", "data.train"))
    difference = verify_resume(own.steps, own.stop, **call)
    if difference is not None:
        print(f"Not the same: {difference}.")
        return 1
    print(
        f"The same to the bit: {own.steps} updates, with and without a stop after update "
        f"{own.stop or own.steps // 2}: losses, learning rates, gradient norms and final weights."
    )
    return 0
