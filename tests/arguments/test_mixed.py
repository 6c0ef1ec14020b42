"""Arguments together: twenty draws from a table, each through transformers and through hflit."""

import random

import pytest

from tests.arguments.coverage import running, seen
from tests.reference import assert_same_run

VALUES = {
    "per_device_train_batch_size": [4, 8],
    "per_device_eval_batch_size": [3, 8],
    "gradient_accumulation_steps": [1, 1, 2, 3],
    "num_train_epochs": [1, 1.5, 2],
    "max_steps": [-1, -1, 5],
    "learning_rate": [1e-3, 5e-3],
    "optim": ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"],
    "weight_decay": [0.0, 0.1],
    "adam_beta2": [0.99, 0.999],
    "max_grad_norm": [0.0, 0.1, 1.0],
    "lr_scheduler_type": ["linear", "cosine", "constant", "inverse_sqrt", "cosine_with_restarts"],
    "warmup_steps": [0, 2, 0.3],
    "bf16": [False, False, True],
    "label_smoothing_factor": [0.0, 0.1],
    "neftune_noise_alpha": [None, 5.0],
    "logging_strategy": ["steps", "epoch"],
    "logging_steps": [1, 2, 0.3],
    "logging_first_step": [False, True],
    "include_num_input_tokens_seen": ["no", "all", "non_padding"],
    "eval_strategy": ["no", "steps", "epoch"],
    "eval_steps": [2, 0.4],
    "eval_delay": [0, 1],
    "eval_on_start": [False, True],
    "eval_do_concat_batches": [True, False],
    "include_for_metrics": [[], ["loss"], ["inputs", "loss"]],
    "batch_eval_metrics": [False, True],
    "prediction_loss_only": [False, False, True],
    "train_sampling_strategy": ["random", "random", "group_by_length", "batch_rebalance"],
    "dataloader_drop_last": [False, True],
    "activation_checkpointing": [False, True],
    "seed": [1, 42],
    "data_seed": [None, 5],
}


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("draw", range(20))
def test_mixed_arguments_run_as_in_transformers(draw, theirs, mine):
    rng = random.Random(draw)
    given = {name: rng.choice(values) for name, values in VALUES.items()}
    given["metrics"] = running if given["batch_eval_metrics"] else seen
    assert_same_run(mine(**given), theirs(**given))
