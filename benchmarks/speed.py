"""How fast is hflit beside what else trains the same rows, and how much memory does each take?

    python -m benchmarks.speed [--data FOLDER] [--only CASE ...] [--rounds N] [--results FILE]

Each trainer runs in a process of its own, on the same rows in the same order from the same seed,
dropout off but in the cases that name it, where draws differ and with them losses, a little. A
first run of each is not timed: its losses must agree, and it counts tokens and peak memory. Then
all run in turn, round after round, every second round backwards, and a ratio is the median over the
rounds of what one took over what hflit took in the same round. Each round draws another order of
the rows, the same for all, so that nobody has met its lengths before. Time counts from the first
forward to the last weight update.

The bare loop is PyTorch alone over the batches as hflit cuts them, with the task's own loss: what
it takes less is what hflit's loop costs. On a processor for which MKL, torch's library of matrix
products, is slow, hflit computes linear layers in oneDNN, and the bare loop with it: "hflit in MKL"
is hflit without that, as on all other processors. Both run in hflit's process. A share of the peak
is 6 x parameters (without tables of embeddings) x real tokens, against the fastest product of two
matrices just before the run, once in MKL and once in oneDNN; parameters that a token has no need to
meet are not counted for it: of a decoder for what the encoder reads; of a head, and of the last
layer but for its keys and values, for tokens that a classifier or a masked language model does not
read.

`transformers.Trainer` knows no packing: in `pack` it gets a row for each text, as many texts in an
update. In question-answering its softmax spreads over padding, so its losses are compared with
those of `parity=True`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    ElectraConfig,
    ElectraForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    get_scheduler,
    logging,
    set_seed,
)

from benchmarks.machine import arguments, machine, minilm, read, table
from benchmarks.parity import rows_of
from benchmarks.pictures import speed_picture
from benchmarks.sequences import tokenizer_of
from hflit.tasks.layers import mkl_is_slow

RESULTS = Path("benchmarks/results/speed.md")
SEED = 42
MASKED = 0.15  # of the tokens of a masked language model, as txtai and transformers mask them
OTHERS = ("transformers.Trainer", "group_by_length", "txtai", "hflit in MKL", "bare loop")
OWN = OTHERS[-2:]  # run in hflit's process


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        task: The task.
        data: Data set, and the columns to read.
        rows: How many of its training rows.
        batch: Rows of tokens in an update.
        call: Arguments of the call beside these.
        model: `minilm`, or a kind that is made from a config, with a vocabulary of that many.
        others: Whom hflit is compared with.
        tolerance: Largest relative difference of a loss: of each update, where the batches are the
            same, and of the mean of all, where masks are drawn or rows arranged differently.
        same: Whose updates each have the same loss.
        parity: Whether that loss is the one of `parity=True`, where hflit defines another.
        dropout: Whether the model keeps its own.
    """

    task: str
    data: tuple[str, tuple[str, ...]]
    rows: int
    batch: int
    call: dict[str, Any] = field(default_factory=dict)
    model: tuple[str, int] = ("minilm", 0)
    others: tuple[str, ...] = OTHERS
    tolerance: float = 1e-4
    same: tuple[str, ...] = ("transformers.Trainer", "txtai")
    parity: bool = False
    dropout: bool = False


