"""Memory that the last run left."""

import gc
import weakref

from hflit import HFTrainer


def test_a_call_frees_what_the_last_one_left(tiny_bert, ragged_rows, monkeypatch):
    monkeypatch.setattr("hflit.pipeline.LARGE", 0)
    base, rows = tiny_bert(), ragged_rows(8)
    settings = {"save_strategy": "no", "max_steps": 1, "cache": False}
    gc.collect()
    gc.disable()  # else it may come by itself
    try:
        trainer = HFTrainer()
        trainer(base, rows, **settings)
        lightning = weakref.ref(trainer.lightning)
        del trainer
        HFTrainer()(base, rows, **settings)
        assert lightning() is None
    finally:
        gc.enable()
