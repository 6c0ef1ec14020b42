"""The page shows for each task what is taken for what, and the costliest rows, as counted here."""

import json
import re
from pathlib import Path

import pytest

from hflit import HFTrainer
from hflit.cli.evaluate import load_evaluation
from hflit.cli.main import main
from hflit.report.judged import judge
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows

TITLES = {
    "text-classification": "Confusion matrix",
    "question-answering": "Confusion matrix",
    "sequence-sequence": "Likeness to the reference",
    "language-generation": "Tokens taken for others",
    "language-modeling": "Tokens taken for others",
    "token-detection": "Confusion matrix",
}


def fit(task, data, base=None, **options):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for part in base or make(task, 0):
        part.save_pretrained("base")
    short = {"stride": 8} if task == "question-answering" else {}
    if task == "sequence-sequence":
        short["generation_max_length"] = 5
    trainer = HFTrainer()
    given = {"task": task, "maxlength": 32, "max_steps": 2, "output_dir": "out"} | short | options
    trainer("base", "rows.jsonl", "rows.jsonl", **given)
    return trainer


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_likeness_and_its_costliest_rows(task):
    base = make("language-modeling", 0) if task == "token-detection" else None
    trainer = fit(task, rows(task), base)
    assert main(["report", "--model", "out"]) == 0
    page = Path("out/report.html").read_text()
    assert f"<h2>{TITLES[task]}, of " in page
    facts = json.loads(Path("out/run.json").read_text())
    call = {k: v for k, v in facts["call"].items() if k != "validation"}
    one = {"per_device_eval_batch_size": 1}
    judgement = judge(*load_evaluation("out", "rows.jsonl", call | one), facts)
    costs = [row.loss for row in judgement.rows]
    assert costs == sorted(costs, reverse=True)
    shown = re.findall(r"<tr><td class=n>([\d.]+)</td><td>", page[page.index("id=worst") :])
    assert len(shown) >= min(len(costs), 20)
    if task == "text-classification":  # one item a row: their mean is the loss of the run
        assert sum(costs) / len(costs) == pytest.approx(trainer.metrics["eval_loss"], rel=1e-4)
    assert judgement.pairs


def test_rows_that_are_left_out_are_not_judged():
    """Once the report ended in an error of zip()."""
    data = rows("question-answering")
    data[3] = {**data[3], "answers": "nowhere"}
    fit("question-answering", data, skip_misaligned=True)
    assert main(["report", "--model", "out"]) == 0


def test_a_confusion_matrix_counts_what_predict_says():
    data = [{"text": f"w{i} w{i + 1}", "label": "abc"[i % 3]} for i in range(30)]
    trainer = fit("text-classification", data, max_steps=20, learning_rate=1e-2)
    said = [each["label"] for each in trainer.predict(data)]
    main(["report", "--model", "out"])
    page = Path("out/report.html").read_text()
    table = page[page.index("Confusion matrix") : page.index("Rows with the highest loss")]
    cells = [int(n) for n in re.findall(r"<td class=n [^>]*>(\d+)</td>", table)]
    names = sorted({*said, *"abc"})
    right = [row["label"] for row in data]
    pairs = list(zip(right, said, strict=True))
    assert cells == [pairs.count((r, s)) for r in names for s in names]


def test_several_labels_and_scores_have_their_own():
    data = [{"text": f"w{i}", "label": [i % 2, 1, 0]} for i in range(12)]
    base = make("text-classification", 0)
    trainer = fit("text-classification", data, base, max_steps=30, learning_rate=1e-2)
    said = [each["label"] for each in trainer.predict(data)]
    main(["report", "--model", "out"])
    page = Path("out/report.html").read_text()
    found = sum("LABEL_1" in each for each in said)
    line = f"<th>LABEL_1</th><td class=n>12</td><td class=n>{found}</td><td class=n>{found}</td>"
    assert line in page
    scores = [{"text": f"w{i}", "label": i / 7} for i in range(12)]
    fit("text-classification", scores, make("text-classification", 0))
    main(["report", "--model", "out"])
    page = Path("out/report.html").read_text()
    assert "Right and predicted scores, of 12 validation rows" in page


def test_rows_are_taken_evenly_and_may_be_others(capsys):
    data = [{"text": f"w{i}", "label": "abc"[i // 10]} for i in range(30)]
    fit("text-classification", data)
    assert main(["report", "--model", "out", "--rows", "4"]) == 0
    page = Path("out/report.html").read_text()
    assert "Confusion matrix, of 4 validation rows" in page
    for text in ("w0", "w9", "w19", "w29"):
        assert f"<td>{text}</td>" in page
    Path("others.csv").write_text("text,label\nw50,a\n")
    assert main(["report", "--model", "out", "--data", "others.csv"]) == 0
    assert "<td>w50</td>" in Path("out/report.html").read_text()
    assert main(["report", "--model", "out", "--data", "no.csv"]) == 2
    Path("rows.jsonl").unlink()
    assert main(["report", "--model", "out"]) == 0
    assert "Confusion" not in Path("out/report.html").read_text()
