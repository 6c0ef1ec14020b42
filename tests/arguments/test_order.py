"""The order of the rows, and the loaders that bring them."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from hflit.arguments import Arguments
from hflit.data import data_module
from hflit.data.labels import Labels
from tests.arguments.conftest import SETTINGS
from tests.reference import assert_same_run, ours, reference_trainer


def make(tokenizer, rows, parity=False, **arguments):
    return data_module(
        rows,
        None,
        tokenization=Labels(tokenizer, ("text", None, "label"), 64),
        args=Arguments(**{**SETTINGS, **arguments}),
        parity=parity,
    )


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [list(rows) for rows in loader.sampler]


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
def test_strategies_give_the_batches_of_transformers(strategy, accumulation, theirs, mine):
    given = {
        "train_sampling_strategy": strategy,
        "gradient_accumulation_steps": accumulation,
        "eval_strategy": "epoch",
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    assert_same_run(mine(**given), theirs(**given))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_order_by_length_comes_from_seed_and_epoch(strategy, base, ragged_rows):
    tokenizer = base()[1]
    data = make(tokenizer, ragged_rows(64), train_sampling_strategy=strategy)
    data.setup()
    first = epoch_of(data)
    torch.manual_seed(1)  # the global random numbers have no part in it
    assert epoch_of(data) == first
    assert epoch_of(data, 1) != first
    data.args.seed = 7
    assert epoch_of(data) != first
    assert sorted(sum(first, [])) == list(range(64))
    lengths = data.lengths["train"]
    spread = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in first]
    if strategy == "group_by_length":
        assert sum(spread) / len(spread) < 13  # of lengths from 6 to 31


def test_length_column_decides_the_groups(base, rows):
    tokenizer = base()[1]
    given = {"train_sampling_strategy": "group_by_length"}
    for train in (rows[0], datasets.Dataset.from_list(rows[0])):
        data = make(tokenizer, train, length_column_name="size", **given)
        data.setup()
        assert data.lengths["train"] == [row["size"] for row in rows[0]]
    data = make(tokenizer, rows[0], length_column_name="width", **given)
    with pytest.raises(ValueError, match="Column 'width' is not in the training data"):
        data.setup()


def test_lengths_of_rows_that_become_more_are_refused(base, rows):
    data = make(base()[1], rows[0], train_sampling_strategy="group_by_length")
    data.setup()
    data.lengths["train"] = [1]
    with pytest.raises(ValueError, match="holds the lengths of 1 rows, which became 22"):
        data._measure("train")


def test_streams_have_no_lengths(base, rows):
    stream = datasets.Dataset.from_list(rows[0]).to_iterable_dataset()
    given = {"train_sampling_strategy": "group_by_length", "max_steps": 2}
    with pytest.raises(ValueError, match="needs the lengths of all rows"):
        ours(*base(), stream, None, **given)


@pytest.mark.parametrize(
    "given",
    [
        {
            "dataloader_num_workers": 2,
            "dataloader_persistent_workers": True,
            "dataloader_prefetch_factor": 3,
            "dataloader_multiprocessing_context": "fork",
        },
        {"dataloader_num_workers": 1, "dataloader_in_order": False},
        {"dataloader_pin_memory": False, "dataloader_drop_last": True},
        {"dataloader_pin_memory": True},
    ],
)
def test_loader_is_made_as_in_transformers(given, base, rows):
    given = {**SETTINGS, **given, "use_cpu": False}  # on a CPU memory is never pinned
    data = make(base()[1], rows[0], **given)
    data.setup()
    loader = data.train_dataloader().batches
    trainer = reference_trainer(*base(), rows[0], **given)
    expected = trainer.get_train_dataloader()
    assert isinstance(loader, DataLoader)
    names = ["num_workers", "persistent_workers", "prefetch_factor", "in_order", "pin_memory"]
    for name in names:
        assert getattr(loader, name) == getattr(expected, name), name
    contexts = [loader.multiprocessing_context, expected.multiprocessing_context]
    assert [getattr(each, "_name", each) for each in contexts] == (
        [given.get("dataloader_multiprocessing_context")] * 2
    )
    assert len(loader) == len(expected)


def test_workers_bring_the_same_batches(theirs, mine):
    given = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    assert_same_run(mine(**given), theirs(**given))
