"""SQuAD's figures, worked out by hand and against a slow, literal version of the algorithm."""

import math
import random
import re
import string
import warnings
from collections import Counter

import pytest
import torch

from hflit.metrics.spans import SpanMetrics


def batch_of(spans):
    """Spans of equal length; a token is (first character, end), or None outside the context."""
    columns = {"row": [], "null_positions": [], "char_starts": [], "char_ends": []}
    for row, tokens in spans:
        columns["row"].append(row)
        columns["null_positions"].append(0)
        columns["char_starts"].append([-1 if t is None else t[0] for t in tokens])
        columns["char_ends"].append([-1 if t is None else t[1] for t in tokens])
    return {name: torch.tensor(values) for name, values in columns.items()}


def logits_of(length, **given):
    """Zeros, but for the places given: `start={2: 5.0}`."""
    outputs = {}
    for part in ("start", "end"):
        outputs[f"{part}_logits"] = torch.zeros(1, length)
        for place, value in given.get(part, {}).items():
            outputs[f"{part}_logits"][0, place] = value
    return outputs


CONTEXT = "the red fox ran"
TOKENS = [None, None, (0, 3), (4, 7), (8, 11), (12, 15), None]  # [CLS] question words [SEP]


def one_row(answers, outputs, **options):
    metrics = SpanMetrics([CONTEXT], [answers], **options)
    metrics.update(outputs, batch_of([(0, TOKENS)]))
    return metrics


def test_best_span_by_hand():
    # "red fox" has 3 + 4; an end before its start has no say. One word of two is in the right
    # answer, "fox": F1 = 2 * 1/2 * 1 / (1/2 + 1).
    metrics = one_row(["fox"], logits_of(7, start={3: 3.0, 4: 1.0}, end={4: 4.0, 2: 5.0}))
    assert metrics.candidates[0][0] == (7.0, 4, 11)
    assert metrics.compute() == pytest.approx({"exact_match": 0.0, "f1": 200 / 3})
    # The best of several right answers counts; articles, case and signs do not.
    metrics = one_row(["cat", "The Red FOX!"], logits_of(7, start={2: 3.0}, end={4: 4.0}))
    assert metrics.compute() == {"exact_match": 100.0, "f1": 100.0}


def test_answers_stay_in_the_context_in_order_and_short():
    outputs = logits_of(
        7, start={1: 9.0, 2: 2.0, 3: -1.0, 4: -1.0, 5: 8.0}, end={6: 9.0, 2: 1.0, 5: 3.0}
    )
    # 1 and 6 are no context. From 5 to 5: 11; from 2 to 5: 5; from 5 back to 2 is no stretch.
    assert one_row(["x"], outputs).candidates[0][0] == (11.0, 12, 15)
    outputs["start_logits"][0, 5] = -8.0
    assert one_row(["x"], outputs).candidates[0][0] == (5.0, 0, 15)
    assert one_row(["x"], outputs, max_answer_length=3).candidates[0][0] == (3.0, 0, 3)


def test_null_is_the_lowest_over_the_spans_of_a_row():
    metrics = SpanMetrics([CONTEXT, "a b"], [["fox"], []])
    spans = [(0, TOKENS), (1, [None, (0, 1), (2, 3), None, None, None, None]), (0, TOKENS)]
    null = torch.tensor([5.0, 9.0, 1.0])
    outputs = logits_of(7)
    for part in outputs:
        outputs[part] = outputs[part].repeat(3, 1)
        outputs[part][:, 0] = null / 2
    outputs["start_logits"][0, 4] = outputs["end_logits"][0, 4] = 1.5  # fox: 3 in the first span
    metrics.update(outputs, batch_of(spans))
    assert metrics.null_scores == {0: 1.0, 1: 9.0}
    # Null beats the answer by -2 in row 0, which is answered, and by 9 in row 1, which is not.
    figures = metrics.compute()
    assert figures["exact_match"] == figures["HasAns_f1"] == figures["NoAns_exact"] == 100.0
    # At a threshold of 10 row 1 is answered, wrongly; at -3 row 0 is not.
    metrics.null_threshold = 10.0
    assert metrics.compute()["NoAns_f1"] == 0.0
    assert metrics.compute()["HasAns_exact"] == 100.0
    metrics.null_threshold = -3.0
    assert metrics.compute()["HasAns_f1"] == 0.0
    assert metrics.compute()["best_f1"] == 100.0
    assert metrics.compute()["best_f1_thresh"] == -2.0


def test_row_without_context_tokens_is_unanswered():
    metrics = SpanMetrics(["", CONTEXT], [[], ["fox"]])
    metrics.update(logits_of(3), batch_of([(0, [None, None, None])]))
    metrics.update(logits_of(7, start={4: 1.0}, end={4: 1.0}), batch_of([(1, TOKENS)]))
    figures = metrics.compute()
    assert figures["exact_match"] == figures["best_exact"] == 100.0
    assert all(math.isfinite(value) for value in figures.values())


