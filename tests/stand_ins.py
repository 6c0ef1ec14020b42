"""A folder in which the names of README, docs and configs/ stand for tiny models and few rows.

A name of the Hub is also the name of a folder, and folders come first. So what is written for a
real model runs word for word, with nothing replaced but what the names stand for.
"""

import json
from pathlib import Path

from tests.tasks.tiny import TEXTS, make, rows

ROOT = Path(__file__).parent.parent

MODELS = {  # name -> task of the tiny model that goes by it
    "sentence-transformers/all-MiniLM-L6-v2": "text-classification",
    "nreimers/MiniLM-L3-H384-uncased": "text-classification",
    "microsoft/MiniLM-L12-H384-uncased": "question-answering",
    "google-t5/t5-small": "sequence-sequence",
    "openai-community/gpt2": "language-generation",
    "google-bert/bert-base-uncased": "language-modeling",
    "google/electra-small-generator": "language-modeling",
}
DATA = {
    "rajpurkar/squad_v2": rows("question-answering"),
    "bentrevett/multi30k": [{"en": text, "de": text[::-1]} for text in TEXTS],
}
SHORT = {"maxlength": 32, "stride": 8, "target_maxlength": 32}  # the tiny models take no more


def build(folder: Path, *names: str) -> None:
    """Put what the names stand for into a folder, beside configs/ and examples/."""
    for linked in ("configs", "examples"):
        (folder / linked).symlink_to(ROOT / linked)
    for name in names:
        place = folder / name
        if name in MODELS:
            for each in make(MODELS[name], seed=0):
                each.save_pretrained(place)
        elif name in DATA:
            place.mkdir(parents=True)
            for split in ("train", "validation"):
                lines = [json.dumps(row) + "\n" for row in DATA[name]]
                (place / f"{split}.jsonl").write_text("".join(lines))
