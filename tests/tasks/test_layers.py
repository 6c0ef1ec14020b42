"""Layers that are faster: the same outputs and gradients, where they gain and nowhere else."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from hflit import HFTrainer
from hflit.tasks import layers
from hflit.tasks.layers import (
    BLOCK,
    FEWEST,
    FEWEST_ROWS,
    MULTIPLE,
    fast_products,
    gradients_by_row,
    linear,
    mkl_is_slow,
)
from tests.conftest import word_tokenizer
from tests.tasks.tiny import TEXTS, make

ZEN5 = {"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_vp2intersect": True}


@pytest.fixture
def on_amd(monkeypatch):
    """As on a processor of AMD's, wherever the test runs; keeps the shapes that oneDNN is given."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this build of torch has no MKL or no oneDNN")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN5, raising=False)
    counted = []
    times = layers._in_onednn
    monkeypatch.setattr(
        layers, "_in_onednn", lambda *args: counted.append(args[0].shape) or times(*args)
    )
    return counted


@pytest.mark.parametrize(
    ("about", "slow"),
    [
        (ZEN5, True),
        ({**ZEN5, "cpu_name": "AMD Ryzen 9 9950X"}, True),
        ({**ZEN5, "avx512_vp2intersect": False}, False),  # Zen 4: 512 bits in two halves
        ({**ZEN5, "cpu_name": "Intel Core i7-1185G7"}, False),  # whose products MKL knows
        ({"architecture": "aarch64"}, False),
    ],
)
def test_zen_5_has_slow_products(on_amd, monkeypatch, about, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about)
    assert mkl_is_slow() is slow


def test_torch_that_does_not_know_its_processor_multiplies_as_it_does(on_amd, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not mkl_is_slow()


def gradients(layer, rows, double=False):
    """Output and gradients, here and for the same numbers in double precision."""
    kind = torch.float64 if double else torch.float32
    rows = rows.detach().to(kind).requires_grad_()
    layer = layer.to(kind)
    layer.zero_grad()
    out = layer(rows)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(kind))
    kept = [out, rows.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    return [each.detach().clone() for each in kept]


LAYERS = {
    "linear": lambda: nn.Linear(384, 256),
    "no bias": lambda: nn.Linear(256, 384, bias=False),
    "frozen": lambda: nn.Linear(384, 256).requires_grad_(False),
    "Conv1D": lambda: Conv1D(256, 384),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(100,), (4, 25), (3, 7, 6)])
def test_products_and_gradients_are_those_of_float32(on_amd, kind, shape):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    width = layer.weight.shape[0] if kind == "Conv1D" else layer.in_features
    rows = torch.randn(*shape, width)
    theirs = gradients(layer, rows)
    assert not on_amd
    with fast_products(nn.Sequential(layer)):
        ours = gradients(layer, rows)
    assert "forward" not in vars(layer)
    assert len(on_amd) == (2 if kind == "frozen" else 3)
    exact = gradients(layer, rows, double=True)
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our.stride() == their.stride()
        # Each sums hundreds of products of float32: relative to the largest, some 1e-7 remain.
        assert (our - right).abs().max() / right.abs().max() < 2e-6


