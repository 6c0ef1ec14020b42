"""Half precision: autocast around the forward; in float16, gradients scaled up and back."""

import copy

import lightning.pytorch as L
import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.data import Labels, data_module
from hflit.loop.precision import ForwardPrecision
from hflit.tasks import TASKS

LIMIT = 0.1


def arguments(**given):
    return Arguments(use_cpu=True, learning_rate=1e-2, max_grad_norm=LIMIT, optim="sgd", **given)


class Noted(L.Callback):
    """What each update gave."""

    def __init__(self):
        self.updates = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.updates.append(outputs)


def fit(model, tokenizer, rows, args, plugin, steps):
    """A run under a plain Lightning Trainer, for the call takes no float16 on a CPU."""
    data = data_module(rows, rows[:4], tokenization=Labels(tokenizer), args=args, cache=False)
    data.setup()
    noted = Noted()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        plugins=[plugin],
        callbacks=[noted],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TASKS["text-classification"](model, args), data)
    return noted.updates, data


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40], ids=["fits", "overflows"])
def test_float16_is_that_of_a_plain_loop(tiny_bert, ragged_rows, scale):
    """A scale beyond float16 leaves updates out, and the schedule stays where it is."""
    model, tokenizer = tiny_bert()
    twin, rows, steps = copy.deepcopy(model).train(), ragged_rows(16), 4
    args = arguments(max_steps=steps, train_sampling_strategy="sequential")
    plugin = ForwardPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    updates, data = fit(model, tokenizer, rows, args, plugin, steps)

    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    rates, norms = [], []
    for (batch,) in [window for _ in range(2) for window in data.train_dataloader()]:
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            logits = twin(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(clip_grad_norm_(twin.parameters(), LIMIT))
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        rates.append(optimizer.param_groups[0]["lr"])
        if scaler.get_scale() == before:
            schedule.step()
        optimizer.zero_grad()

    assert [update["learning_rate"] for update in updates] == rates
    assert (rates[-1] == rates[0]) == (scale > 2**30)
    found = torch.stack([update["grad_norm"] for update in updates])
    torch.testing.assert_close(found, torch.stack(norms), equal_nan=True, rtol=1e-3, atol=0)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


class Scales(L.Callback):
    """The scale of the gradients at each update."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.precision_plugin.scaler.get_scale())


def test_scale_of_float16_gradients_goes_on(tiny_bert, ragged_rows, tmp_path, monkeypatch):
    """The call itself, with float16 in place of its bfloat16."""

    def run(scale, **given):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        plugin = ForwardPrecision("16-mixed", "cpu", scaler)
        monkeypatch.setattr("hflit.loop.precision.ForwardPrecision", lambda *_: plugin)
        scales = Scales()
        HFTrainer()(
            tiny_bert(),
            ragged_rows(32),
            bf16=True,
            use_cpu=True,
            max_steps=4,
            callbacks=[scales],
            **given,
        )
        return scales.seen

    saved = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    assert run(64.0, **saved) == [64.0, 64.0, 64.0, 128.0]
    assert run(1.0, checkpoint=tmp_path / "checkpoint-2") == [64.0, 128.0]
