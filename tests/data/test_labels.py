"""Labels of every kind -> the classes they mean, their names and the numbers the loss takes."""

import copy
import json
from datetime import date
from decimal import Decimal
from enum import Enum

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from transformers import AutoConfig

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.data import Labels, data_module

REGRESSION = "regression"
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
COLUMNS = ("text", "label")


def rows(labels, column="label"):
    return [{"text": f"w{index}", column: label} for index, label in enumerate(labels)]


def declared(labels, names, several=False):
    """A `Dataset` whose label column declares the names of its classes."""
    label = datasets.ClassLabel(names=names)
    features = {
        "text": datasets.Value("string"),
        "label": datasets.List(label) if several else label,
    }
    return datasets.Dataset.from_list(rows(labels), features=datasets.Features(features))


@pytest.fixture
def found(tiny_bert):
    """What training labels become: the kind of problem, the names by class, the encoded labels."""
    _, tokenizer = tiny_bert()

    def found(train, validation=None, head=None, columns=COLUMNS, **arguments):
        train, validation = (
            rows(data) if isinstance(data, list) and not isinstance(data[0], dict) else data
            for data in (train, validation)
        )
        tokenization = Labels(tokenizer, columns, 16, head)
        module = data_module(
            train,
            validation,
            tokenization=tokenization,
            args=Arguments(use_cpu=True, **arguments),
            cache=False,
        )
        module.setup()
        changes = tokenization.config_changes(None)
        names = changes["id2label"]
        assert list(names) == list(range(len(names)))
        assert changes["label2id"] == {name: index for index, name in names.items()}
        split = "train" if validation is None else "validation"
        labels = module.tokens[split]["labels"][:] if not arguments else None
        return changes["problem_type"], list(names.values()), labels

    return found


GENERIC = ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_ints_from_zero_are_the_classes(found):
    assert found([2, 0, 1, 0]) == (SINGLE, GENERIC, [2, 0, 1, 0])


def test_01_string_labels(found):
    """`len("neg")` was taken for a width of three labels, then no tensor could be made."""
    expected = (SINGLE, ["neg", "pos"], [1, 0, 1])  # classes in sorted order
    assert found(["pos", "neg", "pos"]) == expected
    assert found(pd.DataFrame(rows(["pos", "neg", "pos"]))) == expected
    frame = pd.DataFrame(rows(["pos", "neg", "pos"]))
    assert found(frame.astype({"label": "category"})) == expected
    assert found(pl.DataFrame(rows(["pos", "neg", "pos"]))) == expected
    assert found(np.array(["pos", "neg", "pos"]).tolist()) == expected


def test_strings_of_digits_are_names(found):
    assert found(["10", "9", "10"]) == (SINGLE, ["10", "9"], [0, 1, 0])


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([0, 2, 0], ["0", "2"], [0, 1, 0]),
        ([2, 1, 2], ["1", "2"], [1, 0, 1]),
        ([5, 1, 3], ["1", "3", "5"], [2, 0, 1]),
        ([-1, 1, -1], ["-1", "1"], [0, 1, 0]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),  # in the order of numbers, not of their names
        ([2**40, 0, 7], ["0", "7", str(2**40)], [2, 0, 1]),
    ],
)
def test_02_gaps_and_counting_from_one(labels, names, ids, found):
    """Labels {0, 2} or {1, 2} made two classes and then `Target 2 is out of bounds`."""
    assert found(labels) == (SINGLE, names, ids)


def test_03_labels_only_in_validation_are_named(found):
    """A label that only validation has was an IndexError after training had run."""
    cases = [
        ([0, 1], [0, 2], "validation data that the training data lacks: 2. It has 0, 1"),
        (["a", "b"], ["c", "a", "d"], "lacks: 'c', 'd'. It has 'a', 'b'"),
        ([1.0, 2.0], [1.0, 3.0], "lacks: 3.0"),
        ([True, False], [2], "lacks: 2"),
        ([["a"], ["b"]], [["a", "x"]], "lacks: 'x'"),
        (["0", "1"], [0, 1], "lacks: 0, 1. It has '0', '1'"),
    ]
    for train, validation, message in cases:
        with pytest.raises(ValueError, match=message):
            found(train, validation)


