"""Every metric against scikit-learn or scipy, on random data in ragged batches."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hflit.metrics.classification import ClassificationMetrics

SIZES = [(8, 8, 8, 1), (25,), (1,) * 25, (3, 22)]  # rows in each batch, 25 in all


def computed(problem, classes, logits, labels, sizes):
    metrics = ClassificationMetrics(problem, classes)
    for part, known in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update({"logits": part}, {"labels": known})
    return metrics.compute()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def single(logits, labels):
    predicted = logits.argmax(-1).numpy()
    labels = labels.numpy()
    return {
        "accuracy": accuracy_score(labels, predicted),
        "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
        "f1_weighted": f1_score(labels, predicted, average="weighted", zero_division=0),
        "matthews": matthews_corrcoef(labels, predicted),
    }


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [2, 3, 20])  # of 20, some come in no row
@pytest.mark.parametrize("seed", [0, 1])
def test_classes(classes, sizes, seed):
    logits = random(25, classes, seed=seed)
    labels = (random(25, seed=seed + 9) * 100).long().abs() % classes
    found = computed("single_label_classification", classes, logits, labels, sizes)
    assert found == pytest.approx(single(logits, labels), abs=1e-6)


def test_counts_grow_with_the_classes_and_not_with_their_square():
    # For 20,000 classes the counts of all pairs took 3.2 GB, and a batch took 7 seconds.
    metrics = ClassificationMetrics("single_label_classification", 20_000)
    counts, _ = metrics.state()
    assert sum(each.numel() for state in counts for each in state.values()) <= 3 * 20_000


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ([0, 0, 0, 0], [0, 1, 0, 1]),  # one class predicted, as at the start of training
        ([0, 1, 0, 1], [0, 0, 0, 0]),  # one class in the validation rows
        ([1, 0, 1, 0], [0, 1, 0, 1]),  # all wrong
        ([0, 1, 0, 1], [0, 1, 0, 1]),  # all right
        ([1, 1, 1, 1], [1, 1, 0, 1]),  # torchmetrics' own coefficient: not 0
        ([1, 1, 0, 1], [0, 0, 0, 0]),
    ],
)
def test_classes_at_the_edges(predicted, labels):
    logits = torch.eye(2)[predicted]
    labels = torch.tensor(labels)
    found = computed("single_label_classification", 2, logits, labels, (2, 2))
    assert found == pytest.approx(single(logits, labels), abs=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_several_labels(classes, sizes):
    logits = random(25, classes)
    labels = (random(25, classes, seed=1) > 0.5).float()
    if classes == 5:
        labels[:, 4], logits[:, 4] = 0, -5  # a label that neither side gives
    predicted, known = (logits > 0).numpy(), labels.numpy()  # 0 is a probability of 0.5
    expected = {
        "f1_micro": f1_score(known, predicted, average="micro", zero_division=0),
        "f1_macro": f1_score(known, predicted, average="macro", zero_division=0),
        "exact_match": accuracy_score(known, predicted),
    }
    if classes == 1:  # scikit-learn takes one column for two classes
        expected = dict.fromkeys(("f1_micro", "f1_macro"), f1_score(known[:, 0], predicted[:, 0]))
        expected["exact_match"] = accuracy_score(known, predicted)
    found = computed("multi_label_classification", classes, logits, labels, sizes)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_scores(sizes, shift):
    logits = random(25, 1) + shift
    labels = (random(25, seed=1) * 2).round() / 2 + shift  # halves, so that there are ties
    assert len(labels.unique()) < 20
    found = computed("regression", 1, logits, labels, sizes)
    scores, known = logits[:, 0].double().numpy(), labels.double().numpy()
    expected = {
        "pearson": pearsonr(scores, known).statistic,
        "spearman": spearmanr(scores, known).statistic,
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_scores_that_do_not_vary_have_no_correlation():
    """As scipy says; one of the two was 0 once."""
    metrics = ClassificationMetrics("regression", 1)
    metrics.update({"logits": torch.tensor([[0.1], [0.2]])}, {"labels": torch.tensor([0.5, 0.5])})
    assert all(math.isnan(figure) for figure in metrics.compute().values())


@pytest.mark.parametrize("wrong", [[0], range(8)], ids=["one", "all"])
def test_scores_that_are_no_numbers_have_no_correlation(wrong):
    """As scipy says; NaN had ranks once, and in a row of rising labels a correlation of 1."""
    metrics = ClassificationMetrics("regression", 1)
    scores = torch.arange(8.0)
    scores[list(wrong)] = math.nan
    metrics.update({"logits": scores[:, None]}, {"labels": torch.arange(8.0)})
    assert math.isnan(spearmanr(scores, torch.arange(8.0)).statistic)
    assert all(math.isnan(figure) for figure in metrics.compute().values())


def test_scores_of_low_precision_are_counted_in_float32():
    logits, labels = random(25, 1).bfloat16(), random(25, seed=1)
    found = computed("regression", 1, logits, labels, (25,))
    expected = pearsonr(logits[:, 0].double().numpy(), labels.double().numpy()).statistic
    assert found["pearson"] == pytest.approx(expected, abs=1e-5)


def test_a_new_evaluation_starts_from_nothing():
    logits, labels = random(25, 3), torch.arange(25) % 3
    first = computed("single_label_classification", 3, logits, labels, (25,))
    assert computed("single_label_classification", 3, logits, labels, (25,)) == first


def test_figures_ask_no_other_process(monkeypatch):
    """A group that an earlier run left is still there, and its others do something else."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    found = computed(
        "single_label_classification", 2, torch.eye(2), torch.tensor([0, 0]), sizes=(1, 1)
    )
    assert found["accuracy"] == 0.5  # the classes 0 and 1 were said


def test_figures_are_plain_numbers():
    # They go into trainer_state.json.
    found = computed(
        "single_label_classification", 2, random(4, 2), torch.tensor([0, 1, 1, 0]), (4,)
    )
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert np.isclose(found["accuracy"] * 4 % 1, 0)
