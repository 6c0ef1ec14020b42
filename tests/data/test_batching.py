"""Order, padding and windows, against accelerate and transformers."""

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, set_seed

from hflit import HFTrainer
from hflit.data.batching import BatchOrder, Collator, TokenRows, WindowLoader


def accelerate_batches(rows, size, seed, drop_last, epochs, data_seed=None):
    """Row numbers of each batch of each epoch, from the loader transformers.Trainer reads."""
    set_seed(seed)
    loader = prepare_data_loader(
        DataLoader(torch.arange(rows), batch_size=size, shuffle=True, drop_last=drop_last),
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=data_seed,
    )
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found.append([batch.tolist() for batch in loader])
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(17, 4), (16, 4), (3, 8), (1, 1), (1000, 7)])
def test_order_is_accelerates(rows, size, drop_last):
    order = BatchOrder(rows, size, seed=42, drop_last=drop_last)
    expected = accelerate_batches(rows, size, 42, drop_last, epochs=4)
    for epoch in range(4):
        order.set_epoch(epoch)
        assert list(order) == list(order) == expected[epoch]  # reading it changes nothing
        assert len(order) == len(expected[epoch])
    assert len({str(batches) for batches in expected}) > 1 or rows <= size or drop_last


def test_order_follows_a_seed_for_data():
    expected = accelerate_batches(20, 4, seed=1, drop_last=False, epochs=2, data_seed=7)
    order = BatchOrder(20, 4, seed=7)
    for epoch in range(2):
        order.set_epoch(epoch)
        assert list(order) == expected[epoch]


def test_order_does_not_touch_the_global_random_numbers():
    state = torch.get_rng_state()
    list(BatchOrder(20, 4, seed=7))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_seed_keeps_the_order_of_the_rows():
    order = BatchOrder(5, 2)
    assert list(order) == [[0, 1], [2, 3], [4]]
    order.set_epoch(3)
    assert list(order) == [[0, 1], [2, 3], [4]]
    assert list(BatchOrder(5, 2, drop_last=True)) == [[0, 1], [2, 3]]
    assert (len(order), len(BatchOrder(5, 2, drop_last=True))) == (3, 2)


# Padding.


def tokenized(tokenizer, rows, pairs):
    labels = [index % 2 for index in range(len(rows))]
    texts = [row["text"] for row in rows]
    given = (texts, texts[::-1]) if pairs else (texts,)
    encoded = tokenizer(*given)
    return [
        {**{name: encoded[name][index] for name in encoded}, "labels": label}
        for index, label in enumerate(labels)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_padding_is_transformers(side, pairs, tiny_bert, ragged_rows):
    _, tokenizer = tiny_bert()
    tokenizer.padding_side = side
    tokenizer.pad_token = "w99"  # an id that is not 0
    rows = tokenized(tokenizer, ragged_rows(9), pairs)
    assert "token_type_ids" in rows[0]
    assert len({len(row["input_ids"]) for row in rows}) > 3
    expected = DataCollatorWithPadding(tokenizer)(rows)

    padding = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }
    stored = [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows]
    small = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "token_type_ids": datasets.List(datasets.Value("int8")),
            "labels": datasets.Value("int64"),
        }
    )
    table = TokenRows(datasets.Dataset.from_list(stored, features=small))
    collate = Collator(padding, side)
    for found in (
        collate(table.__getitems__(list(range(9)))),  # data sets
        collate(stored),  # streams
        collate(rows),  # a mask that is there already
    ):
        assert set(found) == set(expected)
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name]), name


