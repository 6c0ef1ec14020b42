"""The same rows and model through `transformers.Trainer` and through hflit."""

import datasets
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hflit import HFTrainer

TIMES = ("runtime", "per_second", "_mem_")


class Recorder(TrainerCallback):
    """Notes every event with the step on which it came."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **_: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def reference_trainer(
    model, tokenizer, train, validation=None, metrics=None, callbacks=(), **arguments
):
    """transformers' Trainer on rows with a text, a label and perhaps more columns."""

    def tokenized(rows):
        return datasets.Dataset.from_list(
            [{**tokenizer(row["text"], truncation=True), **row, "text": None} for row in rows]
        ).remove_columns("text")

    given = {"output_dir": "reference", "save_strategy": "no", "use_cpu": True}
    return Trainer(
        model=model,
        args=TrainingArguments(**{**given, "disable_tqdm": False, **arguments}),
        train_dataset=tokenized(train),
        eval_dataset=None if validation is None else tokenized(validation),
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


def reference(model, tokenizer, train, validation, metrics=None, callbacks=(), **arguments):
    """The run under transformers: its state, final weights and events."""
    recorder = Recorder()
    trainer = reference_trainer(
        model, tokenizer, train, validation, metrics, [recorder, *callbacks], **arguments
    )
    trainer.train()
    return trainer.state, model, recorder.events


def ours(model, tokenizer, train, validation, metrics=None, callbacks=(), parity=True, **arguments):
    """The same run under hflit."""
    recorder, trainer = Recorder(), HFTrainer()
    model, _ = trainer(
        (model, tokenizer),
        train,
        validation,
        metrics=metrics,
        parity=parity,
        callbacks=[recorder, *callbacks],
        **arguments,
    )
    return trainer.state, model, recorder.events


def without_times(entry):
    kept = {k: v for k, v in entry.items() if not any(word in k for word in TIMES)}
    return {k: v if v == v else "NaN" for k, v in kept.items()}  # NaN is not equal to itself


def assert_same_run(actual, expected):
    """Equal to the bit; we evaluate the final weights once more if nothing else has."""
    (state, model, events), (their_state, their_model, their_events) = actual, expected
    their_history = [without_times(entry) for entry in their_state.log_history]
    assert [without_times(e) for e in state.log_history[: len(their_history)]] == their_history
    assert [set(e) for e in state.log_history[: len(their_history)]] == [
        set(e) for e in their_state.log_history
    ]
    assert events[: len(their_events)] == their_events
    for name, weight in their_model.state_dict().items():
        ours = model.state_dict()[name]
        assert torch.allclose(ours, weight, rtol=0, atol=0, equal_nan=True), name