def test_validation_need_not_have_every_label(found):
    assert found(["a", "b", "c"], ["c", "c"])[2] == [2, 2]
    assert found([1, 2, 4], [4])[2] == [2]


def test_equal_labels_of_another_type_are_the_same(found):
    assert found([1, 2], [2.0, 1.0])[2] == [1, 0]
    assert found([1.0, 2.0], [2, 1])[2] == [1, 0]
    assert found([0, 1], [True, False])[2] == [1, 0]


def test_04_integral_floats_are_classes(found):
    """Star ratings as floats became a BCE size error."""
    assert found([0.0, 1.0, 2.0]) == (SINGLE, GENERIC, [0, 1, 2])
    assert found([5.0, 1.0, 3.0]) == (SINGLE, ["1", "3", "5"], [2, 0, 1])
    assert found(pd.DataFrame(rows([1.0, 2.0]))) == (SINGLE, ["1", "2"], [0, 1])


def test_a_real_fraction_means_regression(found):
    assert found([0.0, 2.5, 5.0]) == (REGRESSION, ["LABEL_0"], [0.0, 2.5, 5.0])
    assert found([1, 2.5, 4]) == (REGRESSION, ["LABEL_0"], [1.0, 2.5, 4.0])
    assert found([0.5, 1.5], [1, 2])[2] == [1.0, 2.0]  # whole scores to evaluate on
    assert found([0.25, 0.25])[0] == REGRESSION  # one score is no single class


def test_05_booleans_are_two_classes(found):
    """True and False were a BCE size error."""
    expected = (SINGLE, ["False", "True"], [1, 0, 1])
    assert found([True, False, True]) == expected
    assert found([np.bool_(True), np.bool_(False), np.bool_(True)]) == expected
    assert found(pd.DataFrame(rows([True, False, True]))) == expected
    assert found(datasets.Dataset.from_list(rows([True, False, True]))) == expected


