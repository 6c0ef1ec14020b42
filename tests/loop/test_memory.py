"""Memory that is freed: kept while training, and given back after it."""

import gc
import platform
import weakref

import pytest
import torch

from hflit import HFTrainer
from hflit.loop.memory import freed_memory_kept

resource = pytest.importorskip("resource")

MIB = 2**20


def faults():
    """How many pages were got from the system for twenty blocks of 64 MiB in turn."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(16 * MIB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """MiB of the process in memory."""
    with open("/proc/self/status") as status:
        return int(status.read().split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_memory_is_kept_for_the_next_block_and_given_back_at_the_end():
    as_before = faults()
    before = resident()
    with freed_memory_kept():
        assert faults() < as_before / 2  # the first few find no place that is large enough
        assert resident() > before + 60
    assert resident() < before + 10
    assert faults() > as_before / 2


def test_a_call_frees_what_the_last_one_left(tiny_bert, ragged_rows):
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
