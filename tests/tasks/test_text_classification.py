"""What only text-classification does."""

import pytest
import torch

from hflit import HFTrainer
from hflit.tasks.text_classification import TextClassification
from tests.tasks.tiny import TEXTS, make

LABELS = [["a"], ["a", "b"], ["a", "c"], ["a"]]


@pytest.mark.parametrize(("parity", "known"), [(False, False), (True, False), (False, True)])
def test_new_head_of_many_labels_starts_from_their_shares(tmp_path, monkeypatch, parity, known):
    base, tokenizer = make("text-classification", seed=0, labels=3)
    (base if known else base.bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    started = []
    monkeypatch.setattr(
        TextClassification,
        "on_fit_start",
        lambda self: started.append(self.model.classifier.bias.detach().clone()),
    )
    rows = [{"text": text, "label": LABELS[i % 4]} for i, text in enumerate(TEXTS)]
    HFTrainer()(str(tmp_path), rows, max_steps=1, parity=parity, cache=False)

    # 24 rows: all have a, 6 have b, 6 have c; half a row each way keeps the odds finite.
    shares = torch.tensor([24.5, 6.5, 6.5]) / 25
    odds = torch.log(shares / (1 - shares))
    expected = odds if not (parity or known) else base.classifier.bias if known else torch.zeros(3)
    torch.testing.assert_close(started[0], expected.detach())
