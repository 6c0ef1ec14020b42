"""The language tasks against transformers, and packed rows against rows that run alone."""

import random

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CanineTokenizer,
    DataCollatorForLanguageModeling,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
    XLMConfig,
    XLMWithLMHeadModel,
)

from hflit import HFTrainer
from hflit.data.batching import Collator
from hflit.data.module import DataModule
from hflit.data.texts import Texts, pack
from hflit.tasks import TASKS
from tests.conftest import WORDS, word_tokenizer
from tests.tasks import tiny

MAXLENGTH = 32
SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "logging_steps": 1,
}


def gpt_tokenizer():
    """Words, an end of text and a padding token: nothing is added to a text."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=64
    )


def gpt2(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=102, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), gpt_tokenizer()


def bert(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=105, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForMaskedLM(config), word_tokenizer()


ONE_STEP = {"per_device_train_batch_size": 4, "logging_steps": 1}
MODELS = {"language-generation": gpt2, "language-modeling": bert}


@pytest.fixture
def texts():
    words = random.Random(0)
    return [" ".join(words.choices(WORDS, k=words.randint(3, 40))) for _ in range(30)]


def concatenated(tokenizer, texts, length):
    """Rows of `length` tokens, in plain Python: each text, its end, the next text."""
    stream, special = [], []
    for text in texts:
        tokens = tokenizer(text, return_special_tokens_mask=True)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream += tokens["input_ids"] + end
        special += tokens["special_tokens_mask"] + [1] * len(end)
    cuts = range(0, len(stream), length)
    return [
        {
            "input_ids": stream[at : at + length],
            "special_tokens_mask": special[at : at + length],
            "attention_mask": [1] * len(stream[at : at + length]),
        }
        for at in cuts
    ]


def train(task, base, texts, **arguments):
    trainer = HFTrainer()
    model, tokenizer = trainer(
        base, [{"text": text} for text in texts], task=task, maxlength=MAXLENGTH, **arguments
    )
    return trainer, model, tokenizer


def reference(task, base, texts, **arguments):
    model, tokenizer = base
    rows = concatenated(tokenizer, texts, MAXLENGTH)
    if task == "language-generation":
        rows = [{k: v for k, v in row.items() if k != "special_tokens_mask"} for row in rows]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            use_cpu=True,
            disable_tqdm=False,
            remove_unused_columns=False,
            **{"output_dir": "reference", "save_strategy": "no", **arguments},
        ),  # fmt: skip
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=task == "language-modeling"),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state, model


CASES = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "smoothing and bf16": {"label_smoothing_factor": 0.1, "bf16": True},
}


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("task", MODELS)
def test_parity_is_bit_identical_with_dropout(task, texts, case):
    settings = {**SETTINGS, **case}
    theirs, their_model = reference(task, MODELS[task](dropout=0.1), texts, **settings)
    trainer, model, _ = train(task, MODELS[task](dropout=0.1), texts, parity=True, **settings)

    figures = ("loss", "grad_norm", "learning_rate")
    expected = [{k: e[k] for k in figures} for e in theirs.log_history if "loss" in e]
    actual = [{k: e[k] for k in figures} for e in trainer.state.log_history if "loss" in e]
    assert actual == expected
    for name, weight in their_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def losses(state):
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=102, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), gpt_tokenizer()


def test_default_generation_stays_within_rounding(texts):
    theirs, _ = reference("language-generation", llama(), texts, **SETTINGS)
    trainer, *_ = train("language-generation", llama(), texts, **SETTINGS)
    torch.testing.assert_close(losses(trainer.state), losses(theirs), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
def test_no_cache_is_kept_in_training_by_a_model_given_as_an_object(texts):
    """Its body has the caller's config, which once said otherwise; that moved the last bit."""
    theirs, their_model = reference("language-generation", llama(), texts, **SETTINGS)
    trainer, model, _ = train("language-generation", llama(), texts, parity=True, **SETTINGS)
    assert losses(trainer.state) == losses(theirs)
    for name, weight in their_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    base = llama()
    seen = []
    base[0].model.register_forward_hook(lambda *_: seen.append(base[0].model.config.use_cache))
    train("language-generation", base, texts, max_steps=1)
    # Before and after the run, a look at whether it is causal and another at its head.
    assert False in seen
    assert base[0].config.use_cache


