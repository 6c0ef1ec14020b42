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
# # Train a language model from scratch
#
# Nothing here is pretrained: a tokenizer learns the words of 1,000 speeches of Shakespeare, a GPT-2
# of 0.7 million weights learns to go on with them, and `transformers.pipeline` lets it speak.
#
# Needs `pip install hflit`; no network after that. About two minutes on two cores.

# %%
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline, set_seed

from hflit import HFTrainer

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()

speeches = (
    (HERE / "data" / "shakespeare" / "speeches.txt").read_text(encoding="utf-8").split("\n\n")
)
train, validation = speeches[:-100], speeches[-100:]
print(len(train), "speeches to train on,", len(validation), "to validate; the first one:\n")
print(train[0])

# %% [markdown]
# ## A tokenizer
#
# Byte-pair encoding of the training speeches alone, with 1,000 tokens. One of them, `<end>`, stands
# behind each speech, so that the model learns where to stop.

# %%
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(
    train,
    trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
print(tokenizer.tokenize("Speak, good citizens."))

# %% [markdown]
# ## A model
#
# A GPT-2 made from a config: random weights, so what it says is noise.

# %%
set_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=128,
        n_layer=3,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
)
print(f"{model.num_parameters():,} weights")


def speak(start: str, length: int = 60) -> str:
    """What the model makes of the start of a speech."""
    set_seed(1)
    writer = pipeline("text-generation", model.eval(), tokenizer=tokenizer)
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 40, "max_new_tokens": length}
    return writer(start, **sampled)[0]["generated_text"]


print(speak("CORIOLANUS:\n"))

# %% [markdown]
# ## Train
#
# `merge="concat"` (the default) strings the speeches together, each with its `<end>`, and cuts rows
# of `maxlength` tokens: none is lost and nothing is padded. `metrics="auto"` gives perplexity and
# the share of tokens that were the model's first guess.

# %%
trainer = HFTrainer()
model, tokenizer = trainer(
    (model, tokenizer),
    [{"text": speech} for speech in train],
    [{"text": speech} for speech in validation],
    task="language-generation",
    metrics="auto",
    maxlength=64,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    num_train_epochs=3,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=32,
    eval_strategy="epoch",
    eval_on_start=True,
)
for entry in trainer.state.log_history:
    if "eval_perplexity" in entry:
        print(
            f"epoch {entry['epoch']:.0f}  perplexity {entry['eval_perplexity']:7.1f}  "
            f"next token right {entry['eval_token_accuracy']:.3f}"
        )
assert trainer.metrics["eval_perplexity"] < 200

# %% [markdown]
# A perplexity of 1,000 is a blind guess among 1,000 tokens. The speech is no Shakespeare after two
# minutes, but it has learned that speeches have a speaker, lines and English words.

# %% [markdown]
# ## Use it
#
# The model in memory, in `transformers.pipeline`:

# %%
print(speak("CORIOLANUS:\n", length=100))