@pytest.mark.parametrize("count", [BLOCK, BLOCK + 1, 2 * BLOCK + 100])
def test_blocks_hold_every_row(on_amd, count):
    torch.manual_seed(0)
    layer, rows = nn.Linear(96, 192), torch.randn(count, 96)
    with fast_products(nn.Sequential(layer)):
        ours = gradients(layer, rows)
    assert len(on_amd) == 3 * -(-count // BLOCK)
    exact = gradients(layer, rows, double=True)
    for our, right in zip(ours, exact, strict=True):
        assert (our - right).abs().max() / right.abs().max() < 2e-6


def test_onednn_meets_few_numbers_of_rows(on_amd):
    """It keeps code for each of them, so that memory would grow with every new length."""
    weight = torch.randn(256, 128, requires_grad=True)
    for count in range(2 * FEWEST // weight.numel(), 3 * BLOCK, 7):
        linear(torch.randn(count, 128, requires_grad=True), weight).sum().backward()
    sizes = {shape[0] if shape[1] in (128, 256) else shape[1] for shape in on_amd}
    assert sizes == set(range(MULTIPLE, BLOCK + 1, MULTIPLE))


def test_rows_and_gradients_with_gaps(on_amd):
    torch.manual_seed(0)
    states, weight = torch.randn(100, 5, 384), torch.randn(384, 384, requires_grad=True)
    linear(states[:, 2], weight).mT.contiguous().mT[:, ::2].sum().backward()
    assert len(on_amd) == 2  # no gradient of the rows
    expected = torch.zeros(384, 384)
    expected[::2] = states[:, 2].sum(dim=0)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


def test_gradient_of_a_gradient(on_amd):
    torch.manual_seed(0)
    rows, weight = torch.randn(100, 384), torch.randn(384, 384)

    def penalty(product):
        inputs, table = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = product(inputs, table).square().sum()
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), table)[0]

    expected, found = penalty(F.linear), penalty(linear)
    assert on_amd
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_what_gains_nothing_stays_with_torch(on_amd, monkeypatch):
    width = 512
    assert FEWEST // width**2 < FEWEST_ROWS  # so that each bound alone decides once
    rows, weight = torch.randn(FEWEST_ROWS, width), torch.randn(width, width)
    linear(rows, weight)
    assert len(on_amd) == 1
    linear(rows[1:], weight)
    linear(rows, weight[: FEWEST // (FEWEST_ROWS * width) - 1])
    linear(rows.double(), weight.double())
    linear(rows, torch.randn(width, 2 * width)[:, ::2])  # gaps
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(rows, weight).dtype == torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    try:
        linear(rows, weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(on_amd) == 1
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    linear(rows, weight)
    assert len(on_amd) == 1


def test_a_layer_that_others_have_changed_stays_theirs(on_amd):
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Bilinear(2, 2, 2))
    model[0].forward = lambda rows: rows + 1
    with fast_products(model), fast_products(model):
        assert [layers.is_replaced(each) for each in model[:2]] == [True, False]
        assert model[0](torch.ones(1)) == 2
        model[1](torch.randn(64, 512))
        assert len(on_amd) == 1
    assert ["forward" in vars(each) for each in model] == [True, False, False]


def train(tmp_path, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=105, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config), word_tokenizer()
    rows = [{"text": f"{text} " * 4, "label": i % 2} for i, text in enumerate(TEXTS)]
    trainer = HFTrainer()
    trainer(
        model, rows, rows, cache=False, output_dir=str(tmp_path), save_strategy="no",
        logging_steps=1, per_device_train_batch_size=8, num_train_epochs=2, eval_strategy="epoch",
        **options,
    )  # fmt: skip
    return [e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history[:-1]], trainer


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"lora": True}])
def test_training_learns_the_same(on_amd, monkeypatch, tmp_path, options):
    ours, trainer = train(tmp_path, **options)
    assert on_amd
    on_amd.clear()
    trainer.predict([{"text": f"{text} " * 4} for text in TEXTS])
    assert on_amd
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    on_amd.clear()
    theirs, _ = train(tmp_path, **options)
    assert not on_amd
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=2e-6)


def test_parity_and_compiled_models_use_the_products_of_torch(on_amd, tmp_path):
    train(tmp_path, parity=True)
    assert not on_amd
    train(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1)
    assert not on_amd


def test_a_teacher_and_the_chunks_of_a_loss_gain_too(on_amd, tmp_path):
    def language_model():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=105, n_embd=256, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
        return GPT2LMHeadModel(config), word_tokenizer()

    rows = [{"text": f"{text} " * 30} for text in TEXTS]  # each fills the 64 positions
    options = {"task": "language-generation", "cache": False, "max_steps": 1, "merge": None}
    HFTrainer()(language_model(), rows, **options)
    alone = len(on_amd)
    # Four layers, forward and two gradients; the head adds to the gradient of its weight in place.
    assert alone == 3 * 4 + 2
    on_amd.clear()
    HFTrainer()(language_model(), rows, teacher=language_model(), **options)
    assert len(on_amd) == alone + 5


def test_gradients_by_row_are_those_of_torch():
    """Two passes, a padding row, a tied table: what torch adds up from whole tables."""
    found = []
    for by_row in (True, False):
        model, _ = make("language-modeling", seed=0)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().padding_idx == 0
        with gradients_by_row(model) if by_row else nullcontext():
            for start in (0, 40):
                ids = torch.arange(start, start + 24).reshape(2, 12) % 30
                model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert "forward" not in vars(model.get_input_embeddings())


def test_only_the_default_writes_gradients_by_row(tiny_bert, ragged_rows, monkeypatch):
    calls = []

    def noted(model):
        calls.append(1)
        return nullcontext()

    monkeypatch.setattr("hflit.loop.switches.gradients_by_row", noted)
    HFTrainer()(tiny_bert(), ragged_rows(8), parity=True)
    assert not calls
    HFTrainer()(tiny_bert(), ragged_rows(8))
    assert calls