def test_answering_nothing_may_be_best():
    metrics = one_row([], logits_of(7, start={4: 3.0}, end={4: 3.0}))
    figures = metrics.compute()
    assert figures["exact_match"] == 0.0
    assert figures["best_exact"] == 100.0
    assert figures["best_exact_thresh"] < -6.0
    assert "HasAns_f1" not in figures


def test_no_more_than_n_best_are_kept():
    outputs = {name: torch.randn(1, 7) for name in ("start_logits", "end_logits")}
    metrics = one_row(["x"], outputs, n_best=3)
    metrics.update(outputs, batch_of([(0, TOKENS)]))  # the same stretches once more
    scores = [candidate.score for candidate in metrics.candidates[0]]
    assert len(set(metrics.candidates[0])) == 3
    assert scores == sorted(scores, reverse=True)
    everything = one_row(["x"], outputs, n_best=100).candidates[0]
    assert len(everything) == 10  # of 4 words
    assert metrics.candidates[0] == everything[:3]


# The algorithm once more, slowly and literally (Rajpurkar et al. 2016, 2018; Devlin et al. 2019).


def normal(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(text, gold):
    found, right = normal(text), normal(gold)
    if not found or not right:
        return float(found == right)
    same = sum((Counter(found) & Counter(right)).values())
    if not same:
        return 0.0
    return 2 * (same / len(found)) * (same / len(right)) / (same / len(found) + same / len(right))


def literal(contexts, answers, spans, outputs, threshold, longest):
    best, null = {}, {}
    starts, ends = outputs["start_logits"].tolist(), outputs["end_logits"].tolist()
    for (row, tokens), start, end in zip(spans, starts, ends, strict=True):
        null[row] = min(null.get(row, math.inf), start[0] + end[0])
        for i in range(len(tokens)):
            for j in range(i, min(i + longest, len(tokens))):
                if tokens[i] is None or tokens[j] is None:
                    continue
                score = start[i] + end[j]
                if score > best.get(row, (-math.inf,))[0]:
                    best[row] = (score, contexts[row][tokens[i][0] : tokens[j][1]])

    def total(threshold, measure):
        hits = 0.0
        for row, (score, text) in best.items():
            said = "" if null[row] - score > threshold else text
            hits += max(measure(said, gold) for gold in answers[row] or [""])
        return 100 * hits / len(best)

    def exact(text, gold):
        return float(normal(text) == normal(gold))

    thresholds = [-1e9, *(null[row] - best[row][0] for row in best)]
    return {
        "exact_match": total(threshold, exact),
        "f1": total(threshold, f1),
        "best_exact": max(total(t, exact) for t in thresholds),
        "best_f1": max(total(t, f1) for t in thresholds),
    }, total


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_literal_algorithm(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    words = ["the", "red", "Fox", "a", "ran", "off,", "and", "slept."]
    contexts, answers, spans = [], [], []
    for row in range(30):
        chosen = rng.choices(words, k=12)
        contexts.append(" ".join(chosen))
        at = [len(" ".join([*chosen[:i], ""])) if i else 0 for i in range(12)]
        places = [(a, a + len(w)) for a, w in zip(at, chosen, strict=True)]
        first = rng.randrange(10)
        gold = [" ".join(chosen[first : first + k]) for k in (1, 3)]
        # An answer of articles alone is none by SQuAD's rules; it would make a row of both kinds.
        answers.append([] if rng.random() < 0.4 else [g for g in gold if normal(g)] or ["red"])
        for begin in (0, 4):  # two spans of 8 words that share 4
            spans.append((row, [None, None, *places[begin : begin + 8], None]))
    outputs = {name: 3 * torch.randn(60, 11) for name in ("start_logits", "end_logits")}
    outputs["start_logits"][:, 0] += 3

    metrics = SpanMetrics(contexts, answers, max_answer_length=4, null_threshold=0.5)
    for begin in range(0, 60, 7):  # the spans of a row may come in two batches
        part = {name: value[begin : begin + 7] for name, value in outputs.items()}
        metrics.update(part, batch_of(spans[begin : begin + 7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = metrics.compute()
    expected, total = literal(contexts, answers, spans, outputs, 0.5, longest=4)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-4), name
    # The threshold named gives the figure promised.
    assert total(figures["best_f1_thresh"] + 1e-6, f1) == pytest.approx(
        figures["best_f1"], abs=1e-4
    )
    shares = [sum(1 for a in answers if bool(a) == has) / 30 for has in (True, False)]
    mean = shares[0] * figures["HasAns_f1"] + shares[1] * figures["NoAns_f1"]
    assert figures["f1"] == pytest.approx(mean, abs=1e-4)
