"""One small run, through transformers and through hflit."""

import gc

import pytest

from tests.reference import ours, reference

SETTINGS = {
    "per_device_train_batch_size": 8,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="package", autouse=True)
def _quick_collection():
    """transformers collects garbage in each run; all that was imported need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def base(tiny_bert):
    """Make a one-layer BERT with dropout, and its tokenizer."""
    return lambda **config: tiny_bert(**{"dropout": 0.1, "num_hidden_layers": 1, **config})


@pytest.fixture
def rows(ragged_rows):
    """22 rows to train on and 9 to evaluate on, with a number that is not quite their length."""

    def sized(rows):
        return [{**row, "size": len(row["text"]) % 17} for row in rows]

    return sized(ragged_rows(22)), sized(ragged_rows(9, seed=1))


@pytest.fixture
def theirs(base, rows):
    """Run transformers with some arguments; `config` is of the model."""
    return lambda config=None, **given: reference(
        *base(**(config or {})), *rows, **{**SETTINGS, **given}
    )


@pytest.fixture
def mine(base, rows):
    """Run hflit with the same arguments."""
    return lambda config=None, **given: ours(
        *base(**(config or {})), *rows, **{**SETTINGS, **given}
    )
