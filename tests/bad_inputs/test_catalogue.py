"""Each wrong input of the catalogue ends in one clear error, and changes no file."""

import hashlib

import pytest

from hflit import HFTrainer
from tests.bad_inputs import calls, data, files

CASES = [*data.CASES, *calls.CASES, *files.CASES]


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Started(Exception):
    """Training began."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}: {case.what}")
def test_a_wrong_input_is_one_clear_error(case, tmp_path, monkeypatch):
    given = case.keywords(tmp_path)
    before = digest(tmp_path)

    def start(*_):
        raise Started

    if not case.trains:
        monkeypatch.setattr("lightning.pytorch.Trainer.fit", start)
    base, train = given.pop("base"), given.pop("train")
    with pytest.raises(case.error) as raised:
        HFTrainer()(base, train, **given)
    message = str(raised.value.args[0] if case.error is KeyError else raised.value)
    assert type(raised.value) is case.error
    for part in case.told:
        assert part in message
    assert len(message) < 700
    assert message.rstrip()[-1] in ".?"
    assert digest(tmp_path) == before
