"""Memory that is freed: kept while training, and given back after it."""

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from hflit import HFTrainer

# In a process of its own: what is free in this one depends on the tests before.
BLOCKS = """
import resource, torch
from hflit.loop.memory import freed_memory_kept

def faults(blocks):  # how many pages were got from the system for blocks of 64 MiB in turn
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():  # MiB
    with open("/proc/self/status") as status:
        return int(status.read().split("VmRSS:")[1].split()[0]) / 1024

as_before, before = faults(20), resident()
with freed_memory_kept():
    faults(20)  # the first few find no place that is large enough
    kept, held = faults(20), resident()
left = resident()
torch.zeros(2**26)  # 256 MiB, for which no free block is large enough
print(as_before, kept, held - before, left - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_memory_is_kept_for_the_next_block_and_given_back_at_the_end():
    told = subprocess.run(
        [sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True, timeout=120
    )
    as_before, kept, held, left, later = map(float, told.stdout.split())
    assert kept < as_before / 2
    assert held > 60
    assert left < 10
    assert later < 10


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