CASES = {
    "text-classification, sst2": Case(
        "text-classification", ("sst2", ("sentence", "label")), 192, 32
    ),
    "text-classification, newsgroups20": Case(
        "text-classification", ("newsgroups20", ("text", "label")), 192, 32, {"maxlength": 512}
    ),
    "text-classification, sst2, dropout": Case(
        "text-classification", ("sst2", ("sentence", "label")), 192, 32, same=(), dropout=True
    ),
    "text-classification, newsgroups20, dropout": Case(
        "text-classification", ("newsgroups20", ("text", "label")), 192, 32, {"maxlength": 512},
        same=(), dropout=True,
    ),
    "question-answering, squad_v2": Case(
        "question-answering", ("squad_v2", ("question", "context", "answers")), 32, 16,
        # transformers spreads its softmax over padding too, and starts from other losses; so does
        # txtai, which pads a short last batch further.
        {"maxlength": 384}, same=("transformers.Trainer",), parity=True,
    ),
    "sequence-sequence, scitldr": Case(
        "sequence-sequence", ("scitldr", ("source", "target")), 32, 16, {"maxlength": 512},
        ("t5", 8_000),
    ),
    "language-generation, wikitext2, pack": Case(
        "language-generation", ("wikitext2", ("text",)), 120, 8,
        {"maxlength": 512, "merge": "pack"}, ("llama", 8_000), tolerance=0.05, same=(),
    ),
    "language-generation, wikitext2, 32,000 words": Case(
        "language-generation", ("wikitext2", ("text",)), 100, 8, {"maxlength": 512},
        ("llama", 32_000), ("transformers.Trainer", *OWN),
    ),
    "language-modeling, wikitext2": Case(
        "language-modeling", ("wikitext2", ("text",)), 192, 32, {"maxlength": 128},
        tolerance=0.1, same=(),
    ),
    "token-detection, wikitext2": Case(
        "token-detection", ("wikitext2", ("text",)), 128, 32, {"maxlength": 128},
        ("electra", 0), ("txtai", *OWN), tolerance=0.1, same=(),
    ),
}  # fmt: skip
SETTINGS = {"num_train_epochs": 1, "learning_rate": 5e-5, "seed": SEED}
AUTO: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "sequence-sequence": AutoModelForSeq2SeqLM,
    "language-generation": AutoModelForCausalLM,
    "language-modeling": AutoModelForMaskedLM,
}


