"""Every argument: a value that was tried, what it does, whether transformers does the same.

`python -m tests.arguments.documentation` makes docs/arguments.md of it.
"""

from typing import Any, NamedTuple

import numpy as np

CHANGES = "test_fields.py::test_changes_the_run_as_in_transformers"
NOTHING = "test_fields.py::test_changes_nothing_as_in_transformers"
REFUSED = "test_fields.py::test_is_refused"
SPREADS = "test_fields.py::test_reaches_the_strategy"
LOADER = "test_order.py::test_loader_is_made_as_in_transformers"
LOGS = "test_logging.py::"
EVALUATES = "test_evaluation.py::"
MEMORY = "test_memory.py::"
TRACKS = "test_trackers.py::"
HUB = "test_hub.py::"
SAVES = "../loop/test_checkpoints.py::"
STOPS = "../loop/test_stops.py::"
SAVED_AS_THERE = "test_saves_where_transformers_does"
CLI = "no: transformers' Trainer never reads it either"


class Covered(NamedTuple):
    """How one argument was tried.

    Attributes:
        value: What it was set to.
        effect: What was seen.
        same: "yes", or "no: why" where transformers does otherwise.
        test: The test that saw it, from this folder.
        beside: Other arguments of the run.
    """

    value: Any
    effect: str
    same: str = "yes"
    test: str = CHANGES
    beside: dict[str, Any] = {}  # never changed


def seen(prediction):
    """Metrics that tell what they were given."""
    predictions, labels = prediction.predictions, prediction.label_ids
    return {
        "lists": isinstance(predictions, list) * len(predictions),
        "labels": len(labels) if isinstance(labels, tuple) else 1,
        "inputs": 0 if prediction.inputs is None else len(prediction.inputs),
        "losses": 0.0 if prediction.losses is None else float(np.mean(prediction.losses)),
    }


def running(prediction, compute_result=True):
    """Metrics over batches as they come."""
    running.rows = getattr(running, "rows", 0) + len(prediction.label_ids)
    if not compute_result:
        return {}
    counted, running.rows = running.rows, 0
    return {"rows": counted, "is_numpy": isinstance(prediction.label_ids, np.ndarray)}


EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2}
METRICS = {**EVERY_2, "metrics": seen}
GROUPED = {"train_sampling_strategy": "group_by_length"}

