"""A tiny base and a few rows for each of the six tasks."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hflit.loading import load_base
from hflit.tasks import TASKS
from tests.conftest import WORDS, word_tokenizer

BERT = {
    "vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXTS = [" ".join(WORDS[(7 * i + j) % 100] for j in range(3 + i % 9)) for i in range(24)]


def make(task, seed, labels=3, problem="single_label_classification"):
    torch.manual_seed(seed)
    if task == "text-classification":
        config = BertConfig(**BERT, num_labels=labels, problem_type=problem)
        return BertForSequenceClassification(config), word_tokenizer()
    if task == "question-answering":
        return BertForQuestionAnswering(BertConfig(**BERT)), word_tokenizer()
    if task == "language-generation":
        config = GPT2Config(
            vocab_size=105, n_embd=32, n_layer=1, n_head=2, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
        return GPT2LMHeadModel(config), word_tokenizer()
    if task == "sequence-sequence":
        config = T5Config(
            vocab_size=105, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config), word_tokenizer()
    base = BertForMaskedLM(BertConfig(**BERT)), word_tokenizer()
    if task == "token-detection":
        return TASKS[task].load(load_base(base), {}), base[1]
    return base


def rows(task):
    if task == "text-classification":
        return [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    if task == "question-answering":
        return [
            {"question": "w1 w2", "context": text, "answers": text.split()[-1]} for text in TEXTS
        ]
    if task == "sequence-sequence":
        return [{"source": text, "target": text[::-1] + " w5"} for text in TEXTS]
    return [{"text": text} for text in TEXTS]