def mixtral(share):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=102, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_local_experts=4,
        bos_token_id=1, eos_token_id=1, pad_token_id=0, num_key_value_heads=2,
        output_router_logits=True, router_aux_loss_coef=share,
    )  # fmt: skip
    return MixtralForCausalLM(config), gpt_tokenizer()


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
def test_experts_learn_to_share_the_work_where_their_config_asks(texts):
    """Once the loss of its router was dropped in silence."""
    first = {}
    for share in (0.0, 0.5):
        for parity in (False, True):
            settings = {**SETTINGS, "max_steps": 2, "parity": parity, "merge": "concat"}
            trainer, _, _ = train("language-generation", mixtral(share), texts, **settings)
            first[share, parity] = losses(trainer.state)
        assert first[share, False] == pytest.approx(first[share, True], rel=1e-5)
    assert first[0.5, False][0] > first[0.0, False][0] + 0.4  # 0.5 x at least 1, by its formula


def test_a_model_that_reads_images_too_learns_from_texts(texts):
    """Its config has its vocabulary in the part for texts."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes, "vocab_size": 102, "intermediate_size": 32, "num_key_value_heads": 1,
        "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {**sizes, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    found = {}
    for parity in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config), gpt_tokenizer()
        settings = {**SETTINGS, "max_steps": 2, "parity": parity}
        trainer, _, _ = train("language-generation", base, texts, **settings)
        found[parity] = losses(trainer.state)
    assert found[False] == pytest.approx(found[True], rel=1e-5)


def test_padding_on_the_left_predicts_nothing(texts):
    """Once the first token of a row was predicted from padding, where there was some."""
    found = []
    for side in ("right", "left"):
        for batch, windows in ((8, 1), (2, 4)):
            base = llama()
            base[1].padding_side = side
            trainer, _, _ = train(
                "language-generation", base, texts, merge=None, max_steps=2,
                per_device_train_batch_size=batch, gradient_accumulation_steps=windows,
            )  # fmt: skip
            found.append(losses(trainer.state))
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-6)


def test_gpt2_loss_is_the_mean_over_predicted_tokens(texts):
    """transformers 5.23 also counts the first token of a row, which nothing predicts."""
    theirs, _ = reference("language-generation", gpt2(), texts, max_steps=1, **ONE_STEP)
    trainer, *_ = train("language-generation", gpt2(), texts, max_steps=1, **ONE_STEP)
    (expected,), (actual,) = losses(theirs), losses(trainer.state)
    assert actual == pytest.approx(expected * MAXLENGTH / (MAXLENGTH - 1), rel=1e-5)


@pytest.mark.parametrize("merge", ["concat", "pack", None])
@pytest.mark.parametrize("task", MODELS)
def test_accumulation_equals_one_large_batch(task, texts, merge):
    """transformers 5.23 takes masked-language windows with a loss four times too large."""

    def run(batch, accumulation):
        # Masks are drawn batch by batch, so the two runs are given the same masked rows.
        trainer, model, _ = train(
            task, MODELS[task](), texts, merge=merge, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=1, logging_steps=1,
            max_grad_norm=0.0, learning_rate=1.0, optim="sgd",
        )  # fmt: skip
        return trainer.state.log_history[0], model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Texts, "finish", _mask_by_token(Texts.finish))
        large, large_model = run(8, 1)
        window, window_model = run(2, 4)
    assert window["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert window["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-6)
    for name, weight in large_model.state_dict().items():
        torch.testing.assert_close(window_model.state_dict()[name], weight, rtol=0, atol=1e-6)


def _mask_by_token(finish):
    """Mask every token with an even id: no draws, so the same in any batch."""

    def finished(self, batch, seed):
        if not self.masked:
            return finish(self, batch, seed)
        self.masked = False
        try:
            batch = finish(self, batch, seed)
        finally:
            self.masked = True
        chosen = (batch["input_ids"] % 2 == 0) & (batch["input_ids"] > 4)
        batch["labels"] = batch["input_ids"].masked_fill(~chosen, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(chosen, 4)
        return batch

    return finished


# Rows.


def rows_of(texts, tokenizer, **options):
    """Tokenized rows of a data set, as lists of ids."""
    batch = options.pop("tokenizebatch", 1000)
    tokenization = Texts(tokenizer, None, options.pop("maxlength", MAXLENGTH), **options)
    tokens = datasets.Dataset.from_dict({"text": texts}).map(
        tokenization, batched=True, batch_size=batch, remove_columns=["text"],
        features=tokenization.features,
    )  # fmt: skip
    return tokenization, tokenization.arrange(tokens)


@pytest.mark.parametrize("tokenizebatch", [1, 7, 10, 1000])
@pytest.mark.parametrize("tokenizer", [gpt_tokenizer, word_tokenizer])
def test_19_concat_keeps_every_token_for_any_tokenizebatch(texts, tokenizer, tokenizebatch):
    """txtai drops the tail of every tokenizing batch: 1,472, 1,280 or 960 of 1,500 tokens."""
    expected = [row["input_ids"] for row in concatenated(tokenizer(), texts, MAXLENGTH)]
    _, rows = rows_of(texts, tokenizer(), tokenizebatch=tokenizebatch)
    assert rows["input_ids"][:] == expected


def test_20_texts_are_separated_and_their_end_is_learned():
    """txtai runs GPT-style texts together, and masks every end of text where it also pads."""
    tokenizer = gpt_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenization, rows = rows_of(["w1 w2", "w3 w4"], tokenizer, maxlength=8)
    w1, w2, w3, w4 = tokenizer("w1 w2 w3 w4")["input_ids"]
    end = tokenizer.eos_token_id
    assert rows["input_ids"][:] == [[w1, w2, end, w3, w4, end]]
    collator = Collator(tokenization.padding, "right", tokenization.finish)
    batch = collator([rows[0], {"input_ids": [w1, end]}])
    assert batch["labels"].tolist() == [
        [w1, w2, end, w3, w4, end],
        [w1, end, -100, -100, -100, -100],
    ]


@pytest.mark.parametrize("merge", ["concat", "pack", None])
def test_18_no_row_is_longer_than_maxlength(texts, merge):
    """txtai lets merge=None and merge="pack" outgrow the model: IndexError at its positions."""
    _, rows = rows_of(["w1 " * 300, *texts], gpt_tokenizer(), merge=merge)
    assert max(len(ids) for ids in rows["input_ids"]) <= MAXLENGTH
    if merge != None:  # noqa: E711
        assert sum(len(ids) for ids in rows["input_ids"]) == sum(
            len(text.split()) + 1 for text in ["w1 " * 300, *texts]
        )


def test_packs_hold_whole_rows_tightly():
    draw = random.Random(1)
    lengths = [draw.randint(1, MAXLENGTH) for _ in range(500)]
    packs = pack(np.array(lengths), MAXLENGTH)
    assert sorted(row for rows in packs for row in rows) == list(range(500))
    filled = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(filled) <= MAXLENGTH
    assert len(packs) <= 1.05 * sum(lengths) / MAXLENGTH  # a bound on the best possible number


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "bert", "roberta"])
def test_21_packed_rows_do_not_see_each_other(texts, kind, attention, side):
    """In txtai's packs, attention and positions run across texts."""
    torch.manual_seed(0)
    small = {
        "vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 66,
    }  # fmt: skip
    model = {
        "gpt2": lambda: gpt2()[0],
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**small)),
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(**small, num_key_value_heads=1, sliding_window=3)
        ),
        "bert": lambda: BertForMaskedLM(BertConfig(**small)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**small, pad_token_id=1)),
    }[kind]()
    model.set_attn_implementation(attention)
    model.eval()
    masked = kind in ("bert", "roberta")
    task = TASKS["language-modeling" if masked else "language-generation"](model, _args())
    tokenizer = gpt_tokenizer() if kind == "gpt2" else word_tokenizer()
    tokenization, rows = rows_of(texts, tokenizer, merge="pack")
    batch = Collator(tokenization.padding, side, tokenization.finish)(list(rows))
    assert batch["input_ids"].shape[1] <= MAXLENGTH < sum(map(len, rows["input_ids"]))
    with torch.no_grad():
        logits = task(batch)["logits"]
        worst = 0.0
        for row in range(len(logits)):
            for document in batch["documents"][row].unique():
                place = (batch["documents"][row] == document) & (document >= 0)
                if not place.any():
                    continue
                alone = model(input_ids=batch["input_ids"][row][place][None]).logits[0]
                worst = max(worst, float((logits[row][place] - alone).abs().max()))
    assert worst < 1e-6


