"""Does sequence-sequence learn real data, and as well as `transformers.Trainer`?

    python -m benchmarks.sequences [--data FOLDER] [--only NAME ...]

A small T5 from scratch, with a tokenizer trained on the same rows: translation on Multi30k, and
one-sentence summaries on SciTLDR, whose validation rows have several references each. On Multi30k
the same run under `transformers.Seq2SeqTrainer` stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from benchmarks.machine import arguments, columns_of, machine, read, table
from hflit import HFTrainer
from hflit.metrics.generation import text_scores

SPECIALS = ["<pad>", "</s>", "<unk>"]
RUNS: dict[str, dict[str, Any]] = {
    "multi30k_en_de": {"columns": ("en", "de"), "num_train_epochs": 2, "maxlength": 64},
    "scitldr": {"columns": ("source", "targets"), "num_train_epochs": 4, "maxlength": 256},
}
# One seed says little: of five runs whose first weights differed by 1e-6, one epoch without dropout
# ended at losses from 4.45 to 4.51.
SEEDS = {"multi30k_en_de": (42, 43, 44), "scitldr": (42,)}
SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
}
LONGEST = 48  # tokens of a generated text
# Validation rows: generating is the slow part. Whole batches, since to Seq2SeqTrainer a short last
# one counts as much as the others in its loss.
EVALUATED = 3 * SETTINGS["per_device_eval_batch_size"]
SHOWN = ("loss", "bleu", "chrf", "rouge1", "rouge2", "rougeL")


def tokenizer_of(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    """2,000 pieces of words, learned from both columns."""

    def texts() -> Iterator[str]:
        for row in rows:
            for name in columns:
                yield from [row[name]] if isinstance(row[name], str) else row[name]

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts(), BpeTrainer(vocab_size=2000, special_tokens=SPECIALS, show_progress=False)
    )
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_t5(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """The same weights at each call."""
    set_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():  # T5's tables start at 1.0, far too wide for a run this short
        model.shared.weight.mul_(0.3)
        model.lm_head.weight.mul_(0.05)
    return model


def ours(
    name: str,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> list[dict[str, Any]]:
    """One run under hflit: the figures of each evaluation."""
    trainer = HFTrainer()
    trainer(
        (small_t5(tokenizer), tokenizer),
        train,
        validation,
        task="sequence-sequence",
        metrics="auto",
        generation_max_length=LONGEST,
        seed=seed,
        **{**SETTINGS, **RUNS[name]},
    )
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def reference(
    name: str,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> list[dict[str, Any]]:
    """The same under transformers; only its evaluations generate."""
    (source, target), maxlength = RUNS[name]["columns"], RUNS[name]["maxlength"]

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(
            batch[source], text_target=batch[target], truncation=True, max_length=maxlength
        )

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        made = prediction.predictions
        made = tokenizer.batch_decode(made.clip(min=0), skip_special_tokens=True)
        return text_scores(made, [[text] for text in validation[target]])

    model = small_t5(tokenizer)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir="runs/reference",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            predict_with_generate=True,
            generation_max_length=LONGEST,
            seed=seed,
            **{**SETTINGS, "num_train_epochs": RUNS[name]["num_train_epochs"]},
        ),
        DataCollatorForSeq2Seq(tokenizer, model=model),
        train.map(encode, batched=True, remove_columns=train.column_names),
        validation.map(encode, batched=True, remove_columns=validation.column_names),
        tokenizer,
        compute_metrics=scores,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def main() -> None:
    """Run what was asked for, print the table and keep it."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    rows = []
    for name in options.only:
        train, validation = read(options.data, name)
        validation = validation.select(range(EVALUATED))
        tokenizer = tokenizer_of(train, RUNS[name]["columns"])
        runs = {"hflit": ours}
        if name == "multi30k_en_de":
            runs["transformers.Seq2SeqTrainer"] = reference
        for who, run in runs.items():
            start = time.perf_counter()
            seeds = [run(name, train, validation, tokenizer, seed) for seed in SEEDS[name]]
            ends = [(evaluations[0], evaluations[-1]) for evaluations in seeds]
            for metric in SHOWN:
                rows.append([name, metric, who, *columns_of(ends, f"eval_{metric}")])
                print(rows[-1], flush=True)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: (options.only.index(row[0]), SHOWN.index(row[1])))
    text = table(["data", "validation", "trainer", "after one epoch", "at the end"], rows)
    size = small_t5(tokenizer).num_parameters() / 1e6
    text = (
        f"{text}\n\nT5 from scratch ({size:.1f} M parameters), batch 32, {EVALUATED} validation "
        "rows, greedy; multi30k_en_de over 2 epochs, the mean of 3 seeds and their range; scitldr "
        f"over 4, one seed; {machine()}.\n"
    )
    print(text)
    if options.only == list(RUNS):
        Path("benchmarks/results/sequences.md").write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
