"""Scores of texts against sacrebleu and against figures worked out by hand."""

import pytest
import sacrebleu
import torch

from hflit.metrics.generation import GenerationMetrics, text_scores

TEXTS = ["the cat sat on the mat .", "a dog", "he said : 3.5 % of it", "nothing alike", ""]
REFERENCES = [
    ["the cat sat on a mat .", "on the mat sat the cat ."],
    ["a dog barks"],
    ["he said: 3.5% of it.", "it was 3.5%", "3.5 percent"],
    ["quite different"],
    ["something"],
]


@pytest.mark.parametrize("several", [True, False])
def test_bleu_and_chrf_are_those_of_sacrebleu(several):
    references = REFERENCES if several else [row[:1] for row in REFERENCES]
    # sacrebleu's own layout: a list for each place among the references, None where there is none.
    columns = [
        [row[place] if place < len(row) else None for row in references]
        for place in range(3 if several else 1)
    ]
    scores = text_scores(TEXTS, references)
    assert scores["bleu"] == sacrebleu.BLEU().corpus_score(TEXTS, columns).score
    assert scores["chrf"] == sacrebleu.CHRF().corpus_score(TEXTS, columns).score
    assert scores["bleu"] > 20


def test_bleu_takes_the_texts_without_tokenizing():
    assert text_scores(["He left, at 3.5%."] * 2, [["He left, at 3.5%."]] * 2)["bleu"] == (
        pytest.approx(100)
    )


def test_rouge_by_hand():
    """4 words against 5, of which "the cat on" keeps the order and "the cat" stays whole."""
    scores = text_scores(["The cat, on it"], [["the cat sat on mats"]])
    assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 5))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (3 + 4))
    assert scores["rougeL"] == pytest.approx(2 * 3 / (4 + 5))


def test_rouge_takes_the_nearest_reference_and_averages_over_texts():
    scores = text_scores(["a b", "x"], [["c d", "a b"], ["y"]])
    assert scores["rouge1"] == pytest.approx(0.5)
    assert text_scores(["b a"], [["a b"]])["rougeL"] == pytest.approx(0.5)


def test_no_texts_have_no_scores():
    assert text_scores([], []) == {}


def test_batches_meet_their_references_in_order():
    made = iter([["a b", "c"], ["d"]])
    metrics = GenerationMetrics(lambda batch: next(made), [["a b"], ["c"], ["d", "e"], ["unread"]])
    for _ in range(2):
        metrics.update({"logits": torch.zeros(1)}, {})
    assert metrics.compute() == text_scores(["a b", "c", "d"], [["a b"], ["c"], ["d", "e"]])
    assert metrics.compute()["rouge1"] == 1.0
