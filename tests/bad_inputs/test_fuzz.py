"""Rows and arguments drawn at random: a call prepares a run, or says what is wrong with it.

The draws are the same in each run of the tests.
"""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hflit import HFTrainer
from hflit.arguments import DEFAULTS
from hflit.fields import DROPPED, GONE, PASSED, REFUSED, RENAMED, SHARED
from hflit.tasks import TASKS
from tests.tasks import tiny

CLEAR = (ValueError, TypeError, ImportError, FileNotFoundError, NotImplementedError)
# What Python and torch say when a value came too far.
UNCLEAR = (
    *("object has no attribute", "not supported between", "unsupported operand", "not iterable"),
    *("not subscriptable", "unexpected keyword", "positional argument", "unhashable"),
    *("NoneType", "index out of", "cannot be interpreted", "invalid literal", "must be real"),
)
BOUNDED = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

texts = st.one_of(
    st.sampled_from(["w1", "w1 w2 w3", "", " ", "w1 " * 90, "\x00", "é\ud7ff𝄞", "\u200b"]),
    st.text(max_size=8),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), texts,
    st.binary(max_size=3), st.dates(),
)  # fmt: skip
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
)
COLUMNS = {
    "text-classification": {
        "text": texts,
        "label": st.one_of(st.integers(0, 2), st.sampled_from(["a", "b"]), st.floats(0, 1)),
    },
    "question-answering": {
        "question": texts,
        "context": st.just("w1 w2 w3 w4"),
        "answers": st.one_of(
            st.sampled_from(["w2", ["w3"], None, {"text": ["w1"], "answer_start": [0]}]), values
        ),
    },
    "sequence-sequence": {
        "source": texts,
        "target": st.one_of(texts, st.lists(texts, max_size=2)),
    },
}


def row(columns):
    """A row, most of the time a right one: one value in ten is anything, or not there."""

    @st.composite
    def draw(pick):
        made = {}
        for name, right in columns.items():
            chance = pick(st.integers(0, 19))
            if chance:
                made[name] = pick(values if chance == 1 else right)
        return made

    return draw()


def prepared(**call):
    """Go through a call up to where training would begin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            HFTrainer()(**call)
        except Prepared:
            return
        except CLEAR as error:
            told = str(error)
    assert told.strip()
    assert not any(word in told for word in UNCLEAR), (told, call)


class Prepared(BaseException):
    """All is ready to train."""


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    def stop(*_):
        raise Prepared

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", stop)


@pytest.mark.parametrize("task", TASKS)
def test_rows(task):
    base = tiny.make(task, 0)
    columns = COLUMNS.get(task, {"text": texts})
    options = {"stride": 2} if task == "question-answering" else {}
    given_rows = st.lists(row(columns), max_size=6)

    @given(given_rows, st.one_of(st.none(), given_rows))
    @settings(BOUNDED, max_examples=20)
    def check(train, validation):
        prepared(base=base, train=train, validation=validation, task=task, maxlength=16,
                 cache=False, max_steps=1, **options)  # fmt: skip

    check()


# Those that start processes, change this one or the world outside.
LEFT_OUT = {
    *("output_dir", "push_to_hub", "report_to", "devices", "num_nodes", "strategy", "full_determ"),
    *("torch_compile", "deterministic", "resume_from_checkpoint", "log_level", "debug"),
}
NAMES = sorted(
    {*DEFAULTS, *RENAMED, *DROPPED, *GONE, *PASSED, *SHARED, *REFUSED}
    - {name for name in {*DEFAULTS, *PASSED, *RENAMED} if name.startswith(tuple(LEFT_OUT))}
)
OWN = ("columns", "maxlength", "stride", "task", "prefix", "metrics", "lora", "merge",
       "distillation", "tokenizebatch", "parity", "target_maxlength", "nonfinite", "checkpoint",
       "failed_save", "skip_misaligned", "whole_word", "tokenizers", "cache")  # fmt: skip


@given(st.dictionaries(st.sampled_from([*NAMES, *OWN]), values, min_size=1, max_size=2))
@settings(BOUNDED, max_examples=200)
def test_arguments(arguments):
    base = tiny.make("text-classification", 0)
    rows = tiny.rows("text-classification")[:4]
    prepared(**{"base": base, "train": rows, "cache": False, "max_steps": 1, **arguments})