LEAKS = {  # a window seen through, a convolution that goes on, no mask or no positions of that kind
    "modernbert": lambda size: ModernBertForMaskedLM(
        ModernBertConfig(**size, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0)
    ),
    "lfm2": lambda size: Lfm2ForCausalLM(
        Lfm2Config(**size, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    ),
    "deberta": lambda size: DebertaV2ForMaskedLM(DebertaV2Config(**size, relative_attention=True)),
    "bloom": lambda size: BloomForCausalLM(
        BloomConfig(vocab_size=105, hidden_size=32, n_layer=1, n_head=2)
    ),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_model_in_which_packed_texts_would_meet_is_refused(texts, kind):
    size = {
        "vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LEAKS[kind](size)
    task = "language-generation" if "CausalLM" in type(model).__name__ else "language-modeling"
    rows = [{"text": text} for text in texts]
    expected = f"merge='pack' lets each text run as if alone, and {type(model).__name__} "
    with pytest.raises(ValueError, match=expected):
        HFTrainer()((model, word_tokenizer()), rows, task=task, merge="pack", maxlength=32)


def test_a_model_that_takes_no_positions_without_a_mask_is_refused(texts):
    """XLM ends in an assertion that says nothing."""
    config = XLMConfig(vocab_size=105, emb_dim=32, n_layers=1, n_heads=2, pad_index=0, bos_index=2)
    base = XLMWithLMHeadModel(config), word_tokenizer()
    with pytest.raises(ValueError, match="merge='pack' .* XLMWithLMHeadModel does not take"):
        train("language-modeling", base, texts, merge="pack", max_steps=1)


def test_an_encoder_would_see_what_it_is_to_predict(tmp_path):
    """transformers warns, BERT reaches a loss near 0 and has learned nothing."""
    encoder, tokenizer = BertForMaskedLM(BertConfig(**tiny.BERT)), word_tokenizer()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = tiny.rows("language-generation")
    call = {"task": "language-generation", "merge": None, "max_steps": 1}
    with pytest.raises(ValueError, match="BertLMHeadModel lets a token see those that come after"):
        HFTrainer()(str(tmp_path), rows, **call)
    decoder = BertLMHeadModel.from_pretrained(tmp_path, is_decoder=True)
    HFTrainer()((decoder, tokenizer), rows, **call)


def _args():
    from hflit.arguments import Arguments

    return Arguments()


def test_no_text_predicts_its_neighbour():
    tokenization, rows = rows_of(["w1 w2", "w3"], gpt_tokenizer(), merge="pack")
    batch = Collator(tokenization.padding, "right", tokenization.finish)(list(rows))
    w1, w2, w3 = gpt_tokenizer()("w1 w2 w3")["input_ids"]
    assert batch["input_ids"].tolist() == [[w1, w2, 1, w3, 1]]
    assert batch["labels"].tolist() == [[-100, w2, 1, -100, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_whole_words_need_a_fast_tokenizer():
    with pytest.raises(ValueError, match="CanineTokenizer does not tell. Use a fast tokenizer"):
        Texts(CanineTokenizer(), merge=None, masked=True, whole_word=True)


def test_whole_words_are_masked_together():
    vocabulary = {
        "[PAD]": 0,
        "[UNK]": 1,
        "[CLS]": 2,
        "[SEP]": 3,
        "[MASK]": 4,
        "play": 5,
        "##ing": 6,
    }
    from tokenizers.models import WordPiece

    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    tokenization, rows = rows_of(["playing play " * 40], fast, masked=True, whole_word=True)
    batch = Collator(tokenization.padding, "right", tokenization.finish)(list(rows))
    seen = 0
    for row, ids in enumerate(rows["input_ids"]):
        for at, token in enumerate(ids[1:], start=1):
            if token == 6:  # an "##ing" is masked exactly if the "play" before it is
                masked = batch["labels"][row] != -100
                assert masked[at] == masked[at - 1]
                seen += bool(masked[at])
    assert seen > 0


def test_words_start_at_spaces_that_belong_to_tokens():
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace

    vocabulary = {token: at for at, token in enumerate(["[MASK]", "▁", "a", "b", "▁a"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", "a")]))
    tokenizer.pre_tokenizer = Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]")
    tokenization = Texts(fast, merge=None, masked=True, whole_word=True)
    found = tokenization({"text": ["ab b a"]})
    assert fast.convert_ids_to_tokens(found["input_ids"][0]) == ["▁a", "b", "▁", "b", "▁a"]
    assert found["word_starts"] == [[1, 0, 1, 0, 1]]


def test_masks_depend_on_seed_epoch_and_batch_only(texts):
    def masks(workers, seed=42):
        module = _data(texts, dataloader_num_workers=workers, seed=seed)
        loader = module.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            torch.manual_seed(epoch + workers)  # the global random numbers play no part
            found += [batch["labels"] for window in loader for batch in window]
        return torch.cat([labels[:, :8].flatten() for labels in found])

    first = masks(0)
    assert torch.equal(first, masks(2))
    assert not torch.equal(first, masks(0, seed=1))
    assert not torch.equal(first[: len(first) // 2], first[len(first) // 2 :])


def _data(texts, **arguments) -> DataModule:
    from hflit.arguments import Arguments
    from hflit.data import data_module

    module = data_module(
        [{"text": text} for text in texts],
        tokenization=Texts(word_tokenizer(), None, MAXLENGTH, masked=True),
        args=Arguments(per_device_train_batch_size=4, **arguments),
    )
    module.setup()
    return module


@pytest.mark.parametrize("merge", ["concat", "pack", None])
@pytest.mark.parametrize("task", MODELS)
def test_a_stream_gives_the_rows_of_a_data_set(task, texts, merge):
    rows = datasets.Dataset.from_dict({"text": texts})
    losses = []
    for data in (rows, rows.to_iterable_dataset()):
        trainer = HFTrainer()
        trainer(
            MODELS[task](), data, task=task, merge=merge, maxlength=MAXLENGTH, parity=True,
            max_steps=3, logging_steps=1, train_sampling_strategy="sequential",
        )  # fmt: skip
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("task", MODELS)
def test_auto_metrics_are_those_of_the_logits(task, texts):
    trainer = HFTrainer()
    rows = [{"text": text} for text in texts]
    trainer(
        MODELS[task](), rows, rows[:7], task=task, maxlength=MAXLENGTH, metrics="auto", max_steps=2
    )
    figures = trainer.metrics
    # Perplexity is e to the mean loss, by definition.
    assert figures["eval_perplexity"] == pytest.approx(
        torch.tensor(figures["eval_loss"]).exp().item(), rel=1e-5
    )
    assert 0 <= figures["eval_token_accuracy"] <= 1
