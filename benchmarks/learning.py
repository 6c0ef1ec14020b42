"""Do question-answering and the language tasks learn real data, as well as `transformers.Trainer`?

    python -m benchmarks.learning [--data FOLDER] [--only NAME ...]

MiniLM answers questions of XQuAD and SQuAD 2; a small GPT-2 and a small BERT, each with its own
tokenizer, learn Shakespeare and WikiText from scratch. Each stands beside the same run under
`transformers.Trainer`: the same first weights and the same tokenized rows, with its own collator.
Both models are measured by hflit's `evaluate` before training and after each epoch, since the two
trainers do not mean the same by a loss: for GPT-2 transformers 5.23 divides by one label a row too
many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.machine import arguments, columns_of, machine, minilm, read, table
from hflit import HFTrainer
from hflit.arguments import parse
from hflit.data import DataModule
from hflit.loop.evaluation import evaluate
from hflit.tasks import TASKS

Rows = datasets.Dataset
EPOCHS = 2
COMMON = {
    "num_train_epochs": EPOCHS,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
# Task -> its data sets, the rows to train and to evaluate on of each, and its own settings.
RUNS: dict[str, dict[str, Any]] = {
    "question-answering": {
        "data": ("xquad_en", "squad_v2"),
        "rows": (220, 50),
        "seeds": (7, 8, 9),  # one says little: f1 and perplexity differ by a third
        "call": {"maxlength": 192, "stride": 64},
        "settings": {"learning_rate": 3e-4, "per_device_train_batch_size": 16},
    },
    "language-generation": {
        "data": ("tiny_shakespeare",),
        "rows": (12_000, 600),
        "seeds": (7, 8, 9),
        "call": {"maxlength": 64},
        "settings": {"learning_rate": 2e-3, "per_device_train_batch_size": 32},
    },
    "language-modeling": {
        "data": ("wikitext2",),
        "rows": (2_800, 300),
        "seeds": tuple(range(7, 15)),  # of three, either trainer may be ahead by 7 %
        "call": {"maxlength": 64},
        "settings": {"learning_rate": 2e-3, "per_device_train_batch_size": 32},
    },
}
LONGEST = 800  # characters of a context
SHOWN = ("f1", "exact_match", "perplexity", "token_accuracy")


def is_wanted(row: dict[str, Any]) -> bool:
    """Whether a question has an answer, and a context short enough to learn many in minutes."""
    return bool(row["answers"]["text"]) and len(row["context"]) <= LONGEST


def rows_of(task: str, folder: Path) -> tuple[Rows, Rows]:
    """Training and validation rows, as many of each data set."""
    parts: tuple[list[Rows], list[Rows]] = ([], [])
    for name in RUNS[task]["data"]:
        for part, split, count in zip(parts, read(folder, name), RUNS[task]["rows"], strict=True):
            if task == "question-answering":
                split = split.select_columns(["question", "context", "answers"])
                split = split.filter(is_wanted).shuffle(seed=0)  # neighbours share a context
            part.append(split.select(range(count)))
    train, validation = map(datasets.concatenate_datasets, parts)
    return train, validation


def base_of(task: str, rows: Rows) -> tuple[Any, Any]:
    """Model and tokenizer; the same at each call."""
    if task == "question-answering":
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        set_seed(0)
        return AutoModelForQuestionAnswering.from_pretrained(minilm()), tokenizer
    tokenizer = byte_pieces(rows) if task == "language-generation" else word_pieces(rows)
    set_seed(0)
    if task == "language-generation":
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        gpt2 = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=128, n_layer=2, n_head=4,
            pad_token_id=tokenizer.pad_token_id, **ends,
        )  # fmt: skip
        return GPT2LMHeadModel(gpt2), tokenizer
    bert = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, hidden_size=128,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return BertForMaskedLM(bert), tokenizer


def byte_pieces(rows: Rows) -> PreTrainedTokenizerFast:
    """1,000 pieces of bytes, as GPT-2 has them; a text ends with a token of its own."""
    tokenizer = ByteLevelBPETokenizer()
    specials = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer.train_from_iterator(
        rows["text"], vocab_size=1000, special_tokens=list(specials.values()), show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


def word_pieces(rows: Rows) -> PreTrainedTokenizerFast:
    """2,000 pieces of words, as BERT has them."""
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(rows["text"], vocab_size=2000, show_progress=False)
    tokenizer = Tokenizer.from_str(trained.to_str())
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")},
    )


def ours(
    task: str, base: tuple[Any, Any], train: Rows, validation: Rows, seed: int
) -> tuple[list[dict[str, float]], DataModule]:
    """One run under hflit: the figures of each evaluation, and the rows as it tokenized them."""
    trainer = HFTrainer()
    trainer(
        base,
        train,
        validation,
        task=task,
        metrics="auto",
        eval_strategy="epoch",
        eval_on_start=True,
        cache=False,
        seed=seed,
        **{**COMMON, **RUNS[task]["settings"], **RUNS[task]["call"]},
    )
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return evaluations, trainer.lightning.datamodule


class Measured(TrainerCallback):
    """Evaluates a model of `transformers.Trainer` as hflit evaluates its own."""

    def __init__(self, task: str, model: Any, data: DataModule) -> None:
        self.module = TASKS[task](model, parse({})[0])
        self.data = data
        self.evaluations: list[dict[str, float]] = []

    def measure(self, *_: Any, **__: Any) -> None:
        """Add the figures of the weights as they are."""
        self.evaluations.append(evaluate(self.module, self.data, self.module.args, "auto"))

    on_train_begin = on_epoch_end = measure


def reference(
    task: str, base: tuple[Any, Any], data: DataModule, seed: int
) -> list[dict[str, float]]:
    """The same rows under `transformers.Trainer`: the figures of each evaluation."""
    model, tokenizer = base
    is_masked = task == "language-modeling"
    if task == "question-answering":
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=is_masked)
    measured = Measured(task, model, data)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir="runs/reference",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
            remove_unused_columns=not is_masked,  # masking asks which tokens are special
            **{**COMMON, **RUNS[task]["settings"]},
        ),
        collator,
        data.tokens["train"],
        processing_class=tokenizer,
        callbacks=[measured],
    )
    trainer.train()
    return measured.evaluations


def described(task: str, base: tuple[Any, Any], data: DataModule) -> str:
    """One line on what a run was made of."""
    sets, settings = " and ".join(RUNS[task]["data"]), RUNS[task]["settings"]
    if task == "question-answering":
        sets += f" (answerable, contexts of at most {LONGEST} characters)"
    train, validation = (
        f"{len(data.rows[split]):,} {told} rows ({len(data.tokens[split]):,} of tokens)"
        for split, told in (("train", "training"), ("validation", "validation"))
    )
    return (
        f"- {task}: {type(base[0]).__name__} of {base[0].num_parameters() / 1e6:.1f} M parameters "
        f"on {sets}: {train}, {validation}, at most {data.tokenization.maxlength} "
        f"tokens each; batch {settings['per_device_train_batch_size']}, learning rate "
        f"{settings['learning_rate']:.0e}, {len(RUNS[task]['seeds'])} seed(s)."
    )


def main() -> None:
    """Run what was asked for, print the table and keep it."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    lines, notes = [], []
    for task in options.only:
        train, validation = rows_of(task, options.data)
        runs: dict[str, list[list[dict[str, float]]]] = {"hflit": [], "transformers.Trainer": []}
        for seed in RUNS[task]["seeds"]:
            figures, data = ours(task, base_of(task, train), train, validation, seed)
            runs["hflit"].append(figures)
            base = base_of(task, train)
            runs["transformers.Trainer"].append(reference(task, base, data, seed))
        for metric in SHOWN:
            if f"eval_{metric}" in figures[0]:
                for who, seeds in runs.items():
                    lines.append([task, metric, who, *columns_of(seeds, f"eval_{metric}")])
                    print(lines[-1], flush=True)
        notes.append(described(task, base, data))
    epochs = [f"epoch {epoch}" for epoch in range(1, EPOCHS + 1)]
    text = table(["task", "validation", "trainer", "before", *epochs], lines)
    text = f"{text}\n\n{chr(10).join(notes)}\n\n{machine()}.\n"
    print(text)
    if options.only == list(RUNS):
        Path("benchmarks/results/learning.md").write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
