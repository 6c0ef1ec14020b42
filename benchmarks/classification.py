"""Does text-classification learn real data, and as well as `transformers.Trainer`?

    python -m benchmarks.classification [--data FOLDER] [--only NAME ...]

MiniLM on five sets of labelled text, straight from their files with nothing but `columns=`. On
SST-2 the same run under `transformers.Trainer` stands beside it, and runs with LoRA.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.machine import arguments, machine, minilm, read, table
from hflit import HFTrainer

RUNS: dict[str, dict[str, Any]] = {
    "sst2": {"columns": ("sentence", "label"), "num_train_epochs": 1},
    "sst2, LoRA": {
        "columns": ("sentence", "label"),
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lora": True,
    },
    "sst2, 4-bit + LoRA": {
        "columns": ("sentence", "label"),
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lora": True,
        "quantize": True,
    },
    "mrpc": {
        "columns": ("sentence1", "sentence2", "label"),
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
    },
    "stsb": {"columns": ("sentence1", "sentence2", "similarity_score"), "num_train_epochs": 2},
    "go_emotions": {
        "columns": ("text", "labels"),
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
    },
    "newsgroups20": {
        "columns": ("text", "label"),
        "num_train_epochs": 3,
        "learning_rate": 3e-4,
        "maxlength": 128,
    },
}
SETTINGS = {"learning_rate": 5e-5, "per_device_train_batch_size": 32, "eval_strategy": "epoch"}
RESULTS = Path("benchmarks/results/classification.md")
SHOWN = ("accuracy", "f1_macro", "f1_micro", "matthews", "pearson", "spearman")


def ours(name: str, train: datasets.Dataset, validation: datasets.Dataset) -> dict[str, Any]:
    """One run under hflit."""
    trainer = HFTrainer()
    start = time.perf_counter()
    trainer(minilm(), train, validation, metrics="auto", **{**SETTINGS, **RUNS[name]})
    return {**trainer.metrics, "seconds": time.perf_counter() - start}


def reference(train: datasets.Dataset, validation: datasets.Dataset) -> dict[str, Any]:
    """SST-2 under `transformers.Trainer`, with padding to the longest row of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(batch["sentence"], truncation=True)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    start = time.perf_counter()
    set_seed(42)
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(minilm()),
        TrainingArguments(
            output_dir="runs/reference",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **{**SETTINGS, "num_train_epochs": RUNS["sst2"]["num_train_epochs"]},
        ),
        DataCollatorWithPadding(tokenizer),
        train.map(encode, batched=True),
        validation.map(encode, batched=True),
        tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    return {**trainer.evaluate(), "seconds": time.perf_counter() - start}


def main() -> None:
    """Run what was asked for, print the table and keep it."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    rows = []
    for name in options.only:
        train, validation = read(options.data, name.split(",")[0])
        results = {"hflit": ours(name, train, validation)}
        if name == "sst2":
            results["transformers.Trainer"] = reference(train, validation)
        for who, figures in results.items():
            shown = ", ".join(
                f"{metric} {figures[f'eval_{metric}']:.4f}"
                for metric in SHOWN
                if f"eval_{metric}" in figures
            )
            setting = {**SETTINGS, **RUNS[name]}
            rows.append(
                [name, who, f"{len(train):,}", f"{setting['num_train_epochs']}",
                 f"{setting['per_device_train_batch_size']}", f"{setting['learning_rate']:.0e}",
                 shown, f"{figures['eval_loss']:.4f}"]
            )  # fmt: skip
            print(rows[-1], f"{figures['seconds']:.0f} s", flush=True)
    # A run of some sets replaces their rows and leaves the others.
    record = RESULTS.with_suffix(".json")
    kept = json.loads(record.read_text()) if record.exists() else []
    kept = [row for row in kept if row[0] not in options.only] + rows
    kept.sort(key=lambda row: list(RUNS).index(row[0]))
    record.write_text(json.dumps(kept, indent=1) + "\n")
    heads = ["data", "trainer", "rows", "epochs", "batch", "learning rate", "validation", "loss"]
    text = f"{table(heads, kept)}\n\nMiniLM (22 M parameters); {machine()}.\n"
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
