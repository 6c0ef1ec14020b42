"""`hflit verify-resume`: one line, and an exit status."""

from pathlib import Path

import pytest


def test_the_same_and_not_the_same(base, program, monkeypatch):
    words = [*base(), "--args.output_dir", "out", "--args.eval_strategy", "epoch"]
    status, out, err = program("verify-resume", *words, "--steps", "4", "--stop", "1")
    assert (status, err) == (0, "")
    assert out.startswith("The same to the bit: 4 updates, with and without a stop after update 1")
    assert not Path("out").exists()
    monkeypatch.setattr("hflit.data.batching.WindowLoader.__len__", lambda self: 3)
    monkeypatch.setattr("hflit.loop.resume.Checkpoint.place", lambda *_, **__: (0, 0))
    status, out, err = program("verify-resume", *words, "--steps", "4")
    assert status == 1
    assert out.startswith("Not the same: update 3: loss is ")


@pytest.mark.parametrize(
    ("word", "told"), [("x", "--steps=x is not a whole number."), ("1", "stop=0 must")]
)
def test_wrong_steps_are_an_error(base, program, word, told):
    status, _, err = program("verify-resume", *base(), "--steps", word)
    assert status == 2
    assert told in err
