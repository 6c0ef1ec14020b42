"""A run where weights and batches lie on a device: no tensor of the host gets among them.

No GPU is needed: `pretended.cpp` makes torch find an accelerator whose memory is the host's.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from tests.device.pretended import NAME, RUNS

HERE = Path(__file__).parent
# In bfloat16, of 8 bits, another order of a sum moves the last one; and a correlation of
# predictions that are nearly one another's equal follows their last bits.
COARSE = {"bf16": 2e-3, "regression": 5e-4}
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="torch takes one accelerator"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the program says."""
    library = tmp_path_factory.mktemp("device") / "pretended.so"
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(HERE / "pretended.cpp"),
            *(f"-I{each}" for each in include_paths()), "-o", str(library),
            f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10",
        ],
        check=True, timeout=300,
    )  # fmt: skip
    program = [sys.executable, "-m", "tests.device.pretended", str(library)]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=500, cwd=HERE.parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tensor_of_the_host_is_refused(told):
    """Without that the other tests could not fail."""
    assert "Expected all tensors to be on the same device" in told["mixing"]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_cpu(told, name):
    """sequence-sequence looked up rows of the host by the device's; a figure was of float64."""
    run = told[name]
    assert "failed" not in run, run["failed"]
    assert set(run["devices"]) == {NAME}
    assert run["guesses"] == 3
    assert len(run["there"]) == len(run["here"]) >= 5
    for there, here in zip(run["there"], run["here"], strict=True):
        assert there == pytest.approx(here, rel=COARSE.get(name, 1e-5))


def test_a_run_goes_on_as_if_it_had_not_stopped(told):
    assert told["resume"]["resumed"] == told["resume"]["whole"]
    assert told["resume"]["random"] == [7]