COVERAGE: dict[str, Covered] = {
    # Batching
    "per_device_train_batch_size": Covered(5, "Batches of 5 rows; other losses."),
    "per_device_eval_batch_size": Covered(2, "5 evaluation batches for 9 rows.", beside=EVERY_2),
    "gradient_accumulation_steps": Covered(
        2, "Two batches an update; on_substep_end between them."
    ),
    "average_tokens_across_devices": Covered(
        False, "Nothing in one process; for more see tests/loop/test_strategies.py.", test=NOTHING
    ),
    "auto_find_batch_size": Covered(
        True,
        "8 rows do not fit: trains with 7.",
        "no: transformers goes on from half-trained weights, hflit from those of the start",
        MEMORY + "test_batches_shrink_until_they_fit",
    ),
    "train_sampling_strategy": Covered("group_by_length", "Rows of like length in one batch."),
    "length_column_name": Covered(
        "size",
        "Rows with like numbers in one batch.",
        "no: transformers drops the column before it reads it",
        "test_order.py::test_length_column_decides_the_groups",
    ),
    "remove_unused_columns": Covered(
        False,
        "Rows with like numbers in one batch, see length_column_name.",
        beside={**GROUPED, "length_column_name": "size"},
    ),
    "label_names": Covered(
        ["labels", "attention_mask"], "The metrics get both as labels.", beside=METRICS
    ),
    # Steps and epochs
    "num_train_epochs": Covered(1.5, "5 updates instead of 9.", beside={"max_steps": -1}),
    "max_steps": Covered(3, "3 updates."),
    # Optimizer
    "learning_rate": Covered(1e-3, "Smaller steps."),
    "optim": Covered(
        "adafactor", "Other updates.", test="test_optimizers.py::test_trains_as_in_transformers"
    ),
    "optim_args": Covered("momentum=0.9", "SGD with momentum.", beside={"optim": "sgd"}),
    "optim_target_modules": Covered(
        "all-linear",
        "These layers are the second group of a stand-in of GaLore.",
        test="test_optimizers.py::test_galore_projects_the_named_layers",
    ),
    "weight_decay": Covered(0.5, "Smaller weights."),
    "adam_beta1": Covered(0.5, "Other updates."),
    "adam_beta2": Covered(0.5, "Other updates."),
    "adam_epsilon": Covered(1e-2, "Smaller updates."),
    "max_grad_norm": Covered(0.01, "Other updates; the same norm is logged."),
    # Schedule
    "lr_scheduler_type": Covered(
        "cosine",
        "All twelve give the same learning rates.",
        test="test_optimizers.py::test_schedule_gives_the_rates_of_transformers",
    ),
    "lr_scheduler_kwargs": Covered(
        {"num_cycles": 2}, "Two waves.", beside={"lr_scheduler_type": "cosine_with_restarts"}
    ),
    "warmup_steps": Covered(0.5, "Learning rate rises for 2 updates."),
    # Precision
    "bf16": Covered(True, "Losses under bfloat16 autocast."),
    "fp16": Covered(
        True, "Refused without an accelerator.", "yes: accelerate refuses it", test=REFUSED
    ),
    "bf16_full_eval": Covered(
        True,
        "Loss of bfloat16 weights, which are float32 again afterwards.",
        "no: transformers keeps the half weights; by default hflit takes them in training too",
        EVALUATES + "test_half_weights_are_for_evaluation_only",
    ),
    "fp16_full_eval": Covered(
        True,
        "Loss of float16 weights, which are float32 again afterwards.",
        "no: as bf16_full_eval",
        EVALUATES + "test_half_weights_are_for_evaluation_only",
    ),
    "tf32": Covered(True, "Refused on a CPU.", test=REFUSED),
    # Loss
    "label_smoothing_factor": Covered(0.2, "Higher losses."),
    "neftune_noise_alpha": Covered(5.0, "Other losses."),
    "logging_nan_inf_filter": Covered(
        False,
        "NaN in the log.",
        beside={"optim": "sgd", "learning_rate": 1e38, "max_grad_norm": 0.0},
    ),
    "use_cache": Covered(
        True,
        "In the model's config while it trains.",
        "no: transformers leaves it there, and saves it",
        MEMORY + "test_use_cache_holds_for_the_run",
    ),
    # Logging
    "logging_strategy": Covered("epoch", "An entry after 3 updates and after 4."),
    "logging_steps": Covered(2, "An entry every 2 updates."),
    "logging_first_step": Covered(True, "An entry after update 1.", beside={"logging_steps": 3}),
    "log_on_each_node": Covered(
        False,
        "Of two nodes the second one logs no more.",
        test=LOGS + "test_ranks_choose_the_level",
    ),
    "include_num_input_tokens_seen": Covered(
        "non_padding",
        "num_input_tokens_seen and train_tokens_per_second in the log.",
        test=LOGS + "test_tokens_are_counted_as_in_transformers",
    ),
    "log_level": Covered(
        "debug",
        "Level of transformers' logger in the run.",
        "no: transformers leaves it there",
        LOGS + "test_log_level_holds_for_the_run",
    ),
    "log_level_replica": Covered(
        "error",
        "Level of the other processes.",
        test=LOGS + "test_ranks_choose_the_level",
    ),
    "disable_tqdm": Covered(
        True, "Entries are printed instead.", test=LOGS + "test_entries_are_printed_without_a_bar"
    ),
    "report_to": Covered(
        "all",
        "Files of TensorBoard and a run of MLflow, with the entries of the log.",
        test=TRACKS + "test_every_installed_tracker_gets_the_log",
    ),
    "run_name": Covered(
        "first",
        "Name of the MLflow run.",
        test=TRACKS + "test_every_installed_tracker_gets_the_log",
    ),
    "project": Covered(
        "birds", "Reaches a stand-in of Trackio.", test=TRACKS + "test_trackio_is_told_the_same"
    ),
    "trackio_space_id": Covered(
        "me/space", "Reaches a stand-in of Trackio.", test=TRACKS + "test_trackio_is_told_the_same"
    ),
    "trackio_bucket_id": Covered(
        "me/bucket", "Reaches a stand-in of Trackio.", test=TRACKS + "test_trackio_is_told_the_same"
    ),
    "trackio_static_space_id": Covered(
        "me/static",
        "Reaches a stand-in of Trackio.",
        test=TRACKS + "test_trackio_is_told_the_same",
    ),
    # Evaluation
    "eval_strategy": Covered("epoch", "Evaluates after 3 updates and after 4."),
    "eval_steps": Covered(2, "Evaluates every 2 updates.", beside={"eval_strategy": "steps"}),
    "eval_delay": Covered(3, "Evaluates after update 4 only.", beside=EVERY_2),
    "eval_on_start": Covered(True, "Evaluates before update 1.", beside=EVERY_2),
    "prediction_loss_only": Covered(True, "No metrics.", beside=METRICS),
    "eval_do_concat_batches": Covered(
        False, "The metrics get a list of two arrays.", beside=METRICS
    ),
    "eval_use_gather_object": Covered(True, "Nothing in one process.", test=NOTHING),
    "eval_accumulation_steps": Covered(
        1,
        "Predictions leave the device after each batch.",
        test=EVALUATES + "test_predictions_leave_the_device",
    ),
    "include_for_metrics": Covered(
        ["inputs", "loss"], "The metrics get inputs and losses.", beside=METRICS
    ),
    "batch_eval_metrics": Covered(
        True, "The metrics get tensors, batch by batch.", beside={**EVERY_2, "metrics": running}
    ),
    # Saving, best model, resume
    "output_dir": Covered(
        "run",
        "Model, tokenizer, state and arguments are written there; without it nothing is.",
        "no: transformers writes into trainer_output",
        "../test_pipeline.py::test_with_output_dir_everything_is_there",
    ),
    "save_strategy": Covered(
        "best", "A checkpoint at each best evaluation.", test=SAVES + SAVED_AS_THERE
    ),
    "save_steps": Covered(
        0.3, "A checkpoint every 3 of 10 updates, and at the end.", test=SAVES + SAVED_AS_THERE
    ),
    "save_total_limit": Covered(
        1, "The newest checkpoint, and the best.", test=SAVES + SAVED_AS_THERE
    ),
    "save_only_model": Covered(
        True, "No optimizer, schedule and random numbers.", test=SAVES + SAVED_AS_THERE
    ),
    "save_on_each_node": Covered(
        True,
        "The first process of the second node saves too.",
        test=SAVES + "test_each_node_may_save",
    ),
    "enable_jit_checkpoint": Covered(
        True,
        "A checkpoint after SIGTERM, whatever save_strategy says.",
        "no: transformers waits 3 seconds first",
        STOPS + "test_jit_checkpoint_saves_whatever_the_strategy",
    ),
    "load_best_model_at_end": Covered(
        True, "Ends with the weights of the best evaluation.", test=SAVES + SAVED_AS_THERE
    ),
    "metric_for_best_model": Covered(
        "accuracy",
        "best_metric is the highest accuracy.",
        test=EVALUATES + "test_best_figure_is_that_of_transformers",
    ),
    "greater_is_better": Covered(
        False,
        "best_metric is the lowest accuracy.",
        test=EVALUATES + "test_best_figure_is_that_of_transformers",
    ),
    "resume_from_checkpoint": Covered(
        "run/checkpoint-2",
        "Goes on from update 2.",
        "no: transformers' Trainer never reads it",
        SAVES + "test_38_resume_from_checkpoint_is_another_name",
    ),
    "ignore_data_skip": Covered(
        True,
        "Takes the epoch from its first batch.",
        test=SAVES + "test_ignore_data_skip_takes_the_epoch_from_its_start",
    ),
    "restore_callback_states_from_checkpoint": Covered(
        True,
        "Early stopping remembers its patience.",
        test=SAVES + "test_callbacks_go_on_from_their_state",
    ),
    # Reproducibility and device
    "seed": Covered(7, "Another order, other dropout."),
    "data_seed": Covered(7, "Another order, the same dropout."),
    "full_determinism": Covered(
        True,
        "torch's deterministic algorithms in the run.",
        "no: transformers leaves them on",
        MEMORY + "test_determinism_holds_for_the_run",
    ),
    "use_cpu": Covered(
        True,
        "accelerator='cpu', even where there is another.",
        test=LOGS + "test_cpu_is_used_where_there_is_more",
    ),
    # Distributed
    "ddp_find_unused_parameters": Covered(False, "find_unused_parameters of DDP.", test=SPREADS),
    "ddp_bucket_cap_mb": Covered(25, "bucket_cap_mb of DDP.", test=SPREADS),
    "ddp_broadcast_buffers": Covered(False, "broadcast_buffers of DDP.", test=SPREADS),
    "ddp_static_graph": Covered(True, "Refused.", "no: parts of an update differ", REFUSED),
    "ddp_backend": Covered("gloo", "Backend of the process group.", test=SPREADS),
    "ddp_timeout": Covered(60, "A minute.", test=SPREADS),
    "fsdp": Covered(True, "Weights are sharded: FSDP2.", test=SPREADS),
    "fsdp_config": Covered(
        {"transformer_layer_cls_to_wrap": "BertLayer"},
        "Names the layers to shard; what it cannot hold is refused.",
        "no: weights stay gathered through an update",
        SPREADS,
        {"fsdp": True},
    ),
    "deepspeed": Covered({"zero": 1}, "Refused.", "no: it was never run here", REFUSED),
    "parallelism_config": Covered(
        object(), "Refused.", "no: needs sharding code of each model", REFUSED
    ),
    "accelerator_config": Covered(
        {"use_seedable_sampler": False}, "The order comes from torch's own random numbers."
    ),
    "local_rank": Covered(0, "Nothing.", CLI, NOTHING),
    # Dataloader
    "dataloader_drop_last": Covered(True, "2 batches for 22 rows.", beside={"max_steps": -1}),
    "dataloader_num_workers": Covered(2, "Two workers; the same batches.", test=LOADER),
    "dataloader_pin_memory": Covered(False, "Batches are not page-locked.", test=LOADER),
    "dataloader_persistent_workers": Covered(True, "Workers stay.", test=LOADER),
    "dataloader_prefetch_factor": Covered(3, "Three batches ahead.", test=LOADER),
    "dataloader_multiprocessing_context": Covered("fork", "Workers are forked.", test=LOADER),
    "dataloader_in_order": Covered(False, "Batches as they come.", test=LOADER),
    # Compile, kernels, memory
    "torch_compile": Covered(
        True, "A compiler got the model's graphs.", test=MEMORY + "test_model_is_compiled_in_place"
    ),
    "torch_compile_backend": Covered(
        "counting", "This compiler got them.", test=MEMORY + "test_model_is_compiled_in_place"
    ),
    "torch_compile_mode": Covered(
        "max-autotune", "It was told this mode.", test=MEMORY + "test_model_is_compiled_in_place"
    ),
    "activation_checkpointing": Covered(
        True,
        "Each layer runs twice an update; the same losses.",
        test=MEMORY + "test_activations_are_computed_again",
    ),
    "activation_checkpointing_kwargs": Covered(
        {"every_n_layers": 2},
        "Every second layer runs twice.",
        test=MEMORY + "test_activations_are_computed_again",
    ),
    "gradient_checkpointing": Covered(
        True,
        "As activation_checkpointing, with a warning.",
        test=MEMORY + "test_activations_are_computed_again",
    ),
    "gradient_checkpointing_kwargs": Covered(
        {"use_reentrant": True},
        "As activation_checkpointing_kwargs, with a warning.",
        test=MEMORY + "test_activations_are_computed_again",
    ),
    "use_liger_kernel": Covered(
        True, "Refused without the package, never run with it.", test=REFUSED
    ),
    "liger_kernel_config": Covered(
        {"rope": True}, "Refused alone.", "no: transformers ignores it", REFUSED
    ),
    "torch_empty_cache_steps": Covered(
        2,
        "The cache is emptied in updates 1 and 3.",
        test=MEMORY + "test_cache_is_emptied_as_often",
    ),
    # Hub
    "push_to_hub": Covered(
        True,
        "output_dir reaches a stand-in of the Hub.",
        "no: hflit writes no model card",
        HUB + "test_run_ends_on_the_hub",
    ),
    "hub_token": Covered(
        "hf_secret",
        "The stand-in gets it; no file, log entry or error holds it.",
        "no: transformers writes it into training_args.bin",
        HUB + "test_token_is_written_nowhere",
    ),
    "hub_private_repo": Covered(
        True, "Told when the repository is made.", test=HUB + "test_run_ends_on_the_hub"
    ),
    "hub_model_id": Covered(
        "me/bert", "Name of the repository.", test=HUB + "test_run_ends_on_the_hub"
    ),
    "hub_strategy": Covered(
        "checkpoint",
        "The checkpoint is uploaded as last-checkpoint.",
        test=HUB + "test_strategy_decides_what_is_uploaded",
    ),
    "hub_always_push": Covered(
        True,
        "Uploads while another upload runs.",
        test=HUB + "test_uploads_wait_for_each_other_or_not",
    ),
    "hub_revision": Covered(
        "trial", "Branch of each upload.", test=HUB + "test_run_ends_on_the_hub"
    ),
    # Misc
    "debug": Covered(
        "underflow_overflow",
        "Stops at the first NaN, and prints the layers before it.",
        test=MEMORY + "test_overflow_is_found",
    ),
    "skip_memory_metrics": Covered(
        False,
        "The same *_mem_* names in the log.",
        test=MEMORY + "test_memory_figures_have_the_names_of_transformers",
    ),
    "do_train": Covered(True, "Nothing.", CLI, NOTHING),
    "do_eval": Covered(True, "Nothing.", CLI, NOTHING),
    "do_predict": Covered(True, "Nothing.", CLI, NOTHING),
}
