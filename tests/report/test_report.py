"""Model card and page: the figures of the run, metadata of the Hub, nothing from the network."""

import html
import importlib
import json
from pathlib import Path

import datasets
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from transformers import IntervalStrategy

from hflit import HFTrainer
from hflit.cli.main import main
from hflit.report.card import python_call
from hflit.report.curves import as_svg, learning_curves


def fitted(base, rows, **options):
    trainer = HFTrainer()
    trainer(
        base,
        rows,
        rows,
        metrics="auto",
        output_dir="out",
        max_steps=4,
        logging_steps=2,
        eval_strategy="epoch",
        hub_token=None,
        **options,
    )
    return trainer


def test_the_card_holds_the_figures_and_the_metadata(tiny_bert, ragged_rows):
    trainer = fitted(tiny_bert(), ragged_rows(16))
    text = Path("out/README.md").read_text()
    meta = yaml.safe_load(text.split("---\n")[1])
    assert meta["library_name"] == "transformers"
    assert meta["pipeline_tag"] == "text-classification"
    results = {m["type"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]}
    assert results["accuracy"] == round(trainer.metrics["eval_accuracy"], 6)
    assert f"| loss | {trainer.metrics['eval_loss']:.4f} |" in text
    assert "LABEL_0 (8), LABEL_1 (8)" in text
    assert "max_steps=4," in text
    assert Path("out/learning_curves.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(Path("out/run.json").read_text())
    assert facts["task"] == "text-classification"
    assert facts["fingerprint"] in text


def test_the_call_in_the_card_runs(tiny_bert, ragged_rows, monkeypatch):
    """Once it held metrics='score', callbacks=['Timer'] and logger='a CSVLogger'."""
    Path("mine.py").write_text("class Figures:\n  def zero(each):\n    return {'zero': 0.0}\n")
    monkeypatch.syspath_prepend(".")
    mine = importlib.import_module("mine")
    model, tokenizer = tiny_bert()
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    HFTrainer()(
        "base",
        ragged_rows(8),
        datasets.Dataset.from_list(ragged_rows(4)),
        metrics=mine.Figures.zero,
        output_dir="out",
        max_steps=1,
        eval_strategy=IntervalStrategy.EPOCH,
        lr_scheduler_kwargs={},
        lora=LoraConfig(r=2),
        callbacks=[Timer()],
        logger=CSVLogger("logs"),
    )
    call = Path("out/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert call.splitlines()[:8] == [
        "from hflit import HFTrainer",
        "from mine import Figures",
        "",
        "# train was 8 rows in a list.",
        "# validation was 4 rows in a Dataset.",
        "# Left out, as no text stands for it: lora, a LoraConfig.",
        "# Left out, as no text stands for it: logger, a CSVLogger.",
        "# Left out, as no text stands for it: callbacks, Timer.",
    ]
    rows = ragged_rows(8)
    Path("out/run.json").unlink()
    exec(call, {"train": rows, "validation": rows})
    facts = json.loads(Path("out/run.json").read_text())
    assert facts["call"]["metrics"] == "Figures.zero"
    assert facts["call"]["eval_strategy"] == "epoch"
    assert facts["objects"] == {"train": None, "validation": None, "metrics": "mine:Figures.zero"}


def test_a_function_without_a_place_is_left_out(tiny_bert, ragged_rows):
    rows = ragged_rows(4)
    HFTrainer()(tiny_bert(), rows, rows, metrics=lambda each: {}, output_dir="out", max_steps=1)
    text = Path("out/README.md").read_text()
    assert "# base was a BertForSequenceClassification in memory.\n" in text
    assert "# Left out, as no text stands for it: metrics, test_a_function_without" in text
    assert "    base=base,\n    train=train,\n" in text


def test_labels_are_escaped_in_the_card(tiny_bert, ragged_rows):
    rows = [{**row, "label": "<b>x</b>" if row["label"] else "a|b"} for row in ragged_rows(8)]
    Path("a|b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted(tiny_bert(), "a|b.jsonl")
    text = Path("out/README.md").read_text().split("## Training")[0].split("---\n")[2]
    assert "Classes of the training rows: &lt;b&gt;x&lt;/b&gt; (4), a\\|b (4)." in text
    assert "| train | a\\|b.jsonl | 8 |" in text
    assert "<b>" not in text


def test_of_many_classes_the_card_names_the_first(tiny_bert, ragged_rows):
    # 20,000 classes made a card of 470 kB.
    HFTrainer()(tiny_bert(102), ragged_rows(204, classes=102), output_dir="out", max_steps=1)
    line = next(x for x in Path("out/README.md").read_text().splitlines() if "Classes of" in x)
    assert line.count(" (2)") == 100  # rows of each, 204 / 102
    assert line.endswith(" and 2 more, which `run.json` counts.")
    splits = json.loads(Path("out/run.json").read_text())["splits"]
    assert list(splits["train"]["labels"].values()) == [2] * 102


def test_without_evaluation_and_with_an_adapter_the_card_is_whole(tiny_bert, ragged_rows):
    HFTrainer()(tiny_bert(), ragged_rows(8), output_dir="out", max_steps=1, lora=True)
    text = Path("out/README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"
    assert "It was not evaluated." in text


def test_the_page_is_whole_in_itself(tiny_bert, ragged_rows, capsys):
    rows = [{**row, "label": "<b>" if row["label"] else "b"} for row in ragged_rows(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted(tiny_bert(), "rows.jsonl")
    assert main(["report", "--model", "out"]) == 0
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == 2
    assert "Confusion matrix" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "src=" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page  # the browser would not fetch or run anything either
    assert "learning_rate" in page


def test_what_the_page_lacks_is_told(tiny_bert, ragged_rows, capsys):
    """Once confusion matrix and worst rows were left out without a word."""
    rows = ragged_rows(8)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted(tiny_bert(), "rows.jsonl")
    Path("rows.jsonl").rename("<moved>.jsonl")
    lacks = {
        "out": "No file is called 'rows.jsonl'",
        "objects": "the run was given 8 rows in a list, not a file",
        "none": "the run had no validation data",
    }
    HFTrainer()(tiny_bert(), rows, rows, output_dir="objects", max_steps=1)
    HFTrainer()(tiny_bert(), rows, output_dir="none", max_steps=1)
    for folder, told in lacks.items():
        capsys.readouterr()
        assert main(["report", "--model", folder]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("The page lacks what is taken for what and the rows with the hi")
        assert told in lines[0]
        assert "--data names" in lines[0]
        page = html.unescape(Path(folder, "report.html").read_text())
        assert f"<p>{lines[0]}</p>" in page
        assert "Confusion matrix" not in page
    assert main(["report", "--model", "out", "--data", "<moved>.jsonl"]) == 0
    assert "Confusion matrix" in Path("out/report.html").read_text()
    capsys.readouterr()
    assert main(["report", "--model", "none", "--rows", "0"]) == 0
    assert capsys.readouterr().out == "The report is in none/report.html.\n"


def test_a_folder_without_a_run_has_no_report(capsys):
    assert main(["report", "--model", "nothing"]) == 2
    assert "is no folder that a run left" in capsys.readouterr().err


def test_numbers_without_a_literal_are_written_as_python():
    """Once they were names that no one had imported: inf."""
    given = {"a": float("inf"), "b": [float("-inf"), 0.5], "c": {"d": float("nan")}}
    text = python_call({"call": given})
    assert text.splitlines()[3] == '    a=float("inf"),'
    read = eval("dict(" + text.partition("HFTrainer()(")[2])
    assert repr(read) == repr(given)


def test_the_page_of_a_long_run_stays_small():
    # A dot for each of 2 * 20,000 points took 90 bytes each, 3.6 MB in all.
    points = range(1, 20_001)
    history = [{"step": n, "loss": 2 / n, "learning_rate": 1e-5 / n} for n in points]
    assert len(as_svg(learning_curves(history))) < 1_000_000
    assert as_svg(learning_curves(history[:20])).count("<use") > 2 * 20