@pytest.mark.parametrize(
    "labels",
    [
        [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [(1, 0, 1), (0, 0, 0), (0, 1, 0)],
        [[True, False, True], [False, False, False], [False, True, False]],
        [np.array([1, 0, 1]), np.zeros(3, int), np.array([0, 1, 0])],
        [torch.tensor([1.0, 0, 1]), torch.zeros(3), torch.tensor([0, 1.0, 0])],
    ],
)
def test_06_multi_hot_labels(labels, found):
    """Lists of ints were a batch size mismatch; only floats worked."""
    expected = (MULTI, GENERIC, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert found(rows(labels)) == expected
    assert found(pd.DataFrame(rows(labels))) == expected
    if not isinstance(labels[0], torch.Tensor):
        assert found(datasets.Dataset.from_list(rows(labels))) == expected


def test_multi_hot_labels_of_polars_and_of_fixed_length(found):
    labels = [[1, 0], [0, 1], [1, 1]]
    expected = (MULTI, GENERIC[:2], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    frame = pl.DataFrame(rows(labels))
    assert found(frame) == expected
    assert found(frame.with_columns(pl.col("label").cast(pl.Array(pl.Int8, 2)))) == expected
    fixed = datasets.List(datasets.Value("float32"), length=2)
    features = datasets.Features({"text": datasets.Value("string"), "label": fixed})
    assert found(datasets.Dataset.from_list(rows(labels), features=features)) == expected


def test_lists_of_names_are_multi_label(found):
    labels = [["joy", "awe"], [], ["joy"], ["fear", "joy"]]
    hot = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    expected = (MULTI, ["awe", "fear", "joy"], hot)
    assert found(rows(labels)) == expected
    assert found(pd.DataFrame(rows(labels))) == expected
    assert found(pl.DataFrame(rows(labels))) == expected
    assert found(datasets.Dataset.from_list(rows(labels))) == expected


def test_lists_of_class_ids_are_multi_label(found):
    hot = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert found([[0, 2], [1]]) == (MULTI, GENERIC, hot)
    assert found([[3, 9], [5]]) == (MULTI, ["3", "5", "9"], hot)
    several = declared([[0, 2], [1]], ["a", "b", "c"], several=True)
    assert found(several) == (MULTI, ["a", "b", "c"], hot)
    assert found([[1], [0], [1]]) == (MULTI, GENERIC[:2], [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])


def test_lists_of_fractions_are_refused(found):
    # The classes were numbered by rank and the fractions then not found among them.
    with pytest.raises(ValueError, match="'label' has lists of fractions"):
        found([[0.2, 0.8], [0.9, 0.1]])


def test_multi_hot_rows_of_uneven_length_are_refused(found):
    # Read as lists of class ids, every row had the classes 0 and 1.
    with pytest.raises(ValueError, match="'label' have 2 to 3 values"):
        found([[1, 0, 1], [1, 0], [0, 1, 1]])


def test_validation_lists_must_be_like_those_of_training(found):
    with pytest.raises(ValueError, match="must be lists of 2 values, each 0 or 1"):
        found([[1, 0], [0, 1]], [[1, 0, 1]])
    with pytest.raises(ValueError, match="must be lists of 2 values, each 0 or 1"):
        found([[1, 0], [0, 1]], [[1, 2]])
    with pytest.raises(ValueError, match="validation data has one label in 'label', .* a list"):
        found([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match="validation data has a list of labels in 'label'"):
        found(["a", "b"], [["a"]])


@pytest.mark.parametrize("column", ["labels", "input_ids", "attention_mask", "label_ids"])
def test_columns_may_have_the_names_of_tensors(column, found):
    columns = ("text", column)
    assert found(rows([1, 0], column), columns=columns)[2] == [1, 0]
    names = [["b"], ["a", "b"]]
    assert found(rows(names, column), columns=columns)[2] == [[0.0, 1.0], [1.0, 1.0]]
    named = [{column: "w1", "y": 1}, {column: "w2", "y": 0}]
    assert found(named, columns=(column, "y"))[2] == [1, 0]


def test_07_one_class_is_refused(found):
    """One class only was trained as a regression, in silence."""
    for labels in ([0, 0], [3.0, 3.0], ["a", "a"], [True, True]):
        with pytest.raises(ValueError, match="Every label of the training data is .*needs two"):
            found(labels)
    with pytest.raises(ValueError, match="Every label of the training data is 'neg'"):
        found(declared([0, 0], ["neg", "pos"]))  # the first rows of a sorted data set
    with pytest.raises(ValueError, match="Every label of the training data is 'all'"):
        found(declared([0, 0], ["all"]))


def test_no_label_at_all_is_refused(found):
    with pytest.raises(ValueError, match="No row of the training data has a label in 'label'"):
        found([[], []])


@pytest.mark.parametrize("kind", [list, pd.DataFrame, pl.DataFrame, datasets.Dataset.from_list])
@pytest.mark.parametrize(
    "labels", [[0, 1, None], ["a", "b", None], [0.5, 1.0, None], [[1, 0], [0, 1], None]]
)
def test_08_a_missing_label_is_named_by_row(labels, kind, found):
    """None was a TypeError about '<', without the row."""
    with pytest.raises(ValueError, match="Row 2 of the training data has no label in 'label'"):
        found(kind(rows(labels)))
    with pytest.raises(ValueError, match="Row 2 of the validation data has no label in 'label'"):
        found(rows(labels[:2]), kind(rows(labels)))


def test_08_a_label_that_is_not_a_number_is_named_by_row(found):
    """NaN is a missing label, in whatever holds it."""
    nan = float("nan")
    for kind in (list, pd.DataFrame, pl.DataFrame, datasets.Dataset.from_list):
        with pytest.raises(ValueError, match="Row 2 of the training data has no label"):
            found(kind(rows([0.5, 1.0, nan])))
        with pytest.raises(ValueError, match="Row 1 of the training data has a missing label"):
            found(kind(rows([[1.0, 0.0], [0.0, nan], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="Row 1 of the training data has a missing label"):
        found([[1, 0], [None, 1]])
    with pytest.raises(ValueError, match="Row 1 of the training data has a missing label"):
        found([["a", "b"], ["a", None]])
    with pytest.raises(ValueError, match="Label inf in row 2 of the training data is no number"):
        found([1.0, 2.5, float("inf")])
    with pytest.raises(ValueError, match="'label' has rows without a label .-1"):
        found(declared([0, -1, 1], ["neg", "pos"]))


def test_09_fractions_in_validation_alone_are_refused(found):
    """A float validation label with int training labels crashed at the first evaluation."""
    with pytest.raises(ValueError, match="validation data that the training data lacks: 0.5"):
        found([0, 1], [0.5, 1.0])
    with pytest.raises(ValueError, match="holds labels that are no numbers"):
        found([0.5, 1.0], ["a"])


def test_half_floats_are_numbers(found):
    labels = np.array([0.5, 1.5], dtype=np.float16)
    assert found(rows(list(labels)))[0] == REGRESSION
    assert found(rows(list(labels + np.float16(0.5))))[0] == SINGLE


@pytest.mark.parametrize("label", [{"a": 1}, [[1]], b"a", date(2020, 1, 1), Decimal(1)])
def test_labels_of_other_kinds_are_refused(label, found):
    with pytest.raises(ValueError, match="Labels are numbers, strings, booleans or lists of those"):
        found(rows([label, label]))


def test_13_declared_names_become_the_classes(found):
    """`ClassLabel` names were lost: the config said LABEL_0 and LABEL_1."""
    assert found(declared([1, 0], ["neg", "pos"])) == (SINGLE, ["neg", "pos"], [1, 0])
    # In the declared order, and with classes that no training row has.
    names = ["world", "arts", "sports"]
    assert found(declared([2, 0], names)) == (SINGLE, names, [2, 0])
    assert found(declared([2, 0], names), declared([1], names))[2] == [1]
    stream = declared([1, 0], ["neg", "pos"]).to_iterable_dataset()
    assert found(stream, max_steps=1)[:2] == (SINGLE, ["neg", "pos"])


def test_declared_names_in_another_order_are_refused(found):
    # The same number means another class in each split; evaluation was then silently wrong.
    with pytest.raises(ValueError, match=r"validation data has the classes \['pos', 'neg'\]"):
        found(declared([0, 1], ["neg", "pos"]), declared([0, 1], ["pos", "neg"]))


def test_a_declared_stream_is_not_read_through(found):
    names = ["neg", "pos"]
    stream = declared([0] * 20, names).to_iterable_dataset()
    assert found(stream, max_steps=1)[1] == names  # one class so far, another may come
    with pytest.raises(ValueError, match="without a label"):
        found(declared([0, -1], names).to_iterable_dataset(), max_steps=1)


HEAD = {0: "neg", 1: "neutral", 2: "pos"}


def test_14_a_head_keeps_its_classes_where_labels_fit(found):
    """A three-way head with two-label data was a size mismatch, or trained the wrong class."""
    names = list(HEAD.values())
    assert found(["pos", "neg"], head=HEAD) == (SINGLE, names, [2, 0])
    assert found([0, 1, 0], head=HEAD) == (SINGLE, names, [0, 1, 0])
    assert found(declared([1, 0], ["neg", "pos"]), head=HEAD) == (SINGLE, names, [2, 0])
    assert found([["pos", "neg"], []], head=HEAD)[1:] == (names, [[1.0, 0.0, 1.0], [0.0] * 3])
    assert found([[1, 0, 1], [0, 1, 0]], head=HEAD)[1] == names


def test_14_other_labels_get_classes_of_their_own(found):
    """The config was rewritten to three classes while the head stayed at two."""
    assert found(["yes", "no"], head=HEAD) == (SINGLE, ["no", "yes"], [1, 0])
    assert found([1, 3], head=HEAD) == (SINGLE, ["1", "3"], [0, 1])
    assert found([0, 1, 2, 3], head=HEAD) == (SINGLE, [*GENERIC, "LABEL_3"], [0, 1, 2, 3])
    assert found([[1, 0], [0, 1]], head=HEAD)[1] == GENERIC[:2]
    assert found([0.5, 1.0], head=HEAD)[:2] == (REGRESSION, ["LABEL_0"])


def test_numbers_that_name_classes_of_the_head_are_those_classes(found):
    """Ratings below the number of classes were taken for class ids, one class too high."""
    stars = {index: str(index + 1) for index in range(5)}
    for labels in ([1, 2, 4], [1.0, 2.0, 4.0]):
        assert found(labels, head=stars) == (SINGLE, [*"12345"], [0, 1, 3])
    assert found([1, 4], [5, 2], head=stars)[2] == [4, 1]
    assert found([[1, 4], [2]], head=stars)[2] == [[1.0, 0, 0, 1, 0], [0.0, 1, 0, 0, 0]]
    assert found([0, 4], head=stars)[2] == [0, 4]  # 0 is no rating, so they are class ids
    assert found([1, -1], head={0: "-1", 1: "1"})[2] == [1, 0]
    assert found([0, 2], head={0: "0", 1: "1", 2: "2"})[2] == [0, 2]
    assert found([0, 2], head=dict(enumerate(GENERIC)))[2] == [0, 2]


RUNS = {  # training labels -> problem and names
    "ints": ([0, 1, 2], SINGLE, GENERIC),
    "gaps": ([0, 7, 3], SINGLE, ["0", "3", "7"]),
    "star ratings": ([1.0, 5.0, 2.0], SINGLE, ["1", "2", "5"]),
    "booleans": ([True, False], SINGLE, ["False", "True"]),
    "strings": (["pos", "neg"], SINGLE, ["neg", "pos"]),
    "scores": ([0.5, 1.0, 4.0], REGRESSION, ["LABEL_0"]),
    "multi-hot": ([[1, 0, 1], [0, 1, 0]], MULTI, GENERIC),
    "lists of names": ([["b", "a"], [], ["c"]], MULTI, ["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_names_and_problem_are_saved_with_the_model(kind, tiny_bert, tmp_path):
    labels, problem, names = RUNS[kind]
    model, _ = HFTrainer()(
        tiny_bert(num_labels=len(names)),
        rows(labels * 3),
        rows(labels),
        columns=COLUMNS,
        metrics="auto",
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
    )
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["problem_type"] == problem
    loaded = AutoConfig.from_pretrained(tmp_path / "run")
    for config in (model.config, loaded):
        assert config.problem_type == problem
        assert config.num_labels == len(names)
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: index for index, name in enumerate(names)}


def test_declared_names_are_saved_with_the_model(tiny_bert, tmp_path):
    data = declared([1, 0, 1], ["neg", "pos"])
    HFTrainer()(tiny_bert(), data, output_dir=str(tmp_path / "run"), max_steps=1)
    assert AutoConfig.from_pretrained(tmp_path / "run").id2label == {0: "neg", 1: "pos"}


def test_a_saved_head_trains_on_with_its_classes(tiny_bert, tmp_path):
    model, tokenizer = tiny_bert(num_labels=3)
    model.config.id2label = dict(HEAD)
    model.config.label2id = {name: index for index, name in HEAD.items()}
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(model.state_dict())
    trained, _ = HFTrainer()(
        str(tmp_path / "base"), rows(["pos", "neg"]), max_steps=1, learning_rate=0.0
    )
    assert trained.config.id2label == HEAD
    for name, weight in trained.state_dict().items():  # the head was not made anew
        assert torch.equal(weight, before[name])


def test_a_number_in_an_array_without_dimensions_is_that_number(found):
    for kind in (np.array, torch.tensor):
        assert found([kind(1), kind(0), kind(2)]) == (SINGLE, GENERIC, [1, 0, 2])


class Mood(Enum):
    BAD = 0


@pytest.mark.parametrize("label", [Mood.BAD, [torch.tensor(1), torch.tensor(0)]])
def test_labels_of_no_known_kind_are_shown(label, found):
    """The row was said to differ from itself."""
    with pytest.raises(ValueError, match="holds .* in row 0. Values are numbers, texts"):
        found([label, label])
