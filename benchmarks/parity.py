"""Are the losses, gradients and weights those of `transformers.Trainer`?

    python -m benchmarks.parity [--data FOLDER]

Three tables over all six tasks, on real rows. First with `parity=True` and dropout on: the largest
difference over all updates of loss, gradient norm and learning rate, and of the final weights. Then
the default with dropout off: the largest relative difference of the loss. Then the gradient of 8
rows at once against 4 micro-batches of 2, ragged rows, under both trainers.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.machine import arguments, machine, minilm, read, table
from hflit import HFTrainer
from hflit.data.module import DataModule
from hflit.data.texts import Texts
from hflit.loading import load_base
from hflit.tasks import TASKS

ROWS = 96
SOURCES = {  # task -> data set, columns
    "text-classification": ("sst2", ("sentence", "label")),
    "question-answering": ("xquad_en", ("question", "context", "answers")),
    "sequence-sequence": ("multi30k_en_de", ("en", "de")),
    "language-generation": ("tiny_shakespeare", ("text",)),
    "language-modeling": ("wikitext2", ("text",)),
    "token-detection": ("wikitext2", ("text",)),
}
BUNDLED = Path(__file__).parent.parent / "examples" / "data" / "go_emotions" / "train.jsonl"
MASKED = ("language-modeling", "token-detection")
STEPS = {"per_device_train_batch_size": 8, "max_steps": 8, "logging_steps": 1, "seed": 7}


def rows_of(task: str, folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Real rows for a task: of the data folder, or else of what is bundled."""
    name, columns = SOURCES[task]
    if (folder / name).is_dir():
        return read(folder, name)[0].select(range(ROWS)).to_list(), columns
    lines = [json.loads(line) for line in BUNDLED.read_text().splitlines()[:ROWS]]
    if task == "question-answering":
        made = [
            {"question": row["label"], "context": row["text"], "answers": row["text"].split()[-1]}
            for row in lines
        ]
        return made, columns
    if task == "sequence-sequence":
        return [{"en": row["text"], "de": row["label"]} for row in lines], columns
    return lines, ("text", "label") if task == "text-classification" else ("text",)


