"""The same rows in every kind of container give the same batches; what is none is refused."""

from collections import UserDict

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import DataCollatorWithPadding

from hflit.arguments import Arguments
from hflit.data import DatasetModule, FrameModule, Labels, RowsModule, data_module

MAXLENGTH = 12  # cuts some rows, so that cutting is compared too


@pytest.fixture
def opened(tiny_bert):
    """A data module that has read its data and tokenized them in memory."""
    _, tokenizer = tiny_bert()

    def opened(train, validation=None, columns=None, **arguments):
        arguments = {"per_device_train_batch_size": 3, "use_cpu": True, **arguments}
        tokenization = Labels(tokenizer, columns, MAXLENGTH)
        module = data_module(
            train, validation, tokenization=tokenization, args=Arguments(**arguments), cache=False
        )
        module.setup()
        return module

    return opened


def batches(module, epoch=0):
    loader = module.train_dataloader()
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    return [batch for window in loader for batch in window]


def reference(rows, tokenizer, size=3):
    """Batches of the rows in their order, made by transformers alone."""
    collate = DataCollatorWithPadding(tokenizer)
    encoded = [
        {**tokenizer(row["text"], truncation=True, max_length=MAXLENGTH), "labels": row["label"]}
        for row in rows
    ]
    return [collate(encoded[start : start + size]) for start in range(0, len(rows), size)]