def test_rows_of_a_batch_may_lie_anywhere():
    rows = datasets.Dataset.from_dict({"input_ids": [[1], [2, 2], [3, 3, 3]], "labels": [0, 1, 2]})
    rows = datasets.concatenate_datasets([rows, rows.select([2, 0])])  # chunks and an index
    batch = Collator({"input_ids": 9})(TokenRows(rows).__getitems__([4, 1, 1, 3]))
    assert batch["input_ids"].tolist() == [[1, 9, 9], [2, 2, 9], [2, 2, 9], [3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1, 1, 2]


def test_labels_of_several_classes_are_not_padded():
    rows = [
        {"input_ids": [1, 2], "labels": [1.0, 0.0, 1.0]},
        {"input_ids": [1], "labels": [0.0] * 3},
    ]
    batch = Collator({"input_ids": 9}, "left")(rows)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert batch["input_ids"].tolist() == [[1, 2], [9, 1]]


def test_batches_own_their_memory():
    rows = datasets.Dataset.from_dict({"input_ids": [[1], [2]], "labels": [0.5, 1.5]})
    table = TokenRows(rows).__getitems__([0, 1])
    first, second = (Collator({})(table) for _ in range(2))
    first["labels"].add_(1)
    first["input_ids"].add_(1)
    assert second["labels"].tolist() == [0.5, 1.5]
    assert Collator({})(table)["input_ids"].tolist() == [[1], [2]]


# Windows.


def loader(rows, size, **options):
    data = datasets.Dataset.from_dict({"input_ids": [[n] for n in range(rows)]})
    order = BatchOrder(rows, size, **options)
    return DataLoader(TokenRows(data), batch_sampler=order, collate_fn=Collator({}))


@pytest.mark.parametrize(
    ("rows", "size", "accumulation", "windows"),
    [  # micro-batches in each window: ceil(rows / size) in all
        (12, 2, 1, [1, 1, 1, 1, 1, 1]),
        (12, 2, 3, [3, 3]),
        (13, 2, 3, [3, 3, 1]),
        (9, 2, 4, [4, 1]),
        (3, 2, 4, [2]),
        (1, 2, 1, [1]),
    ],
)
def test_the_last_window_may_be_shorter(rows, size, accumulation, windows):
    made = WindowLoader(loader(rows, size), accumulation)
    found = list(made)
    assert len(made) == len(windows)
    assert [len(window) for window in found] == windows
    flat = [
        row for window in found for batch in window for row in batch["input_ids"][:, 0].tolist()
    ]
    assert flat == list(range(rows))


def test_windows_follow_the_order_of_the_epoch():
    made = WindowLoader(loader(10, 3, seed=5), 2)
    for epoch in range(3):
        made.sampler.set_epoch(epoch)  # as Lightning does
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        flat = [i for window in made for batch in window for i in batch["input_ids"][:, 0].tolist()]
        assert flat == order


def test_a_stream_has_no_number_of_windows():
    stream = datasets.Dataset.from_dict({"input_ids": [[1]] * 5}).to_iterable_dataset()
    made = WindowLoader(DataLoader(stream, batch_size=2, collate_fn=Collator({})), 2)
    with pytest.raises(TypeError):
        len(made)
    assert [len(window) for window in made] == [2, 1]


def test_opening_a_window_loader_draws_no_random_numbers():
    # Lightning opens a loader once more than it reads it; a DataLoader draws a seed each time.
    made = WindowLoader(loader(10, 2))
    state = torch.get_rng_state()
    iter(made)
    assert torch.equal(torch.get_rng_state(), state)
    next(iter(made))
    assert not torch.equal(torch.get_rng_state(), state)


def test_one_batch_is_fetched_ahead_as_in_accelerate():
    # Where collating draws random numbers, the training step must find the stream of accelerate.
    def order_of(make):
        seen = []

        def collate(rows):
            seen.append("fetched")
            return {"input_ids": torch.zeros(1, 1)}

        for _ in make(DataLoader(range(3), batch_size=1, collate_fn=collate)):
            seen.append("used")
        return seen

    theirs = order_of(
        lambda data: prepare_data_loader(
            data, torch.device("cpu"), 1, process_index=0, put_on_device=False
        )
    )
    assert order_of(WindowLoader) == theirs


def test_skipped_batches_are_never_read():
    """The rest of the epoch is the same, with the same seeds, and the next epoch is whole."""
    read = []

    class Rows(torch.utils.data.Dataset):
        def __getitems__(self, numbers):
            read.append((list(numbers), numbers.seed))
            return [{"input_ids": [number]} for number in numbers]

    def windows(start):
        read.clear()
        order = BatchOrder(21, 2, seed=5, draws=7)
        made = WindowLoader(DataLoader(Rows(), batch_sampler=order, collate_fn=list), 2, start)
        epochs = []
        for epoch in range(start[0], 3):
            order.set_epoch(epoch)
            epochs.append(list(made))
        return epochs, list(read)

    whole, all_read = windows((0, 0))
    rest, rest_read = windows((1, 3))
    assert rest == [whole[1][3:], whole[2]]
    assert rest_read == all_read[11 + 6 :]  # 11 batches an epoch, 2 in a window


def test_a_stream_skips_windows_of_its_first_epoch():
    stream = datasets.Dataset.from_dict(
        {"input_ids": [[n] for n in range(7)]}
    ).to_iterable_dataset()
    made = WindowLoader(DataLoader(stream, batch_size=1, collate_fn=Collator({})), 2, (1, 2))
    firsts = [[window[0]["input_ids"].item() for window in made] for _ in range(2)]
    assert firsts == [[4, 6], [0, 2, 4, 6]]


def test_a_stream_without_a_batch_ends_the_run(tiny_bert, ragged_rows):
    """It once was read again and again, for ever."""
    stream = datasets.Dataset.from_list(ragged_rows(5)).to_iterable_dataset()
    with pytest.raises(ValueError, match="Pass 1 .* gave no batch: see dataloader_drop_last"):
        HFTrainer()(tiny_bert(), stream, dataloader_drop_last=True, max_steps=3)


def test_masks_of_a_stream_differ_by_batch_and_epoch():
    seeds = []
    collator = Collator({}, finish=lambda batch, seed: seeds.append(seed), draws=3)
    stream = datasets.Dataset.from_dict({"input_ids": [[1]] * 4}).to_iterable_dataset()
    made = WindowLoader(DataLoader(stream, batch_size=1, collate_fn=collator))
    for _ in range(2):
        list(made)
    again, seeds[:] = list(seeds), []
    list(WindowLoader(DataLoader(stream, batch_size=1, collate_fn=collator), start=(1, 2)))
    assert len(set(again)) == 8
    assert seeds == again[4:]  # read and dropped, so the rest keeps its own