def data_of(case: Case, folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Rows as all trainers can take them, and their columns."""
    name, columns = case.data
    if not (folder / name).is_dir():
        return rows_of(case.task, folder)
    rows = read(folder, name)[0].select(range(case.rows)).select_columns(list(columns)).to_list()
    if case.task == "question-answering":  # txtai reads an answer, or None
        for row in rows:
            row["answers"] = (row["answers"]["text"] or [None])[0]
    if name == "newsgroups20":  # txtai needs numbers
        classes = sorted({row["label"] for row in rows})
        rows = [{**row, "label": classes.index(row["label"])} for row in rows]
    return rows, columns


def save_base(case: Case, rows: list[dict[str, Any]], folder: Path) -> None:
    """Leave the model and tokenizer that all start from."""
    kind, words = case.model
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
    config = AutoConfig.from_pretrained(minilm())
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
    set_seed(SEED)
    if kind == "minilm":
        if not case.dropout:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        auto = AutoModel if case.task == "text-classification" else AutoModelForMaskedLM
        model: Any = auto.from_pretrained(minilm(), config=config)
    elif kind == "electra":
        model = ElectraForMaskedLM(
            ElectraConfig(
                **sizes, vocab_size=len(tokenizer), embedding_size=384, num_attention_heads=12,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    else:
        # More words than the texts have are never read; they cost what they cost.
        tokenizer = tokenizer_of(rows, case.data[1] * 2 if len(case.data[1]) == 1 else case.data[1])
        ids = {"vocab_size": words, "pad_token_id": 0, "eos_token_id": 1}
        if kind == "t5":
            model = T5ForConditionalGeneration(
                T5Config(
                    **ids, d_model=384, d_kv=64, d_ff=1536, num_layers=4, num_heads=6,
                    dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False,
                )
            )  # fmt: skip
            with torch.no_grad():  # T5's tables start at 1.0, far too wide
                model.shared.weight.mul_(0.3)
                model.lm_head.weight.mul_(0.05)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    **ids, **{**sizes, "intermediate_size": 1024}, num_attention_heads=6,
                    max_position_embeddings=512, bos_token_id=1,
                )
            )  # fmt: skip
        tokenizer.model_max_length = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# The trainers. Each starts from the folder, trains once and returns the losses it logged.


class Run:
    """One trainer on one case: prepared once, run as often as asked."""

    def __init__(self, case: Case, base: str, rows: Any, columns: tuple[str, ...]) -> None:
        import datasets

        self.case, self.base, self.columns = case, base, columns
        self.rows = datasets.Dataset.from_list(rows)
        self.settings = {**SETTINGS, "per_device_train_batch_size": case.batch}

    def hflit(self, every: int, **options: Any) -> list[float]:
        """The call."""
        from hflit import HFTrainer

        trainer = HFTrainer()
        trainer(
            self.base, self.rows, columns=self.columns, task=self.case.task, cache=False,
            logging_steps=every, **self.case.call, **self.settings, **options,
        )  # fmt: skip
        return _losses(trainer.state.log_history)

    def in_mkl(self, every: int) -> list[float]:
        """The call, with torch's own matrix products."""
        from hflit.tasks import layers

        with patch.object(layers, "mkl_is_slow", lambda: False):
            return self.hflit(every)

    def transformers(self, every: int, **options: Any) -> list[float]:
        """`transformers.Trainer` on the rows as hflit tokenizes them, padded to the longest."""
        tokenizer, tokens = (
            AutoTokenizer.from_pretrained(self.base),
            self._data()[0].tokens["train"],
        )
        settings = dict(self.settings)
        if self.case.call.get("merge") == "pack":  # it knows no packs: a row for each text
            plain = self._data(merge=None)[0].tokens["train"]
            settings["per_device_train_batch_size"] = round(
                len(plain) / len(tokens) * self.case.batch
            )
            tokens = plain
        set_seed(SEED)
        model = AUTO[self.case.task].from_pretrained(self.base, **self._labels())
        masked = self.case.task == "language-modeling"
        collators: dict[str, Callable[[], Any]] = {
            "sequence-sequence": lambda: DataCollatorForSeq2Seq(tokenizer, model=model),
            "language-generation": lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
            "language-modeling": lambda: DataCollatorForLanguageModeling(tokenizer),
        }
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir="runs/reference", save_strategy="no", use_cpu=True, disable_tqdm=True,
                report_to="none", logging_steps=every, remove_unused_columns=not masked,
                **settings, **options,
            ),
            collators.get(self.case.task, lambda: DataCollatorWithPadding(tokenizer))(),
            tokens,
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return _losses(trainer.state.log_history)

    def grouped(self, every: int) -> list[float]:
        """The same, with rows of like length together."""
        return self.transformers(every, train_sampling_strategy="group_by_length")

    def txtai(self, every: int) -> list[float]:
        """txtai's call."""
        from txtai.pipeline import HFTrainer

        kept: list[Any] = []
        train = Trainer.train

        def keep(trainer: Any, *args: Any, **options: Any) -> Any:
            kept.append(trainer)
            return train(trainer, *args, **options)

        columns = (*self.columns, None) if len(self.columns) == 1 else self.columns
        with patch.object(Trainer, "train", keep):
            HFTrainer()(
                self.base, self.rows, columns=columns, task=self.case.task,
                logging_steps=every, disable_tqdm=True, **self.case.call, **self.settings,
            )  # fmt: skip
        return _losses(kept[0].state.log_history)

    def bare(self, every: int) -> list[float]:
        """PyTorch alone: no Lightning, no callbacks, no log."""
        from hflit.loading import load_base
        from hflit.loop.switches import model_switched
        from hflit.tasks import TASKS

        data, args = self._data()
        set_seed(SEED)
        task = TASKS[self.case.task]
        start = load_base(self.base)
        changes = data.tokenization.config_changes(start.config)
        model = task.load(start, changes)
        own = {"tokenizer": start.tokenizer} if "tokenizer" in task.options else {}
        module = task(model, args, **own)
        windows = data.train_dataloader()
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.dim() > 1]},
                {"params": [p for p in model.parameters() if p.dim() <= 1]},
            ],
            lr=args.learning_rate, weight_decay=0.0, fused=True,
        )  # fmt: skip
        schedule = get_scheduler("linear", optimizer, 0, len(windows))
        set_seed(SEED)  # token-detection draws what it replaces
        model.train()
        losses = []
        with model_switched(model, args):
            for window in windows:
                items = sum(module.count_items(batch) for batch in window)
                loss = torch.zeros(())
                for batch in window:
                    for part in module._parts(batch):
                        mean = module._window_loss(part, items, 1)
                        mean.backward()
                        loss += mean.detach()
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss)
        return [float(loss) for loss in losses]

    def _labels(self) -> dict[str, Any]:
        if self.case.task != "text-classification":
            return {}
        return {"num_labels": len(set(self.rows[self.columns[-1]]))}

    def _data(self, **changes: Any) -> tuple[Any, Any]:
        from hflit.arguments import parse
        from hflit.loading import load_base
        from hflit.request import OPTIONS, read_data
        from hflit.tasks import TASKS

        given = {
            **OPTIONS, "train": self.rows, "validation": None, "columns": self.columns,
            "maxlength": None, "tokenizers": None, "tokenizebatch": 1000, "cache": False,
            "parity": False, "max_tokens_per_batch": None, **self.case.call, **changes,
        }  # fmt: skip
        args, _ = parse(self.settings)
        _, data = read_data(load_base(self.base), TASKS[self.case.task], given, args)
        data.setup()
        return data, args

    def size(self) -> dict[str, int]:
        """`real` tokens of an epoch, without padding, and the `work` of training on them."""
        tokens = self._data()[0].tokens["train"]
        read = sum(len(row) for row in tokens["input_ids"])
        # token-detection begins with a masked language model
        auto = AUTO.get(self.case.task, AutoModelForMaskedLM)
        model: Any = auto.from_pretrained(self.base, **self._labels())
        parameters = model.num_parameters(exclude_embeddings=True)
        if self.case.task != "sequence-sequence":
            # The head is needed at the tokens that it is read at, and so is the last layer but for
            # its keys and values.
            needed = {
                "text-classification": len(tokens),
                "language-modeling": MASKED * read,
                "token-detection": MASKED * read,
            }
            last = model.config.num_hidden_layers - 1
            met = re.compile(
                rf"layer\.{last}\.(?!attention\.self\.(key|value)\.)|pooler|classifier|cls|generator"
            )
            late = sum(p.numel() for name, p in model.named_parameters() if met.search(name))
            work = (parameters - late) * read + late * needed.get(self.case.task, read)
            if self.case.task == "token-detection":  # whose other half tells all tokens apart
                work += parameters * read
            return {"real": read, "work": round(6 * work)}
        written = sum(len(row) for row in tokens["labels"])
        # The decoder makes its keys and values of the tokens that the encoder read.
        met = re.compile(r"encoder\.(?!embed)|EncDecAttention\.[kv]\.")
        of_read = sum(
            p.numel()
            for name, p in model.named_parameters()
            if met.match(name) or met.search(name.removeprefix("decoder."))
        )
        work = 6 * (of_read * read + (parameters - of_read) * written)
        return {"real": read + written, "work": work}


