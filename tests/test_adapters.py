"""LoRA and quantized weights: what learns, what stays, and what is saved and loaded back."""

import copy
import json
import logging

import bitsandbytes as bnb
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from hflit import HFTrainer
from hflit.adapters import (
    head_names,
    inner_model,
    keep_layout,
    lora_config,
    quantization_config,
)
from hflit.artifacts import check_base
from hflit.cli.evaluate import evaluate_model
from hflit.loading import load_base
from hflit.tasks import TASKS
from tests.conftest import word_tokenizer
from tests.tasks import test_language as language
from tests.tasks.test_contract import outputs
from tests.tasks.test_parity import reference
from tests.tasks.tiny import make, rows

EIGHT_BIT = {"load_in_8bit": True}
MODES = {
    "lora": {"lora": True},
    "4-bit": {"lora": True, "quantize": True},
    "8-bit": {"lora": True, "quantize": EIGHT_BIT},
}
SMALL = {
    "vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
MODELS = {
    "bert": lambda: make("language-modeling", 0)[0],
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=105, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    ),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=0)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SMALL, embedding_size=32)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=105, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "t5": lambda: make("sequence-sequence", 0)[0],
}
TASK_MODELS = {
    "sequence-sequence": ("t5",),
    "language-generation": ("gpt2", "llama"),
    "language-modeling": ("bert", "distilbert", "roberta", "electra"),
    "token-detection": ("bert", "electra"),
    "question-answering": ("bert", "distilbert", "gpt2", "t5"),
    "text-classification": ("bert", "distilbert", "roberta", "electra", "gpt2", "llama", "t5"),
}
# Every model with LoRA alone; the first two of a task quantized as well.
CASES = [
    (task, kind, mode)
    for task, kinds in TASK_MODELS.items()
    for mode in MODES
    for kind in (kinds if mode == "lora" else kinds[:2])
]


