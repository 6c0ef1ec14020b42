"""Cuts the demo's data out of GoEmotions: six emotions, one label a row, no random numbers.

    python examples/data/make_go_emotions.py SOURCE

SOURCE is a folder with GoEmotions as `train.jsonl` and `validation.jsonl`, each row with a `text`
and a list of label names, `labels`. The result is written to `go_emotions/` beside this file.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

EMOTIONS = ("amusement", "anger", "gratitude", "love", "sadness", "surprise")
ROWS_PER_EMOTION = 720  # the large classes are cut here, so that none outweighs the rest
VALIDATION_EVERY = 6  # every sixth row of an emotion is for validation

# The comments come from Reddit. Rows with these words are left out; milder ones stay.
RUDE = re.compile(
    r"fuck|shit|bitch|cunt|whore|slut|nigg|fag|retard|tard\b|rape|porn|dick|cock|pussy|masturb|suicid",
    re.IGNORECASE,
)


def read(path: Path) -> list[dict]:
    """Return the rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main(source: Path, target: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl` to `target`, in the order of the source."""
    splits = defaultdict(list)
    count: Counter[str] = Counter()
    seen = set()

    for name in ("train.jsonl", "validation.jsonl"):
        for row in read(source / name):
            text, labels = row["text"].strip(), row["labels"]
            if len(labels) != 1 or labels[0] not in EMOTIONS or RUDE.search(text):
                continue
            label, key = labels[0], text.lower()
            if key in seen or count[label] == ROWS_PER_EMOTION:
                continue

            seen.add(key)
            count[label] += 1
            split = "train" if count[label] % VALIDATION_EVERY else "validation"
            splits[split].append({"text": text, "label": label})

    target.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(split, len(rows), dict(sorted(Counter(row["label"] for row in rows).items())))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent / "go_emotions")
