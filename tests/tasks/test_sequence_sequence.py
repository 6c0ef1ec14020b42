"""sequence-sequence against transformers.Trainer; tiny T5 and BART from configs, no network."""

import random

import datasets
import numpy as np
import pytest
import sacrebleu
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DataCollatorForSeq2Seq,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hflit import HFTrainer
from hflit.tasks import TASKS
from tests.conftest import WORDS
from tests.data.test_sequences import sequence_tokenizer

SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "logging_steps": 1,
}
BART_LIKE = {
    "vocab_size": 103, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "max_position_embeddings": 64, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip


def t5(dropout=0.0):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=103, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        dropout_rate=dropout, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), sequence_tokenizer()


def bart(dropout=0.0):
    torch.manual_seed(0)
    config = BartConfig(**BART_LIKE, dropout=dropout, attention_dropout=dropout)
    return BartForConditionalGeneration(config), sequence_tokenizer()


def m2m100(dropout=0.0):
    torch.manual_seed(0)
    config = M2M100Config(**BART_LIKE, dropout=dropout, attention_dropout=dropout)
    return M2M100ForConditionalGeneration(config), sequence_tokenizer()


MODELS = {"t5": t5, "bart": bart}


def ragged_pairs(n, seed=0):
    """Sources of 4 to 20 words; the target is the source's first words, backwards."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = rng.choices(WORDS, k=rng.randint(4, 20))
        target = words[: rng.randint(1, len(words))][::-1]
        rows.append({"source": " ".join(words), "target": " ".join(target)})
    return rows


@pytest.fixture
def rows():
    return ragged_pairs(29), ragged_pairs(13, seed=1)


def reference(model, tokenizer, train, validation, **arguments):
    """The run under transformers with its own collator: history and final weights."""

    def tokenized(rows):
        return datasets.Dataset.from_list(
            [dict(tokenizer(row["source"], text_target=row["target"])) for row in rows]
        )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="reference", save_strategy="no", use_cpu=True, report_to=[], **arguments
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=tokenized(train),
        eval_dataset=tokenized(validation),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history, model


def ours(base, train, validation=None, **arguments):
    trainer = HFTrainer()
    model, _ = trainer(base, train, validation, task="sequence-sequence", **arguments)
    return trainer.state.log_history, model


def without_times(history):
    times = ("runtime", "per_second")
    return [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in history]


CASES = {
    "plain": {},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "smoothing": {"label_smoothing_factor": 0.1, "eval_strategy": "epoch"},
    "accumulation and all": {
        "gradient_accumulation_steps": 3,
        "label_smoothing_factor": 0.1,
        "bf16": True,
        "lr_scheduler_type": "cosine",
    },
}


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_parity_is_bit_identical_with_dropout(make, rows, case):
    settings = {**SETTINGS, **case}
    theirs, their_model = reference(*make(0.1), *rows, **settings)
    history, model = ours(make(0.1), *rows, parity=True, **settings)
    assert "grad_norm" in theirs[0]
    assert without_times(history)[: len(theirs)] == without_times(theirs)
    for name, weight in their_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("make", [t5, bart, m2m100])
def test_parity_holds_for_a_model_from_a_folder(make, rows, tmp_path):
    """There decoder and model of BART share a config, which a model that is passed does not."""
    for part in make(0.1):
        part.save_pretrained(tmp_path / "base")
    # transformers cannot smooth the labels of M2M100: the model wants them for its decoder.
    settings = {**SETTINGS, "label_smoothing_factor": 0.0 if make is m2m100 else 0.1}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    theirs, their_model = reference(loaded, sequence_tokenizer(), *rows, **settings)
    history, model = ours(str(tmp_path / "base"), *rows, parity=True, **settings)
    assert without_times(history)[: len(theirs)] == without_times(theirs)
    for name, weight in their_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def fsmt():
    torch.manual_seed(0)
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=103, tgt_vocab_size=103, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=64, dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return FSMTForConditionalGeneration(config), sequence_tokenizer()


def two_berts():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    return EncoderDecoderModel(config), sequence_tokenizer()


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("make", [fsmt, two_berts])
def test_models_that_are_built_in_other_ways_learn(make, rows):
    """Targets are of one length: transformers lets FSMT learn the padding of others."""
    settings = {**SETTINGS, "max_steps": 2}
    rows = [[{**row, "target": "w1 w2 w3"} for row in each] for each in rows]
    theirs, _ = reference(*make(), *rows, **settings)
    history, _ = ours(make(), *rows, **settings)
    expected, actual = ([e["loss"] for e in run if "loss" in e] for run in (theirs, history))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    _, model = ours(make(), *rows, lora={"r": 2}, **settings)
    assert isinstance(model, PeftModel)


def test_padding_of_targets_stays_padding():
    _, module = batch_and_module(fsmt)
    labels = torch.tensor([[5, 6, 1, -100]])
    prepared = module.prepare({"labels": labels}, module.model)
    assert prepared["decoder_input_ids"].tolist() == [[1, 5, 6, 1]]  # from its end, as fairseq does
    assert labels.tolist() == [[5, 6, 1, -100]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_default_stays_within_rounding_without_dropout(make, rows, smoothing):
    settings = {**SETTINGS, "label_smoothing_factor": smoothing}
    theirs, _ = reference(*make(), *rows, **settings)
    history, _ = ours(make(), *rows, **settings)
    expected, actual = ([e["loss"] for e in run if "loss" in e] for run in (theirs, history))
    assert len(actual) == 8  # 29 rows in batches of 8, twice
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_accumulation_equals_one_large_batch(make, smoothing):
    """transformers 5.23 takes the same windows with a loss four times too large."""

    def run(batch, accumulation):
        history, model = ours(
            make(),
            ragged_pairs(8),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            learning_rate=1.0,
            optim="sgd",
        )
        return history[0], model

    (large, large_model), (window, window_model) = run(8, 1), run(2, 4)
    assert window["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert window["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-6)
    # One step of SGD at rate 1: the weights differ by what the gradients differ by.
    for name, weight in large_model.state_dict().items():
        torch.testing.assert_close(window_model.state_dict()[name], weight, rtol=0, atol=1e-6)


def batch_and_module(make, **settings):
    model, tokenizer = make()
    encoded = [dict(tokenizer(row["source"], text_target=row["target"])) for row in ragged_pairs(4)]
    args = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)
    module = TASKS["sequence-sequence"](model.eval(), args, tokenizer=tokenizer, **settings)
    return DataCollatorForSeq2Seq(tokenizer, model=model)(encoded), module


def test_a_decoder_reads_no_padding_before_its_target(rows):
    """With padding on the left it once did, as many as its batch had, and generated without."""
    found = []
    for side in ("right", "left"):
        for batch, windows in ((8, 1), (2, 4)):
            model, tokenizer = t5()
            tokenizer.padding_side = side
            settings = {**SETTINGS, "per_device_train_batch_size": batch, "max_steps": 2}
            history, _ = ours(
                (model, tokenizer), rows[0], gradient_accumulation_steps=windows, **settings
            )
            found.append([entry["loss"] for entry in history if "loss" in entry])
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("make", [t5, bart, m2m100])
def test_decoder_reads_what_transformers_gives_it(make):
    """M2M100 and NLLB shift the labels themselves, but only in a forward that has them."""
    batch, module = batch_and_module(make)
    expected = batch.pop("decoder_input_ids", None)
    labels_alone = module.model(**batch)
    if expected is not None:
        assert torch.equal(module.prepare(dict(batch), module.model)["decoder_input_ids"], expected)
    outputs = module(dict(batch))
    assert torch.equal(outputs["logits"], labels_alone.logits)
    loss = module.summed_loss(outputs, batch) / module.count_items(batch)
    torch.testing.assert_close(loss, labels_alone.loss)
    assert "past_key_values" not in outputs


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("longest", [18, 12])
def test_cut_micro_batch_keeps_its_targets(make, longest):
    """Also where the targets are padded to the very length of the sources."""
    batch, module = batch_and_module(make)
    sources = torch.full((4, longest), 7)
    mask = torch.ones_like(sources)
    mask[0, 3:], mask[2, 6:] = 0, 0
    labels = torch.full((4, 12), 9)
    labels[1:3, 5:] = -100
    batch = {"input_ids": sources.where(mask == 1, 0), "attention_mask": mask, "labels": labels}
    module.forward_cost = 2.0  # as if a forward cost next to nothing
    parts = module._parts(dict(batch))
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, longest), (1, 6), (1, 3)]
    assert [tuple(part["labels"].shape) for part in parts] == [(2, 12), (1, 5), (1, 12)]
    assert sum(module.count_items(part) for part in parts) == module.count_items(batch)
    whole = module.summed_loss(module(batch), batch)
    cut = sum(module.summed_loss(module(part), part) for part in parts)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_model_loads_and_generates(make, rows, tmp_path):
    _, model = ours(make(), rows[0], output_dir=str(tmp_path / "run"), max_steps=2)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    batch = tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    with torch.no_grad():
        assert torch.equal(
            loaded(**batch, labels=labels).logits, model(**batch, labels=labels).logits
        )
    assert torch.equal(
        loaded.generate(**batch, max_length=9), model.generate(**batch, max_length=9)
    )


@pytest.mark.parametrize("beams", [None, 3])
def test_auto_metrics_score_what_the_model_generates(rows, beams):
    train, _ = rows
    validation = [{**row, "target": [row["target"], row["source"]]} for row in train[:13]]
    trainer = HFTrainer()
    model, tokenizer = trainer(
        bart(),
        train,
        validation,
        task="sequence-sequence",
        prefix="w9 ",
        metrics="auto",
        generation_max_length=12,
        generation_num_beams=beams,
        per_device_eval_batch_size=5,
        learning_rate=3e-3,
        max_steps=120,
    )
    texts = []
    for row in validation:  # one by one, without padding
        ids = tokenizer("w9 " + row["source"], return_tensors="pt")
        made = model.generate(**ids, max_length=12, num_beams=beams or 1)
        assert made.shape[1] <= 12
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    columns = list(zip(*(row["target"] for row in validation), strict=True))
    figures = trainer.metrics
    assert figures["eval_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score)
    assert figures["eval_chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score)
    assert figures["eval_chrf"] > 1
    assert {"eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_loss"} <= set(figures)


def test_length_of_generated_text():
    generated = {}
    for name, settings in {
        "default": {},
        "positions": {"target_maxlength": 64},
        "asked": {"generation_max_length": 7, "target_maxlength": 64},
    }.items():
        generated[name] = batch_and_module(bart, **settings)[1].generation
    assert generated == {
        "default": {"max_length": 128},
        "positions": {"max_length": 64},
        "asked": {"max_length": 7},
    }

    def with_own_length():
        model, tokenizer = bart()
        model.generation_config.max_length = 30
        return model, tokenizer

    assert batch_and_module(with_own_length)[1].generation == {}


def test_a_model_generates_from_the_token_that_its_decoder_read_first(rows, tmp_path):
    """mBART's config may not name it; generation then began with another, BOS."""
    torch.manual_seed(0)
    config = MBartConfig(**{**BART_LIKE, "decoder_start_token_id": None, "bos_token_id": 7})
    base = MBartForConditionalGeneration(config), sequence_tokenizer()
    model = ours(base, rows[0], max_steps=1, output_dir=str(tmp_path))[1]
    labels = torch.tensor([sequence_tokenizer()("w1 w2")["input_ids"]])
    first = model.prepare_decoder_input_ids_from_labels(labels)[0, 0]
    for each in (model, MBartForConditionalGeneration.from_pretrained(tmp_path)):
        ids = each.eval().generate(torch.tensor([[5, 1]]), max_new_tokens=2)
        assert ids[0, 0] == first != config.bos_token_id