class Snapshot(TrainerCallback):
    """Copies the weights as the run begins."""

    def on_train_begin(self, args, state, control, model, **_):
        self.weights = {name: each.detach().clone() for name, each in model.named_parameters()}
        self.learning = {name for name, each in model.named_parameters() if each.requires_grad}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of language models: those who load them for other tasks find no head."""
    folder = tmp_path_factory.mktemp("bases")
    for name, build in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build().save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


def run(base, task, validation=None, **options):
    """Three updates: the trainer, the model, the tokenizer, and the weights at the start."""
    if task == "question-answering":
        options = {"stride": 8, **options}
    trainer, snapshot = HFTrainer(), Snapshot()
    model, tokenizer = trainer(
        base if isinstance(base, tuple) else str(base), rows(task), validation, task=task,
        maxlength=32, learning_rate=1e-2, callbacks=[snapshot], logging_steps=1,
        **{"max_steps": 3, **options},
    )  # fmt: skip
    return trainer, model, tokenizer, snapshot


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def halves(task, model):
    names = ("generator", "discriminator") if task == "token-detection" else (None,)
    return {name: getattr(model, name) if name else model for name in names}


def reloaded(task, half, base, trained):
    """The same base, loaded by transformers as the run did."""
    auto = TASKS[task].auto_model
    if half == "discriminator":
        is_electra = inner_model(trained).config.model_type == "electra"
        auto = ElectraForPreTraining if is_electra else AutoModelForTokenClassification
    options = {}
    quantizer = getattr(inner_model(trained), "hf_quantizer", None)
    if quantizer is not None:
        options["quantization_config"] = quantizer.quantization_config
    if task == "text-classification":
        options["num_labels"] = 3
    model = auto.from_pretrained(base, **options)
    keep_layout(model)
    return model


def equal(one, other, tokenizer, tolerance=1e-6):
    torch.testing.assert_close(
        outputs(one, tokenizer), outputs(other, tokenizer), rtol=0, atol=tolerance
    )


def check_saved(task, half, base, folder, trained, tokenizer):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == TASKS[task].lora_type
    assert not (folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(reloaded(task, half, base, trained), folder)
    equal(loaded, trained, tokenizer)


@pytest.mark.parametrize(("task", "kind", "mode"), CASES)
def test_learns_freezes_saves_and_loads_back(bases, tmp_path, task, kind, mode):
    trainer, model, tokenizer, start = run(
        bases / kind, task, output_dir=str(tmp_path), **MODES[mode]
    )
    found = losses(trainer)
    assert torch.isfinite(torch.tensor(found)).all()
    assert found[0] != found[-1]
    assert all("lora_" in name or "modules_to_save" in name for name in start.learning)
    for name, weight in model.named_parameters():
        same = torch.equal(weight, start.weights[name])
        assert same or name in start.learning, name
        if "modules_to_save" in name or "lora_B" in name:
            assert not same, name

    for half, trained in halves(task, model).items():
        assert not trained.training
        inner = inner_model(trained)
        kinds = {name: type(each).__name__ for name, each in inner.named_modules()}
        assert any("bit" in each for each in kinds.values()) == ("quantize" in MODES[mode])
        for name in head_names(inner):  # never quantized, never wrapped
            assert not [k for n, k in kinds.items() if n.startswith(name) and "bit" in k]
            assert not [n for n in kinds if n.startswith(name) and "lora_" in n]
        check_saved(task, half, bases / kind, tmp_path / (half or ""), trained, tokenizer)


@pytest.mark.parametrize("quantize", [None, True, EIGHT_BIT], ids=["lora", "4-bit", "8-bit"])
@pytest.mark.parametrize("task", TASKS)
def test_merged_model_says_the_same_and_loads_back_plain(bases, tmp_path, task, quantize):
    """GPT-2 among them: its weights lie on their side, and square ones load either way round."""
    options = {"lora": True, "quantize": quantize}
    # BERT reads token types, which an adapter for question-answering learns without, see below.
    base = bases / ("distilbert" if task == "question-answering" else TASK_MODELS[task][0])
    _, adapted, tokenizer, _ = run(base, task, **options)
    _, merged, _, _ = run(base, task, output_dir=str(tmp_path), merge_adapter=True, **options)
    for half, plain in halves(task, merged).items():
        assert not isinstance(plain, PeftModel)
        assert not any("bit" in type(each).__name__ for each in plain.modules())
        assert not hasattr(plain.config, "quantization_config")
        # 8 bits round the inputs of each layer as well.
        tolerance = 0.05 if quantize == EIGHT_BIT else 1e-5
        equal(plain, halves(task, adapted)[half], tokenizer, tolerance)
        equal(type(plain).from_pretrained(tmp_path / (half or "")), plain, tokenizer)


@pytest.mark.parametrize("merge", [False, True])
def test_answers_are_found_as_well_once_saved(bases, tmp_path, merge):
    """peft gives its model no token types; the plain one that is left after merging gets them."""
    task, data = "question-answering", rows("question-answering")
    settings = {"lora": True, "merge_adapter": merge, "output_dir": str(tmp_path)}
    trainer, *_ = run(bases / "bert", task, data, max_steps=20, **settings)
    found = evaluate_model(str(tmp_path), data, {"task": task, "stride": 8, "maxlength": 32})
    assert found["eval_loss"] == pytest.approx(trainer.metrics["eval_loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_what_a_copy_of_the_tied_decoder_loses(bases, tmp_path):
    """Merged, a trained copy of `cls` is untied. Its bias is not saved then, and loads as 0."""
    _, lost, tokenizer, _ = run(
        bases / "bert", "language-modeling", lora={"modules_to_save": ["cls"]},
        merge_adapter=True, output_dir=str(tmp_path / "lost"),
    )  # fmt: skip
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "lost")
    assert lost.cls.predictions.decoder.bias.any()
    assert not loaded.cls.predictions.decoder.bias.any()

    _, kept, _, start = run(
        bases / "bert", "language-modeling", lora=True, merge_adapter=True,
        output_dir=str(tmp_path / "kept"),
    )  # fmt: skip
    assert any("transform.modules_to_save" in name for name in start.learning)
    assert kept.cls.predictions.decoder.weight is kept.bert.embeddings.word_embeddings.weight
    equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "kept"), kept, tokenizer)


@pytest.mark.parametrize(
    ("task", "kind"), [("question-answering", "bert"), ("text-classification", "distilbert")]
)
def test_pitfall_33_the_head_is_not_wrapped_by_lora(bases, task, kind):
    """txtai 9 fails: `modules_to_save cannot be applied to ... lora.layer.Linear`."""
    _, model, _, start = run(bases / kind, task, lora=True)
    heads = head_names(inner_model(model))
    for head in heads:
        assert any(f".{head}.modules_to_save" in name for name in start.learning)


def test_pitfall_33_token_detection_takes_lora(bases):
    """txtai 9 fails: `unexpected keyword 'inputs_embeds'`; ours shares its tables too."""
    _, model, _, _ = run(bases / "electra", "token-detection", lora=True)
    tables = [
        inner_model(half).get_input_embeddings().weight
        for half in (model.generator, model.discriminator)
    ]
    assert tables[0] is tables[1]


def test_pitfall_34_a_config_without_task_type_trains_the_head(bases):
    config = LoraConfig(target_modules=["query"])
    before = config.to_dict()
    _, model, _, start = run(bases / "bert", "text-classification", lora=config)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert any("classifier.modules_to_save" in name for name in start.learning)
    wrapped = {name.split(".lora_")[0] for name in start.learning if ".lora_" in name}
    assert wrapped
    assert all(name.endswith("query") for name in wrapped)
    assert config.to_dict() == before


def test_pitfall_34_a_dict_stays_as_it_is_for_a_second_task(bases):
    settings, quantize = {"r": 4, "target_modules": ["query", "value"]}, {"load_in_4bit": True}
    first, second = copy.deepcopy(settings), copy.deepcopy(quantize)
    for task in ("text-classification", "language-modeling"):
        run(bases / "bert", task, lora=settings, quantize=quantize)
        assert (settings, quantize) == (first, second)


def test_pitfall_35_plain_lora_keeps_the_dtype(bases, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(bases / "bert", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    trainer, model, _, start = run(tmp_path, "language-modeling", lora=True)
    kinds = {each.dtype for name, each in start.weights.items() if name not in start.learning}
    assert kinds == {torch.bfloat16}
    assert losses(trainer)[0] != losses(trainer)[-1]


def test_pitfall_36_quantizes_without_cuda(bases):
    """txtai 9 loads 32 bits where there is no CUDA, and says nothing."""
    trainer, model, _, start = run(bases / "llama", "language-generation", quantize=True)
    layers = [each for each in model.modules() if isinstance(each, bnb.nn.Linear4bit)]
    assert len(layers) == 7
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert 0 < trainer.metrics["trainable_share"] < 1
    assert losses(trainer)[0] != losses(trainer)[-1]  # what is not quantized learns
    assert start.learning == {name for name in start.weights if "proj" not in name}


def test_pitfall_36_quantize_refuses_a_loaded_model():
    with pytest.raises(ValueError, match="Pass the base by its name"):
        HFTrainer()(make("text-classification", 0), [], quantize=True)


def test_a_quantized_base_is_taken_as_it_is(bases, tmp_path):
    task = "language-generation"
    run(bases / "llama", task, quantize=True, output_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="quantized already"):
        _, model, _, _ = run(tmp_path, task, lora=True, quantize=EIGHT_BIT)
    assert sum(isinstance(each, bnb.nn.Linear4bit) for each in model.modules()) == 7
    # A head that it lacks is new, and no quantized layer.
    _, model, _, start = run(tmp_path, "text-classification", lora=True)
    assert sum(isinstance(each, bnb.nn.Linear4bit) for each in model.modules()) == 7
    assert any("score.modules_to_save" in name for name in start.learning)


def test_a_pair_gives_an_adapter_that_loads(tmp_path):
    pair = make("question-answering", 0)
    _, model, tokenizer, _ = run(pair, "question-answering", lora=True, output_dir=str(tmp_path))
    equal(PeftModel.from_pretrained(pair[0], tmp_path), model, tokenizer)


@pytest.mark.parametrize("task", ["question-answering", "token-detection"])
def test_a_pair_keeps_its_layers_and_weights(task):
    model, tokenizer = make(task, 0)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    for merge_adapter in (False, True):
        options = {"lora": True, "merge_adapter": merge_adapter}
        trainer, trained, _, _ = run((model, tokenizer), task, **options)
        assert losses(trainer)[0] != losses(trainer)[-1]
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
        assert all(each.requires_grad for each in model.parameters())
        for half in () if merge_adapter else halves(task, trained).values():
            table = inner_model(half).get_input_embeddings().weight
            ours = model if task == "question-answering" else model.generator
            assert table.data_ptr() == ours.get_input_embeddings().weight.data_ptr()


def test_an_adapter_is_trained_on(bases):
    _, model, tokenizer, _ = run(bases / "bert", "language-modeling", lora=True)
    trainer, _, _, start = run((model, tokenizer), "language-modeling")
    assert trainer.metrics["trainable_share"] < 1
    assert all("lora_" in name or "modules_to_save" in name for name in start.learning)
    with pytest.raises(ValueError, match="leave out lora="):
        run((model, tokenizer), "language-modeling", lora=True)


def test_a_new_output_layer_learns(tmp_path):
    """A body alone has no words to say; an output layer that is not tied starts random."""
    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    *_, start = run(tmp_path, "language-generation", lora=True, quantize=True)
    assert [name for name in start.learning if "lora_" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lora": "yes"}, TypeError, "lora is str"),
        ({"lora": {"rank": 4}}, TypeError, "unknown settings.*rank"),
        ({"quantize": "4bit"}, TypeError, "quantize is str"),
        ({"quantize": {"bits": 4}}, TypeError, "unknown settings.*bits"),
        ({"merge_adapter": True}, ValueError, "pass lora= too"),
        ({"quantize": True, "parity": True}, ValueError, "without an adapter"),
    ],
)
def test_errors_come_before_anything_is_read(options, error, words):
    with pytest.raises(error, match=words):
        HFTrainer()("no such folder", None, **options)


@pytest.mark.parametrize("settings", [{"r": "four"}, {"r": -4}, {"target_modules": ["nowhere"]}])
def test_what_peft_refuses_is_told_with_the_argument(bases, settings):
    with pytest.raises((TypeError, ValueError), match="lora= cannot be used: "):
        run(bases / "bert", "text-classification", lora=settings)


def trained(model):
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.01)


def resized(model):
    model.resize_token_embeddings(model.config.vocab_size + 3)


@pytest.mark.parametrize("change", [trained, resized])
def test_an_adapter_is_not_saved_apart_from_weights_on_no_disk(bases, change, tmp_path):
    """Once its folder named the weights from before, and said something else when it was loaded."""
    task = "text-classification"

    def base(change=None):
        model = AutoModelForSequenceClassification.from_pretrained(bases / "bert", num_labels=3)
        if change is not None:
            change(model)
        with torch.no_grad():
            model.classifier.weight.add_(1.0)  # is saved with the adapter
        return model, word_tokenizer()

    def count(**options):
        run(base(change), task, lora=True, **options)

    folder = str(tmp_path / "out")
    with pytest.raises(ValueError, match="other weights than .*bert.* differs.*merge_adapter"):
        count(output_dir=folder)
    assert not (tmp_path / "out").exists()
    count()
    count(output_dir=folder, merge_adapter=True)
    run(base(), task, lora=True, output_dir=str(tmp_path / "kept"))


@pytest.mark.parametrize("form", ["bare", "sharded"])
def test_weights_on_no_disk_are_told_in_every_form_of_a_file(bases, form, tmp_path):
    """Once only a whole model in one file was looked into."""
    model = AutoModelForSequenceClassification.from_pretrained(bases / "bert", num_labels=3)
    place = str(tmp_path / "base")
    size = {"max_shard_size": "20KB"} if form == "sharded" else {}
    (model.bert if form == "bare" else model).save_pretrained(place, **size)
    assert (tmp_path / "base" / "model.safetensors").exists() == (form == "bare")
    model.config.name_or_path = place
    assert check_base(model) is model
    trained(model)
    with pytest.raises(ValueError, match="other weights than"):
        check_base(model)


def test_a_kind_of_adapter_that_the_model_cannot_have_is_refused(bases):
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM' is not for a BertFor.*Leave it"):
        run(bases / "bert", "text-classification", lora={"task_type": "CAUSAL_LM"})


def test_a_kind_of_four_bits_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'nf5'. Choose 'nf4' or 'fp4'"):
        quantization_config({"bnb_4bit_quant_type": "nf5"}, torch.device("cpu"))


def test_settings_of_the_caller_win():
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q"])
    assert quantization_config(config, torch.device("cpu")).to_dict() == config.to_dict()
    changed = quantization_config({"bnb_4bit_quant_type": "fp4"}, torch.device("cpu"))
    assert (changed.load_in_4bit, changed.bnb_4bit_quant_type) == (True, "fp4")
    assert not quantization_config(EIGHT_BIT, torch.device("cpu")).load_in_4bit
    default = lora_config(True, "SEQ_CLS")
    found = default.r, default.lora_alpha, default.lora_dropout, default.target_modules
    assert found == (16, 8, 0.05, "all-linear")
    assert lora_config({"task_type": "CAUSAL_LM"}, "SEQ_CLS").task_type == "CAUSAL_LM"


def test_auto_classes_of_peft_load_the_adapter(bases, tmp_path):
    _, model, tokenizer, _ = run(
        bases / "llama", "language-generation", lora=True, output_dir=str(tmp_path)
    )
    equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path), model, tokenizer)


def test_config_beside_the_adapter_names_the_classes(bases, tmp_path):
    data = [{**row, "label": "abc"[row["label"]]} for row in rows("text-classification")]
    HFTrainer()(
        str(bases / "bert"), data, lora=True, quantize=True, max_steps=1, output_dir=str(tmp_path)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert "quantization_config" not in config
    with pytest.raises(ValueError, match="holds an adapter"):
        load_base(tmp_path)


def test_figures_count_what_learns_and_what_it_weighs(bases):
    adapter, full = (
        run(bases / "bert", "language-modeling", **options)[0].metrics
        for options in ({"lora": {"r": 2}}, {})
    )
    assert full["trainable_share"] == 1
    assert adapter["trainable_share"] < 0.2
    model = make("language-modeling", 0)[0]
    assert full["weights_mb"] == model.get_memory_footprint() / 1e6
    half = run(bases / "bert", "language-modeling", precision="bf16-true")[0].metrics
    assert half["weights_mb"] == model.bfloat16().get_memory_footprint() / 1e6


def test_figures_are_shown_once_unless_the_caller_logs(bases, monkeypatch, capsys):
    def shown():
        run(bases / "bert", "language-modeling", lora=True)
        return capsys.readouterr().err.count(" % of the weights learn; all of them take ")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert shown() == 1
    assert not logging.getLogger("hflit").handlers
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    assert shown() == 0


def test_share_counts_two_weights_a_byte(bases):
    four, none = (
        run(bases / "llama", "language-generation", lora=True, quantize=quantize)[0].metrics
        for quantize in (True, None)
    )
    assert four["trainable_share"] == none["trainable_share"]
    assert four["weights_mb"] < none["weights_mb"]


@pytest.mark.parametrize("quantize", [None, True])
def test_nothing_is_computed_below_the_lowest_adapter(bases, quantize):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            inner = inner_model(model)
            for name, part in (
                ("table", inner.transformer.wte),
                ("first", inner.transformer.h[0]),
                ("second", inner.transformer.h[1]),
            ):
                part.register_forward_hook(
                    lambda _, __, out, name=name: seen.update(
                        {name: (out[0] if isinstance(out, tuple) else out).requires_grad}
                    )
                )

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            self.grads = {n for n, p in model.named_parameters() if p.grad is not None}

    watch = Watch()
    HFTrainer()(
        str(bases / "gpt2"), rows("language-generation"), task="language-generation",
        maxlength=32, max_steps=1, quantize=quantize, callbacks=[watch],
        lora={"target_modules": ["c_attn"], "layers_to_transform": [1]},
    )  # fmt: skip
    assert seen == {"table": False, "first": False, "second": True}
    assert all("h.1" in name and "lora_" in name for name in watch.grads)


def test_evaluation_leaves_quantized_weights_as_they_learn(bases, monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes lays them out for inference; here, on any CPU."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    # Without dropout, whose draws an evaluation moves on.
    task, options = "text-classification", {"lora": {"lora_dropout": 0.0}, "quantize": True}
    plain, *_ = run(bases / "bert", task, **options)
    trainer, *_ = run(
        bases / "bert", task, rows(task)[:6], eval_strategy="steps", eval_steps=1, **options
    )
    assert losses(trainer) == losses(plain)


def test_weights_that_another_program_laid_out_learn_again():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")  # quantizes
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = layer.train()(inputs)
    weight = layer.weight
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    keep_layout(layer)
    after = layer(inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=0.01)  # scales of 8 bits
    after.sum().backward()
    assert inputs.grad.any()


@pytest.mark.parametrize("task", TASKS)
def test_evaluates_with_an_adapter(bases, task):
    trainer, *_ = run(
        bases / TASK_MODELS[task][0], task, rows(task)[:6], lora=True, metrics="auto", max_steps=1
    )
    assert len([name for name in trainer.metrics if name.startswith("eval_")]) > 4


def test_own_metrics_get_the_labels(bases):
    shapes = []

    def note(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    task = "text-classification"
    run(bases / "bert", task, rows(task)[:6], lora=True, metrics=note, max_steps=1)
    assert shapes == [((6, 3), (6,))]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_under_an_adapter(bases, implementation):
    """Positions of RoBERTa are found, and neighbours are masked, inside the PeftModel."""
    model = RobertaForMaskedLM.from_pretrained(
        bases / "roberta", attn_implementation=implementation
    )
    trainer, *_ = run((model, word_tokenizer()), "language-modeling", lora=True, merge="pack")
    plain = RobertaForMaskedLM.from_pretrained(
        bases / "roberta", attn_implementation=implementation
    )
    other, *_ = run((plain, word_tokenizer()), "language-modeling", merge="pack")
    # An adapter starts as no change at all; dropout aside, the first losses are the same.
    assert losses(trainer)[0] == pytest.approx(losses(other)[0], rel=0.02)


def test_label_smoothing_under_an_adapter(bases):
    for parity in (True, False):
        trainer, *_ = run(
            bases / "llama", "language-generation", lora=True, parity=parity,
            label_smoothing_factor=0.1,
        )  # fmt: skip
        assert losses(trainer)[0] != losses(trainer)[-1]


@pytest.mark.parametrize("quantize", [None, True])
def test_a_student_with_an_adapter_learns_from_its_teacher(bases, tmp_path, quantize):
    task = "text-classification"
    _, teacher, tokenizer, _ = run(bases / "bert", task)
    weights = copy.deepcopy(teacher.state_dict())
    trainer, *_ = run(
        bases / "bert", task, lora=True, quantize=quantize, teacher=(teacher, tokenizer)
    )
    assert losses(trainer)[0] != losses(trainer)[-1]
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_parity_with_an_adapter_is_bit_identical(tiny_bert, ragged_rows):
    """The same PeftModel under `transformers.Trainer`, dropout on."""
    data, settings = (ragged_rows(29), ragged_rows(9, seed=1)), {"logging_steps": 1, "seed": 5}
    model, tokenizer = tiny_bert(dropout=0.1)
    trainer = HFTrainer()
    ours, _ = trainer(
        (model, tokenizer), *data, lora=True, parity=True, max_steps=6, eval_strategy="steps",
        eval_steps=3, **settings,
    )  # fmt: skip
    config = copy.deepcopy(ours.peft_config["default"])
    plain, tokenizer = tiny_bert(dropout=0.1)
    torch.manual_seed(5)
    state, theirs, _ = reference(
        get_peft_model(plain, config), tokenizer, *data, max_steps=6, eval_strategy="steps",
        eval_steps=3, **settings,
    )  # fmt: skip
    check_history(trainer.state, state)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("make_base", [language.gpt2, language.llama])
def test_parity_of_a_causal_model_with_an_adapter_is_bit_identical(make_base):
    texts = [row["text"] for row in rows("language-generation")]
    task = "language-generation"
    settings = {**language.SETTINGS, "gradient_accumulation_steps": 2, "seed": 5}
    trainer, ours, _ = language.train(task, make_base(), texts, lora=True, parity=True, **settings)
    config = copy.deepcopy(ours.peft_config["default"])
    plain, tokenizer = make_base()
    torch.manual_seed(5)
    adapted = get_peft_model(plain, config), tokenizer
    state, theirs = language.reference(task, adapted, texts, **settings)
    check_history(trainer.state, state)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def check_history(ours, theirs):
    names = ("loss", "grad_norm", "learning_rate", "eval_loss", "total_flos", "train_loss")
    pairs = zip(ours.log_history, theirs.log_history, strict=True)
    for one, other in pairs:
        assert {n: one[n] for n in names if n in one} == {n: other[n] for n in names if n in other}