def assert_identical(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for name, tensor in other.items():
            assert one[name].dtype == tensor.dtype
            assert torch.equal(one[name], tensor), name


class Column:
    """Can be read from front to back, and knows its different values."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def unique(self):
        return list(dict.fromkeys(self.values))


class LookAlike:
    """The least that passes for a DataFrame."""

    def __init__(self, rows):
        self.rows = rows
        self.columns = list(rows[0])

    def __getitem__(self, name):
        return Column([row[name] for row in self.rows])


class Map(torch.utils.data.Dataset):
    """A torch data set without `__iter__` that never raises IndexError."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


class DuckMap:
    """The same, without torch's base class."""

    __init__, __len__, __getitem__ = Map.__init__, Map.__len__, Map.__getitem__


class Iterable(torch.utils.data.IterableDataset):
    """A torch data set to iterate over."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class SizedIterable(Iterable):
    """One that knows its length, and still has no `__getitem__` of its own."""

    def __len__(self):
        return len(self.rows)


def shuffled(rows):
    """A shuffled `Dataset`, selected back into the order of the rows."""
    mixed = datasets.Dataset.from_list([{**r, "place": i} for i, r in enumerate(rows)]).shuffle(0)
    assert mixed["place"][:] != list(range(len(rows)))
    selected = mixed.select(np.argsort(mixed["place"][:]))
    assert selected._indices is not None  # the indices mapping this is about
    return selected


def transformed(rows):
    """A `Dataset` whose texts only come to be when its rows are read."""
    stored = datasets.Dataset.from_list([{**row, "text": row["text"][::-1]} for row in rows])
    return stored.with_transform(
        lambda batch: {"text": [text[::-1] for text in batch["text"]], "label": batch["label"]}
    )


def dataset(rows):
    return datasets.Dataset.from_list(rows)


KINDS = {
    "Dataset": dataset,
    "Dataset with more columns": lambda rows: dataset([{"id": "x", **row} for row in rows]),
    "Dataset, shuffled and selected": shuffled,
    "Dataset in torch format": lambda rows: dataset(rows).with_format("torch"),
    "Dataset in numpy format": lambda rows: dataset(rows).with_format("numpy"),
    "Dataset showing one column": lambda rows: dataset(rows).with_format("pandas", ["label"]),
    "Dataset with a transform": transformed,
    "Dataset from polars": lambda rows: datasets.Dataset.from_polars(pl.DataFrame(rows)),
    "DatasetDict": lambda rows: datasets.DatasetDict(
        {"test": dataset(rows[::-1]), "train": dataset(rows)}
    ),
    "DatasetDict of one": lambda rows: datasets.DatasetDict({"all": dataset(rows)}),
    "pandas": pd.DataFrame,
    "pandas, index out of order": lambda rows: pd.DataFrame(rows, index=range(len(rows), 0, -1)),
    "pandas, nullable types": lambda rows: pd.DataFrame(rows).convert_dtypes(),
    "polars": pl.DataFrame,
    "look-alike": LookAlike,
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "list of mappings": lambda rows: [UserDict(row) for row in rows],
    "list of numpy scalars": lambda rows: [{**row, "label": np.int8(row["label"])} for row in rows],
    "list of tensors": lambda rows: [{**r, "label": torch.tensor(r["label"])} for r in rows],
    "torch Dataset": Map,
    "look-alike of a torch Dataset": DuckMap,
    "torch IterableDataset": Iterable,
    "torch IterableDataset with a length": SizedIterable,
}
STREAMS = {
    "IterableDataset": lambda rows: dataset(rows).to_iterable_dataset(),
    "IterableDataset in torch format": lambda rows: (
        dataset(rows).to_iterable_dataset().with_format("torch")
    ),
    "IterableDataset of unknown columns": lambda rows: datasets.IterableDataset.from_generator(
        lambda: iter(rows)
    ),
    "IterableDatasetDict": lambda rows: datasets.IterableDatasetDict(
        {"train": dataset(rows).to_iterable_dataset()}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_16_every_kind_of_data_gives_the_same_batches(kind, opened, tiny_bert, ragged_rows):
    """Generators and DatasetDicts were bare TypeErrors; the rest must agree bit by bit."""
    rows = ragged_rows(20)
    module = opened(KINDS[kind](rows), train_sampling_strategy="sequential")
    assert_identical(batches(module), reference(rows, tiny_bert()[1]))


@pytest.mark.parametrize("kind", STREAMS)
def test_16_streams_give_the_same_batches(kind, opened, tiny_bert, ragged_rows):
    """`unique` and `num_proc` failed on an IterableDataset."""
    rows = ragged_rows(20)
    module = opened(STREAMS[kind](rows), max_steps=7)
    assert_identical(batches(module), reference(rows, tiny_bert()[1]))


@pytest.mark.parametrize("labels", [[0.5, 2.0, 3.0], [[1, 0], [0, 1], [1, 1]]])
def test_streams_give_the_label_types_that_losses_take(labels, opened):
    # Python floats of a stream became float64, which no float32 loss can go back through.
    rows = [{"text": "w1", "label": label} for label in labels]
    (batch,) = batches(opened(dataset(rows).to_iterable_dataset(), max_steps=1))
    assert torch.equal(batch["labels"], torch.tensor(labels, dtype=torch.float32))
    assert batch["labels"].dtype == torch.float32


def test_shuffled_batches_agree_between_kinds(opened, ragged_rows):
    rows = ragged_rows(20)
    for epoch in (0, 1):
        first, *others = (
            batches(opened(kind(rows)), epoch) for kind in (list, dataset, shuffled, pd.DataFrame)
        )
        for other in others:
            assert_identical(other, first)


@pytest.mark.parametrize(
    ("data", "module"),
    [
        (datasets.Dataset.from_list([{"a": 1}]), DatasetModule),
        (pd.DataFrame([{"a": 1}]), FrameModule),
        (pl.DataFrame([{"a": 1}]), FrameModule),
        ([{"a": 1}], RowsModule),
    ],
)
def test_a_kind_has_its_own_module(data, module, opened, tiny_bert):
    made = data_module(data, tokenization=Labels(tiny_bert()[1]), args=Arguments())
    assert type(made) is module


# Splits.


@pytest.fixture
def validation_texts(opened):
    """The validation texts that a module has read."""

    def texts(train, validation):
        return opened(train, validation).rows["validation"]["text"][:]

    return texts


def split(text, labels=(0, 1)):
    return dataset([{"text": text, "label": label} for label in labels])


SPLITS = {"train": split("w1"), "dev": split("w2"), "test": split("w3")}


def test_a_named_split_validates(validation_texts):
    assert validation_texts(datasets.DatasetDict(SPLITS), "test") == ["w3", "w3"]


def test_the_validation_split_of_a_dict_is_guessed(validation_texts):
    assert validation_texts([*SPLITS["train"]], datasets.DatasetDict(SPLITS)) == ["w2", "w2"]


def test_validation_may_be_of_another_kind(validation_texts):
    frame = pd.DataFrame([*SPLITS["dev"]])
    assert validation_texts(SPLITS["train"], frame) == ["w2", "w2"]
    assert validation_texts(frame, SPLITS["train"]) == ["w1", "w1"]
    assert validation_texts(frame, (row for row in SPLITS["test"])) == ["w3", "w3"]


def test_a_dict_without_a_validation_request_is_not_evaluated(opened):
    assert opened(datasets.DatasetDict(SPLITS)).val_dataloader() == []


def test_an_unknown_split_lists_those_there_are(opened):
    with pytest.raises(ValueError, match="'tset' is not a split.*'train', 'dev', 'test'"):
        opened(datasets.DatasetDict(SPLITS), "tset")
    with pytest.raises(FileNotFoundError, match="'test' is no file, no folder, and no data set"):
        opened([*SPLITS["train"]], "test")
    with pytest.raises(ValueError, match="None of the splits 'a', 'b' looks like training data"):
        opened(datasets.DatasetDict({"a": split("w1"), "b": split("w2")}))
    with pytest.raises(ValueError, match="None of the splits 'train' looks like validation data"):
        opened(split("w1"), datasets.DatasetDict({"train": split("w2")}))


def test_a_stream_needs_max_steps(opened, ragged_rows):
    with pytest.raises(ValueError, match="max_steps must be set"):
        opened(dataset(ragged_rows(4)).to_iterable_dataset())


# What is wrong with the data, and where.


def test_no_more_of_a_stream_is_tokenized_than_a_run_needs(opened):
    given = [{"text": f"w{n}", "label": n % 2} for n in range(20)]
    stream = dataset([*given, {"text": "w1", "label": 7}]).to_iterable_dataset()
    module = opened(stream, max_steps=2, per_device_train_batch_size=3)
    batches = iter(module.train_dataloader())
    assert len([next(batches), next(batches)]) == 2


def test_11_ragged_dicts_keep_every_label_at_its_row(opened):
    """Any row lacking a key moved all later values up: w3 got the label of w2."""
    rows = [
        {"text": "w0", "label": 0},
        {"label": 1},
        {"text": "w2", "label": 1},
        {"text": "w3", "label": 0},
    ]
    with pytest.raises(ValueError, match="Row 1 of the training data has no text in 'text'"):
        opened(rows)

    # Where no text is missing, keys in another order and keys to ignore change nothing.
    rows[1] = {"label": 1, "id": 7, "text": "w1"}
    module = opened(rows, train_sampling_strategy="sequential")
    tokens = module.tokens["train"]
    assert tokens["input_ids"][:] == [[2, 5 + word, 3] for word in range(4)]  # w0 is token 5
    assert tokens["labels"][:] == [0, 1, 1, 0]

    with pytest.raises(ValueError, match="Row 2 of the training data has no label in 'label'"):
        opened([{"text": "w0", "label": 0}, {"text": "w1", "label": 1}, {"text": "w2"}])


CONTAINERS = {
    "list": list,
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "Dataset": dataset,
    "stream": STREAMS["IterableDataset"],
    "stream of unknown columns": STREAMS["IterableDataset of unknown columns"],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_missing_column_lists_those_found(container, opened):
    data = CONTAINERS[container]([{"body": "w1", "stars": 1}, {"body": "w2", "stars": 2}])
    steps = {"max_steps": 1} if "stream" in container else {}
    message = "Column 'text' is not in the training data, which has 'body', 'stars'"
    with pytest.raises(ValueError, match=message):
        opened(data, columns=("text", "stars"), **steps)
    with pytest.raises(ValueError, match="'label' is not in the validation data.*has 'text'"):
        opened([*split("w1")], [{"text": "w1"}])


@pytest.mark.parametrize("container", list(CONTAINERS)[:4])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_09_a_missing_text_is_named_by_row(container, value, opened):
    """A None text in a DataFrame was `TextEncodeInput must be ...`, without the row."""
    if container in ("polars", "Dataset") and value is not None:
        pytest.skip("cannot hold NaN among strings")
    rows = [{"text": "w1", "label": 0}, {"text": "w2", "label": 1}, {"text": value, "label": 1}]
    with pytest.raises(ValueError, match="Row 2 of the training data has no text in 'text'"):
        opened(CONTAINERS[container](rows))
    with pytest.raises(ValueError, match="Row 2 of the validation data has no text in 'text'"):
        opened([*split("w1")], CONTAINERS[container](rows))
    paired = [{**row, "more": row["text"], "text": "w1"} for row in rows]
    with pytest.raises(ValueError, match="Row 2 of the training data has no text in 'more'"):
        opened(CONTAINERS[container](paired), columns=("text", "more", "label"))


def test_rows_are_counted_through_all_tables(opened, monkeypatch):
    # Data are looked through table by table, and datasets stores chunks: rows count from the first.
    monkeypatch.setattr("hflit.data.tokenization.SCAN_ROWS", 4)
    rows = [{"text": "w1", "label": index % 2} for index in range(11)]
    rows[9]["text"] = None
    pieces = datasets.concatenate_datasets([dataset(rows[:3]), dataset(rows[3:])])
    for data in (rows, pieces, pieces.select([*range(11)][::-1]).select([*range(11)][::-1])):
        with pytest.raises(ValueError, match="Row 9 of"):
            opened(data)


EMPTY = {
    "list": list,
    "generator": lambda: (row for row in ()),
    "pandas": lambda: pd.DataFrame({"text": [], "label": []}),
    "pandas, no columns": pd.DataFrame,
    "polars": lambda: pl.DataFrame({"text": [], "label": []}),
    "Dataset": lambda: datasets.Dataset.from_dict({"text": [], "label": []}),
    "Dataset, no columns": lambda: dataset([]),
    "torch Dataset": lambda: Map([]),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_16_empty_data_are_said_to_be_empty(kind, opened):
    """An empty list was an IndexError, `validation=[]` a KeyError for 'text'."""
    with pytest.raises(ValueError, match="The training data has no rows"):
        opened(EMPTY[kind]())
    with pytest.raises(ValueError, match="The validation data has no rows"):
        opened([*split("w1")], EMPTY[kind]())


def test_an_empty_stream_is_said_to_be_empty(opened):
    for kind in STREAMS:
        with pytest.raises(ValueError, match="The training data has no rows"):
            opened(STREAMS[kind](SPLITS["train"]).filter(lambda row: False), max_steps=1)


@pytest.mark.parametrize("data", [b"x", {"text": ["a"]}, None, 3, object(), pa.table({})])
def test_what_is_no_data_is_refused_by_kind(data, opened):
    with pytest.raises(TypeError, match=f"train is {type(data).__name__}. Pass a datasets.Dataset"):
        opened(data)


def test_validation_that_is_no_data_is_refused_by_kind(opened):
    with pytest.raises(TypeError, match="validation is dict. Pass a datasets.Dataset"):
        opened([*split("w1")], {"text": ["w1"]})


@pytest.mark.parametrize("row", ["w1", ("w1", 0), ["w1", 0], None, 3])
def test_rows_that_are_no_dicts_are_named(row, opened):
    message = f"Row 1 of the training data is {type(row).__name__}, not a dict"
    with pytest.raises(TypeError, match=message):
        opened([{"text": "w1", "label": 0}, row])


def test_mixed_kinds_are_named_by_row(opened):
    with pytest.raises(ValueError, match="Column 'label'.*row 2 holds 'a' and earlier rows hold 0"):
        opened([{"text": "w1", "label": label} for label in (0, 1, "a", "b")])
    with pytest.raises(ValueError, match="Column 'text'.*row 1 holds 4 and earlier rows hold 'w1'"):
        opened([{"text": text, "label": 0} for text in ("w1", 4)])
    with pytest.raises(ValueError, match="Column 'label'.*row 1 holds True"):
        opened(pd.DataFrame({"text": ["w1", "w2"], "label": [0, True]}, dtype=object))


def test_texts_that_are_no_strings_are_refused(opened):
    for text in (3, ["w1", "w2"], {"en": "w1"}, b"w1"):
        with pytest.raises(ValueError, match="Column 'text' .* not text: row 0 is"):
            opened([{"text": text, "label": label} for label in (0, 1)])


def test_two_columns_of_one_name_are_refused(opened):
    # pandas gives a frame for such a name; its column names were then taken for texts.
    frame = pd.DataFrame([["w1", "w2", 0], ["w3", "w4", 1]], columns=["text", "text", "label"])
    with pytest.raises(ValueError, match="more than one column 'text'"):
        opened(frame)


LISTS = [{"text": f"w{i}", "label": ["a", "b"][: i % 3]} for i in range(6)]
SCORES = [{"text": f"w{i}", "label": i / 2 if i % 2 else i} for i in range(6)]
TENSORS = [{"text": f"w{i}", "label": torch.tensor(i % 2)} for i in range(6)]


@pytest.mark.parametrize("way", ["from_generator", "map"])
@pytest.mark.parametrize("data", [LISTS, SCORES, TENSORS], ids=["lists", "scores", "tensors"])
def test_a_stream_of_rows_of_python_is_read_as_a_list_is(data, way, opened):
    """Once Arrow found empty lists, and whole scores, to be columns of another kind."""
    stream = datasets.IterableDataset.from_generator(lambda: iter(data))
    if way == "map":
        numbers = datasets.IterableDataset.from_generator(lambda: ({"row": i} for i in range(6)))
        stream = numbers.map(lambda row: data[row["row"]], remove_columns=["row"])
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    assert_identical(batches(opened(stream, **options)), batches(opened(data, **options)))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": None, "label": 1}, "Row 3 of the training data has no text in 'text'"),
        ({"text": "w1", "label": None}, "Row 3 of the training data has no label in 'label'"),
        ({"label": 1}, "Row 3 of the training data has no 'text'"),
        ({"text": "w1", "label": "x"}, "mixes kinds: row 3 holds 'x' and earlier rows hold 0"),
    ],
)
def test_a_wrong_row_of_a_stream_is_told_by_its_number(row, told, opened):
    data = [*({"text": "w1", "label": i} for i in (0, 1, 0)), row]
    with pytest.raises(ValueError, match=told):
        opened(datasets.IterableDataset.from_generator(lambda: iter(data)), max_steps=2)