PEERS: dict[str, Callable[[Run, int], list[float]]] = {
    "hflit": Run.hflit,
    "transformers.Trainer": Run.transformers,
    "group_by_length": Run.grouped,
    "txtai": Run.txtai,
    "hflit in MKL": Run.in_mkl,
    "bare loop": Run.bare,
}


def _losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


# Measuring.


class Clock:
    """Seconds of the wall and of the processor from the first forward to the last update."""

    def __enter__(self) -> Clock:
        self.start = self.stop = (0.0, 0.0)
        self.hooks = [
            register_module_forward_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        self.hooks[1].remove()

    def _begin(self, module: Any, _: Any) -> None:
        if isinstance(module, PreTrainedModel):
            self.start = time.perf_counter(), time.process_time()
            self.hooks[0].remove()

    def _end(self, *_: Any) -> None:
        self.stop = time.perf_counter(), time.process_time()

    @property
    def taken(self) -> list[float]:
        """Both."""
        return [end - start for start, end in zip(self.start, self.stop, strict=True)]


class Read:
    """Counts the tokens that a model reads, with their padding."""

    def __enter__(self) -> Read:
        self.tokens = 0
        self.hook = register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()

    def _count(self, module: Any, args: Any) -> None:
        # Tables of positions and token types are smaller than any vocabulary here.
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings > 1000 and args:
            self.tokens += args[0].numel()


def peak_flops() -> dict[str, float]:
    """Operations a second in a product of two matrices, in each library: the best of a few."""
    left, right = torch.randn(2, 1536, 1536)
    in_onednn = torch.ops.mkldnn._linear_pointwise
    products: dict[str, Callable[[], Any]] = {
        "MKL": lambda: left @ right,
        "oneDNN": lambda: in_onednn(left, right, None, "none", [], ""),
    }
    best = dict.fromkeys(products, 0.0)
    for _ in range(8):
        for library, product in products.items():
            start = time.perf_counter()
            product()
            best[library] = max(best[library], 2 * 1536**3 / (time.perf_counter() - start))
    return best


def peak_mib(reset: bool = False) -> float:
    """The most memory the process held since the last reset, in MiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(threads: int, pipe: Connection, *given: Any) -> None:
    """A process: runs a trainer as often as it is told, and says what it saw."""
    try:
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        run = Run(*given)
        while (told := pipe.recv()) != "stop":
            what, peer, number = told
            run.settings["seed"] = SEED + number
            train = PEERS[peer]
            with open(os.devnull, "w") as nowhere, patch("sys.stdout", nowhere):
                if what == "check":
                    facts: dict[str, Any] = {}
                    if peer == "hflit":
                        facts = run.size()
                        if run.case.parity:
                            facts["parity"] = run.hflit(1, parity=True)
                    before = peak_mib(reset=True)
                    with Read() as read:
                        losses = train(run, 1)
                    facts |= {"read": read.tokens, "losses": losses, "before": before}
                    pipe.send({**facts, "mib": peak_mib()})
                else:
                    peak = peak_flops()
                    with Clock() as clock:
                        train(run, 500)
                    pipe.send({"taken": clock.taken, "peak": peak})
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def measure(name: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """All trainers on a case: what each saw, and the seconds of every round."""
    case = CASES[name]
    rows, columns = data_of(case, folder)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with tempfile.TemporaryDirectory() as base:
        save_base(case, rows, Path(base))
        others = [each for each in case.others if mkl_is_slow() or each != "hflit in MKL"]
        for peer in ("hflit", *others):
            if peer in OWN:
                pipes[peer] = pipes["hflit"]
                continue
            pipes[peer], theirs = context.Pipe()
            given = (threads, theirs, case, base, rows, columns)
            context.Process(target=serve, args=given, daemon=True).start()
        found = {peer: _ask(pipe, "check", peer, 0) for peer, pipe in pipes.items()}
        check_losses(name, found)
        for each in found.values():
            each["rounds"] = []
        for number in range(1, rounds + 1):
            for peer in list(pipes)[:: 1 if number % 2 else -1]:
                found[peer]["rounds"].append(_ask(pipes[peer], "run", peer, number))
        for pipe in set(pipes.values()):
            pipe.send("stop")
    return found


def _ask(pipe: Connection, *what: str | int) -> dict[str, Any]:
    pipe.send(what)
    answer = pipe.recv()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def check_losses(name: str, found: dict[str, Any]) -> None:
    """Raise RuntimeError where a trainer did not do what hflit did."""
    case = CASES[name]
    for peer in found:
        is_own = peer in ("hflit", *OWN)
        ours = found["hflit"]["parity" if case.parity and not is_own else "losses"]
        theirs = found[peer]["losses"]
        same = peer in OWN or peer in case.same
        tolerance = 1e-4 if peer in OWN else max(case.tolerance, 0.0 if same else 0.05)
        if same:
            pairs = zip(ours, theirs, strict=True)
            worst = max(abs(a - b) / abs(a) for a, b in pairs)
        else:
            mean = sum(ours) / len(ours)
            worst = abs(sum(theirs) / len(theirs) - mean) / mean
        if worst > tolerance:
            raise RuntimeError(
                f"{name}: the losses of {peer} are {theirs}, those of hflit {ours}: "
                f"{worst:.1e} apart."
            )


# Telling.


def ratio(found: dict[str, Any], peer: str, clock: int = 0) -> tuple[float, float, float]:
    """How many times as long as hflit a trainer took: median and range over the rounds."""
    each = [
        theirs["taken"][clock] / ours["taken"][clock]
        for theirs, ours in zip(found[peer]["rounds"], found["hflit"]["rounds"], strict=True)
    ]
    return median(each), min(each), max(each)


def lines_of(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Rows of the table."""
    ours, lines = found["hflit"], []
    passes = 2 if CASES[name].task == "token-detection" else 1
    for peer, each in found.items():
        seconds = median(run["taken"][0] for run in each["rounds"])
        work = ours["work"]
        shares = [
            median(work / run["taken"][0] / run["peak"][library] for run in each["rounds"])
            for library in ("MKL", "oneDNN")
        ]
        middle, low, high = ratio(found, peer)
        cpu = ratio(found, peer, 1)
        lines.append(
            [
                name if peer == "hflit" else "", peer, f"{ours['real'] / seconds:,.0f}",
                "" if peer == "hflit" else f"{middle:.2f} ({low:.2f} to {high:.2f})",
                "" if peer == "hflit" else f"{cpu[0]:.2f} ({cpu[1]:.2f} to {cpu[2]:.2f})",
                f"{1 - passes * ours['real'] / each['read']:.2f}",
                " / ".join(f"{share:.2f}" for share in shares),
                *(["", ""] if peer in OWN else memory_of(each, ours)),
                f"{sum(each['losses']) / len(each['losses']):.4f}",
            ]
        )  # fmt: skip
    return lines


def memory_of(each: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Peak memory of a trainer that has a process of its own."""
    return [f"{each['mib']:,.0f}", f"{each['mib'] / ours['mib']:.2f}"]


HEADS = [
    "case", "trainer", "real tokens/s", "time against hflit (range)", "CPU time against hflit",
    "padding", "share of peak (MKL / oneDNN)", "peak MiB", "memory against hflit", "mean loss",
]  # fmt: skip


def main() -> None:
    """Measure what was asked for, print the table and keep it."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table's file")
    options = parser.parse_args()
    record = options.results.with_suffix(".json")
    kept = json.loads(record.read_text()) if record.exists() else {}
    for name in options.only:
        kept[name] = measure(name, options.data, options.rounds, options.threads)
        print(table(HEADS, lines_of(name, kept[name])), flush=True)
        # A run of some cases replaces their figures and leaves the others.
        record.write_text(json.dumps(kept) + "\n")
    kept = {name: kept[name] for name in CASES if name in kept}
    lines = list(itertools.chain.from_iterable(lines_of(name, kept[name]) for name in kept))
    torch.set_num_threads(options.threads)
    rounds = min(len(found["hflit"]["rounds"]) for found in kept.values())
    options.results.write_text(
        f"{table(HEADS, lines)}\n\n{str(__doc__).split(chr(10), 4)[4].strip()}\n\n"
        f"{rounds} rounds, fp32; {machine()}.\n"
    )
    ratios = {n: {p: ratio(f, p) for p in f if p != "hflit"} for n, f in kept.items()}
    speed_picture(ratios, options.results.with_suffix(""))


if __name__ == "__main__":
    main()