def test_metrics_of_the_caller_see_logits(rows):
    """transformers' contract: padded with -100 to the longest target of all batches."""
    seen = {}

    def metrics(prediction):
        logits, _encoded = prediction.predictions
        seen["logits"], seen["labels"] = logits, prediction.label_ids
        hits = (logits.argmax(-1) == prediction.label_ids)[prediction.label_ids != -100]
        return {"accuracy": hits.mean()}

    train, validation = rows
    trainer = HFTrainer()
    trainer(
        t5(),
        train,
        validation,
        task="sequence-sequence",
        metrics=metrics,
        per_device_eval_batch_size=5,
        max_steps=1,
    )
    longest = max(len(row["target"].split()) for row in validation) + 1
    assert seen["logits"].shape == (13, longest, 103)
    assert seen["labels"].shape == (13, longest)
    assert np.isfinite(trainer.metrics["eval_accuracy"])


def test_wrong_arguments_are_refused_before_weights_load(rows):
    with pytest.raises(ValueError, match="generation_num_beams=2 means nothing to text-class"):
        HFTrainer()("nowhere", rows[0], generation_num_beams=2)
    with pytest.raises(ValueError, match="generation_max_length=0 must be at least 1"):
        ours("nowhere", rows[0], generation_max_length=0)
    with pytest.raises(ValueError, match="target_maxlength=65 is more than the 64 tokens"):
        ours(bart(), rows[0], target_maxlength=65)


class Noise(TrainerCallback):
    """Loudest noise on each half's table, as a multiple of 1 / sqrt(seq * width)."""

    def __init__(self):
        self.loudest = {}

    def on_train_begin(self, args, state, control, model=None, **_):
        for half in (model.get_encoder(), model.get_decoder()):
            half.get_input_embeddings().register_forward_hook(self.hear)

    def hear(self, table, inputs, output):
        clean = table.weight[inputs[0]] * getattr(table, "embed_scale", 1.0)
        noise = (output - clean).abs().max().item() * output[0].numel() ** 0.5
        self.loudest[table] = max(self.loudest.get(table, 0.0), noise)


@pytest.mark.parametrize("make", MODELS.values())
def test_both_halves_read_noise(make, rows):
    """transformers 5.23 makes it on a table that neither of them reads: losses stayed the same."""
    noise = Noise()
    ours(make(), rows[0], max_steps=2, neftune_noise_alpha=5.0, callbacks=[noise])
    # Uniform up to alpha / sqrt(seq * width) (NEFTune, arXiv 2310.05914).
    assert list(noise.loudest.values()) == pytest.approx([5.0, 5.0], rel=0.05)
    assert all(not hasattr(table, "neftune_noise_alpha") for table in noise.loudest)
