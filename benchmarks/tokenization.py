"""How fast do texts become Arrow, and what do many rows cost?

    python -m benchmarks.tokenization [--data FOLDER] [--rows N ...]

First the tokens per second of hflit's tokenization against those of `tokenizers.encode_batch_fast`
on the same rows, and of `datasets.map` with the tokenizer's own call: A B C A B C, medians. Then
tokenizing, and one pass over the batches of an epoch, at growing numbers of rows, each in a process
of its own: seconds, and how much memory the process gains. Rows are cached on disk and mapped.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import datasets
from transformers import AutoTokenizer

from benchmarks.machine import arguments, machine, minilm, read, table
from benchmarks.parity import rows_of
from benchmarks.pictures import growth_picture
from hflit.arguments import parse
from hflit.data.formats import data_module
from hflit.data.texts import Texts

RESULTS = Path("benchmarks/results/tokenization.md")
REPEATED = 4  # times the rows are taken, for a run of seconds
ROUNDS = 5


def texts_of(folder: Path) -> list[str]:
    """Real texts: WikiText, or what is bundled."""
    if (folder / "wikitext2").is_dir():
        return list(read(folder, "wikitext2")[0]["text"])
    return [row["text"] for row in rows_of("language-modeling", folder)[0]]


def rates(texts: list[str]) -> dict[str, list[float]]:
    """Tokens per second of each way, round after round."""
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
    rows = datasets.Dataset.from_dict({"text": texts * REPEATED})
    datasets.disable_progress_bars()

    def library() -> None:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        listed = list(rows["text"])
        for start in range(0, len(listed), 1000):
            backend.encode_batch_fast(listed[start : start + 1000])

    def ours() -> None:
        _tokenized(rows, tokenizer, cache=False)

    def call() -> None:
        rows.map(
            lambda batch: tokenizer(batch["text"], return_attention_mask=False, verbose=False),
            batched=True, keep_in_memory=True, load_from_cache_file=False, remove_columns=["text"],
        )  # fmt: skip

    tokens = sum(map(len, _tokenized(rows, tokenizer, cache=False).tokens["train"]["input_ids"]))
    ways: dict[str, Callable[[], None]] = {
        "encode_batch_fast": library,
        "hflit": ours,
        "datasets.map": call,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(tokens / (time.perf_counter() - start))
    return found


def _tokenized(rows: Any, tokenizer: Any, cache: bool, batch: int = 32) -> Any:
    args, _ = parse({"per_device_train_batch_size": batch})
    data = data_module(
        rows, tokenization=Texts(tokenizer, maxlength=128, merge=None), args=args, cache=cache
    )
    data.setup()
    return data


def resident() -> float:
    """Memory of this process in MiB that is its own, without mapped files (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def grow(count: int, texts: list[str], pipe: Any) -> None:
    """A process: tokenizes so many rows from a file, and reads all batches of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        datasets.disable_progress_bars()
        many = datasets.Dataset.from_generator(
            lambda: ({"text": texts[row % len(texts)]} for row in range(count)), cache_dir=folder
        )
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        tokenizer(texts[:8])
        before, start = resident(), time.perf_counter()
        data = _tokenized(many, tokenizer, cache=True, batch=256)
        tokenized = time.perf_counter()
        tokens = sum(int(b["attention_mask"].sum()) for w in data.train_dataloader() for b in w)
        end = time.perf_counter()
        pipe.send((count, tokens, tokenized - start, end - tokenized, resident() - before))


def main() -> None:
    """Measure, print and keep."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = texts_of(options.data)
    context = multiprocessing.get_context("spawn")
    grown = []
    for count in options.rows:
        pipe, theirs = context.Pipe()
        process = context.Process(target=grow, args=(count, [t[:120] for t in texts], theirs))
        process.start()
        grown.append(pipe.recv())
        process.join()
        print(grown[-1], flush=True)
    found = rates(texts)
    speed = [
        [name, f"{median(each):,.0f}", f"{min(each):,.0f} to {max(each):,.0f}",
         f"{median(a / b for a, b in zip(each, found['encode_batch_fast'], strict=True)):.2f}"]
        for name, each in found.items()
    ]  # fmt: skip
    growth = [
        [f"{rows:,}", f"{tokens:,}", f"{made:.1f}", f"{passed:.1f}", f"{mib:,.0f}",
         f"{mib * 2**20 / tokens:.2f}"]
        for rows, tokens, made, passed, mib in grown
    ]  # fmt: skip
    heads = ["rows", "tokens", "s to tokenize", "s to read an epoch", "MiB gained", "bytes a token"]
    text = (
        f"{table(['way', 'tokens/s', 'range', 'of encode_batch_fast'], speed)}\n\n"
        f"WikiText, {len(texts) * REPEATED:,} rows, {ROUNDS} rounds.\n\n{table(heads, growth)}\n\n"
        f"WikiText, texts cut at 120 characters. Memory without mapped files. {machine()}.\n"
    )
    print(text)
    RESULTS.write_text(text)
    growth_picture(grown, RESULTS.with_suffix(""))


if __name__ == "__main__":
    main()