def base_of(task: str, rows: list[dict[str, Any]], dropout: float) -> tuple[Any, Any]:
    """MiniLM where its kind serves; else a small seeded model with a tokenizer of the rows."""
    set_seed(0)
    if task not in ("sequence-sequence", "language-generation"):
        auto = {
            "text-classification": AutoModelForSequenceClassification,
            "question-answering": AutoModelForQuestionAnswering,
        }.get(task, AutoModelForMaskedLM)
        config = AutoConfig.from_pretrained(minilm())
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        model = auto.from_pretrained(minilm(), config=config)
        if task == "token-detection":
            model = TASKS[task].load(load_base((model, tokenizer)), {})
        return model, tokenizer
    tokenizer = tokenizer_of(rows)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    if task == "sequence-sequence":
        t5 = T5Config(
            **ids, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=dropout, decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(t5), tokenizer
    llama = LlamaConfig(
        **ids, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, attention_dropout=dropout, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(llama), tokenizer


def tokenizer_of(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 800 tokens, learned from the rows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = (str(value) for row in rows for value in row.values())
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def ours(task: str, base: Any, rows: Any, columns: Any, **options: Any) -> tuple[Any, Any]:
    """The run under hflit; also hands out the rows it tokenized."""
    kept: list[Any] = []
    original = DataModule.setup

    def setup(self: DataModule, stage: str | None = None) -> None:
        kept.append(self)
        original(self, stage)

    with patch.object(DataModule, "setup", setup), _silent():
        trainer = HFTrainer()
        extra = {"stride": 32} if task == "question-answering" else {}
        model, _ = trainer(
            base, rows, columns=columns, task=task, maxlength=96, cache=False, **extra, **options
        )
    return trainer, (model, kept[0].tokens["train"])


def theirs(task: str, base: Any, tokens: Any, callbacks: Any = None, **options: Any) -> Any:
    """The same rows under `transformers.Trainer`, with its standard collator."""
    model, tokenizer = base
    collators: dict[str, Callable[[], Any]] = {
        "sequence-sequence": lambda: DataCollatorForSeq2Seq(tokenizer, model=model),
        "language-generation": lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        **dict.fromkeys(MASKED, lambda: DataCollatorForLanguageModeling(tokenizer)),
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="runs/reference",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=task not in MASKED,
            **options,
        ),  # fmt: skip
        train_dataset=tokens,
        data_collator=collators.get(task, lambda: DataCollatorWithPadding(tokenizer))(),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    with _silent():
        trainer.train()
    return trainer


@contextmanager
def _silent() -> Iterator[None]:
    with patch("builtins.print"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def drawn_as_transformers_draws() -> Iterator[None]:
    """Masks from the global random numbers, so that the default can be compared at all.

    Guesses of a generator are the likeliest ones: rows cut by length draw in another order.
    """
    original = Texts.finish
    with (
        patch.object(Texts, "finish", lambda self, batch, seed: original(self, batch, None)),
        patch("torch.multinomial", lambda shares, _: shares.argmax(-1, keepdim=True)),
    ):
        yield


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Masks by token number and the likeliest guesses: the same in any cut of the rows."""

    def mask(self: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        chosen = (inputs % 5 == 0) & (inputs > 1000)
        labels = inputs.masked_fill(~chosen, -100)
        return inputs.masked_fill(chosen, self.tokenizer.mask_token_id), labels

    with (
        patch.object(DataCollatorForLanguageModeling, "torch_mask_tokens", mask),
        patch("torch.multinomial", lambda shares, _: shares.argmax(-1, keepdim=True)),
    ):
        yield


class KeepGradient(TrainerCallback):
    """Keeps the gradient of the update, in double precision."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Copy all of it, parameter after parameter."""
        parameters = details["model"].parameters()
        self.gradient = torch.cat(
            [p.grad.double().flatten() for p in parameters if p.grad is not None]
        )


def history(trainer: Any) -> list[dict[str, float]]:
    """Entries of the updates."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def parity_row(task: str, rows: Any, columns: Any) -> list[str]:
    """`parity=True`, dropout on: what differs."""
    base = base_of(task, rows, dropout=0.1)
    other = copy.deepcopy(base)
    trainer, (model, tokens) = ours(task, base, rows, columns, parity=True, **STEPS)
    reference = theirs(task, other, tokens, **STEPS)
    pairs = list(zip(history(trainer), history(reference), strict=True))
    cells = [
        f"{max(abs(a[name] - b[name]) for a, b in pairs):.3g}"
        for name in ("loss", "grad_norm", "learning_rate")
    ]
    weights = zip(model.state_dict().values(), other[0].state_dict().values(), strict=True)
    cells.append(f"{max(float((a - b).abs().max()) for a, b in weights):.3g}")
    return [task, type(model).__name__, str(len(pairs)), *cells]


def default_row(task: str, rows: Any, columns: Any) -> list[str]:
    """The default, dropout off: the largest relative difference of the loss."""
    base = base_of(task, rows, dropout=0.0)
    other = copy.deepcopy(base)
    with drawn_as_transformers_draws():
        trainer, (_, tokens) = ours(task, base, rows, columns, **STEPS)
    if task == "question-answering":
        _mask_padding(other[0])
    with drawn_as_transformers_draws():
        reference = theirs(task, other, tokens, **STEPS)
    pairs = zip(history(trainer), history(reference), strict=True)
    return [task, f"{max(abs(a['loss'] - b['loss']) / b['loss'] for a, b in pairs):.1e}"]


def _mask_padding(model: Any) -> None:
    """Keep padding out of the softmax over places, as hflit's default does."""
    original = model.qa_outputs.forward
    masks: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )

    def forward(hidden: Any) -> Any:
        hidden_logits = original(hidden)
        return hidden_logits.masked_fill(masks[-1][..., None] == 0, -1e30)

    model.qa_outputs.forward = forward


def gradient_row(task: str, rows: Any, columns: Any) -> list[str]:
    """8 rows at once against 4 x 2: relative difference of the gradient, under both trainers."""
    settings = {
        "max_steps": 1, "max_grad_norm": 0.0, "seed": 7,
    }  # fmt: skip
    start = base_of(task, rows, dropout=0.0)
    merge = {"merge": None} if task in (*MASKED, "language-generation") else {}

    def gradient(run: Callable[..., Any], batch: int, accumulation: int) -> torch.Tensor:
        kept = KeepGradient()
        with nothing_drawn():
            run(
                copy.deepcopy(start), per_device_train_batch_size=batch, callbacks=[kept],
                gradient_accumulation_steps=accumulation, **settings,
            )  # fmt: skip
        return kept.gradient

    tokens: list[Any] = []

    def under_hflit(base: Any, **options: Any) -> None:
        tokens.append(ours(task, base, rows, columns, **merge, **options)[1][1])

    def under_transformers(base: Any, **options: Any) -> None:
        theirs(task, base, tokens[0], **options)

    cells = []
    for run in (under_hflit, under_transformers):
        large, window = gradient(run, 8, 1), gradient(run, 2, 4)
        cells.append(f"{float((large - window).norm() / large.norm()):.1e}")
    return [task, *cells]


def main() -> None:
    """Make the three tables and keep them."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)  # bits depend on how sums are split over threads
    parity, default, gradients = [], [], []
    for task in TASKS:
        rows, columns = rows_of(task, options.data)
        parity.append(parity_row(task, rows, columns))
        default.append(default_row(task, rows, columns))
        gradients.append(gradient_row(task, rows, columns))
        print(parity[-1], default[-1], gradients[-1], flush=True)
    heads = ["task", "model", "updates", "loss", "grad_norm", "learning_rate", "weights"]
    text = "\n\n".join(
        [
            "`parity=True`, dropout 0.1: largest absolute difference from `transformers.Trainer`.",
            table(heads, parity),
            "Default, dropout off: largest relative difference of the loss. Question-answering: "
            "from a Trainer whose softmax over places leaves out padding, as ours does; masked "
            "tasks: with the masks that transformers draws, and in token-detection the likeliest "
            "guesses, since sampling depends on how rows are cut.",
            table(["task", "loss"], default),
            "Gradient of 8 rows at once against 4 x 2, ragged rows, relative difference.",
            table(["task", "hflit", "transformers.Trainer"], gradients),
            f"{machine()}.\n",
        ]
    )
    print(text)
    Path("benchmarks/results/parity.md").write_text(text)


if __name__ == "__main__":
    main()
