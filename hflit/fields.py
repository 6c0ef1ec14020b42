"""The names a call may use: TrainingArguments fields, retired ones, Lightning flags; a leaf."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """One TrainingArguments field in a Lightning run.

    Attributes:
        disposition: mapped (an option of a library), module (task module), callback, datamodule,
            refuse (raises) or no-op (transformers' own Trainer never reads it either).
        how: One sentence for the docs: what is done with the field.
    """

    disposition: str
    how: str


FIELDS: dict[str, Field] = {
    # Batching
    "per_device_train_batch_size": Field("datamodule", "Rows in a micro-batch of one process."),
    "per_device_eval_batch_size": Field("datamodule", "Rows in an evaluation batch."),
    "gradient_accumulation_steps": Field(
        "module", "Micro-batches in a window, which is one weight update and one Lightning batch."
    ),
    "average_tokens_across_devices": Field(
        "module", "The loss of a window is divided by the label tokens of all processes."
    ),
    "auto_find_batch_size": Field(
        "module", "Starts again with 9/10 of the batch when memory runs out."
    ),
    "train_sampling_strategy": Field(
        "datamodule", "Order of the training rows; an unknown name is refused."
    ),
    "length_column_name": Field(
        "datamodule", "Column with the row lengths, for grouping; else they are counted."
    ),
    "remove_unused_columns": Field(
        "datamodule", "Only the columns of the task are read, whatever it says."
    ),
    "label_names": Field("module", "Batch keys that hold labels; found in forward by default."),
    # Steps and epochs
    "num_train_epochs": Field("mapped", "Sets the number of updates; 0.5 is half an epoch."),
    "max_steps": Field("mapped", "Number of updates, instead of epochs; 0 is refused."),
    # Optimizer
    "learning_rate": Field("module", "Highest learning rate of the schedule."),
    "optim": Field("module", "Built by transformers; LOMO, XLA and NPU names are refused."),
    "optim_args": Field("module", "Options of the optimizer; refused where it would ignore them."),
    "optim_target_modules": Field("module", "Layers that GaLore and APOLLO project; else refused."),
    "weight_decay": Field("module", "Applied to all weights but biases and norms."),
    "adam_beta1": Field("module", "Passed to the optimizer."),
    "adam_beta2": Field("module", "Passed to the optimizer."),
    "adam_epsilon": Field("module", "Passed to the optimizer."),
    "max_grad_norm": Field("module", "Clips the norm of a window's gradient; 0 only measures it."),
    # Schedule
    "lr_scheduler_type": Field("module", "Built by transformers, stepped once per update."),
    "lr_scheduler_kwargs": Field("module", "Options of the schedule; refused for constant ones."),
    "warmup_steps": Field("module", "Updates of warmup, or below 1 their share of the run."),
    # Precision
    "bf16": Field("mapped", "Forward under bfloat16 autocast: precision='bf16-mixed'."),
    "fp16": Field(
        "mapped", "Forward under float16 autocast, gradients scaled: precision='16-mixed'."
    ),
    "bf16_full_eval": Field(
        "module", "Evaluates in bfloat16 weights, and goes back to the others."
    ),
    "fp16_full_eval": Field("module", "Evaluates in float16 weights, and goes back to the others."),
    "tf32": Field("mapped", "Switched in torch as soon as the arguments are built."),
    # Loss
    "label_smoothing_factor": Field("module", "Smooths labels as transformers does."),
    "neftune_noise_alpha": Field("module", "Noise on the embeddings while the model trains."),
    "logging_nan_inf_filter": Field("module", "Keeps NaN and infinite losses out of the log."),
    "use_cache": Field("mapped", "Set in the model's config while it trains; not saved."),
    # Logging
    "logging_strategy": Field("callback", "Decides when losses are logged."),
    "logging_steps": Field("callback", "Updates between entries, or below 1 a share of the run."),
    "logging_first_step": Field("callback", "Also logs the first update."),
    "log_on_each_node": Field("mapped", "Chooses the processes that use log_level."),
    "include_num_input_tokens_seen": Field(
        "module", "Counts input tokens for the log, with or without padding."
    ),
    "log_level": Field("mapped", "Verbosity of transformers on the main process."),
    "log_level_replica": Field("mapped", "Verbosity of transformers on the other processes."),
    "disable_tqdm": Field("callback", "The opposite of enable_progress_bar."),
    "report_to": Field("callback", "Runs the trackers of transformers."),
    "run_name": Field("callback", "Name of the run for the trackers."),
    "project": Field("callback", "Project of the run for Trackio."),
    "trackio_space_id": Field("callback", "Passed to Trackio."),
    "trackio_bucket_id": Field("callback", "Passed to Trackio."),
    "trackio_static_space_id": Field("callback", "Passed to Trackio."),
    # Evaluation
    "eval_strategy": Field("callback", "Decides when the validation data are evaluated."),
    "eval_steps": Field("callback", "Updates between evaluations; logging_steps by default."),
    "eval_delay": Field("callback", "No evaluation before this update or epoch."),
    "eval_on_start": Field("callback", "Evaluates once before the first update."),
    "prediction_loss_only": Field("module", "Evaluation keeps only the losses."),
    "eval_do_concat_batches": Field("module", "False hands the metrics one array per batch."),
    "eval_use_gather_object": Field(
        "module", "Gathers predictions of any type; one process has nothing to gather."
    ),
    "eval_accumulation_steps": Field("module", "Evaluation batches kept on the device."),
    "include_for_metrics": Field("module", "Adds inputs or loss to what the metrics get."),
    "batch_eval_metrics": Field("module", "Calls the metrics after each batch."),
    # Saving, best model, resume
    "output_dir": Field("mapped", "Where everything is written; without it nothing is."),
    "save_strategy": Field("callback", "Decides when a checkpoint is written."),
    "save_steps": Field("callback", "Updates between checkpoints, or their share of the run."),
    "save_total_limit": Field(
        "callback", "Checkpoints to keep; the newest and the best always stay."
    ),
    "save_only_model": Field("callback", "Checkpoints to use, but not to resume."),
    "save_on_each_node": Field("callback", "Every node writes its own files."),
    "enable_jit_checkpoint": Field(
        "callback", "Writes a checkpoint on SIGTERM and Ctrl-C, whatever save_strategy says."
    ),
    "load_best_model_at_end": Field("callback", "Ends on the best weights."),
    "metric_for_best_model": Field("callback", "Figure that decides which evaluation is best."),
    "greater_is_better": Field("callback", "Direction of that figure; found from its name."),
    "resume_from_checkpoint": Field("mapped", "Another name for checkpoint=."),
    "ignore_data_skip": Field("datamodule", "Resumes at the start of an epoch."),
    "restore_callback_states_from_checkpoint": Field(
        "callback", "Callbacks go on from their saved state."
    ),
    # Reproducibility and device
    "seed": Field("module", "Set before the model is loaded and again before training."),
    "data_seed": Field("datamodule", "Seed of the order of rows; seed by default."),
    "full_determinism": Field(
        "mapped", "Deterministic kernels in torch and in Lightning, for the time of the run."
    ),
    "use_cpu": Field("mapped", "accelerator='cpu'; True where torch finds no accelerator."),
    # Distributed
    "ddp_find_unused_parameters": Field("mapped", "Passed to DDP; True by default."),
    "ddp_bucket_cap_mb": Field("mapped", "Passed to DDP."),
    "ddp_broadcast_buffers": Field("mapped", "Passed to DDP."),
    "ddp_static_graph": Field("mapped", "Passed to DDP."),
    "ddp_backend": Field("mapped", "Backend of the process group."),
    "ddp_timeout": Field("mapped", "Timeout of the process group."),
    "fsdp": Field("mapped", "Shards weights over the processes."),
    "fsdp_config": Field("mapped", "Options of the sharding."),
    "deepspeed": Field("refuse", "Refused: it was never run here. fsdp shards weights too."),
    "parallelism_config": Field(
        "refuse", "Refused: its splits need sharding code made for each model."
    ),
    "accelerator_config": Field("datamodule", "How batches are dealt to processes."),
    "local_rank": Field("no-op", "The rank comes from the environment."),
    # Dataloader
    "dataloader_drop_last": Field("datamodule", "Leaves out the last, smaller batch."),
    "dataloader_num_workers": Field("datamodule", "Processes that load data."),
    "dataloader_pin_memory": Field("datamodule", "Page-locked batches; off on CPU."),
    "dataloader_persistent_workers": Field("datamodule", "Workers outlive an epoch."),
    "dataloader_prefetch_factor": Field("datamodule", "Batches a worker loads ahead."),
    "dataloader_multiprocessing_context": Field("datamodule", "How workers are started."),
    "dataloader_in_order": Field("datamodule", "Batches come in the order they were asked for."),
    # Compile, kernels, memory
    "torch_compile": Field("mapped", "Compiles the model in place."),
    "torch_compile_backend": Field("mapped", "Passed to the compiler."),
    "torch_compile_mode": Field("mapped", "Passed to the compiler."),
    "activation_checkpointing": Field("mapped", "Computes activations again to save memory."),
    "activation_checkpointing_kwargs": Field("mapped", "Passed to activation checkpointing."),
    "gradient_checkpointing": Field("mapped", "Older name of activation_checkpointing."),
    "gradient_checkpointing_kwargs": Field(
        "mapped", "Older name of activation_checkpointing_kwargs."
    ),
    "use_liger_kernel": Field(
        "module", "Replaces layers by Liger kernels, which must be installed."
    ),
    "liger_kernel_config": Field("module", "Options of these kernels; refused without them."),
    "torch_empty_cache_steps": Field("module", "Updates between emptyings of the device cache."),
    # Hub
    "push_to_hub": Field("callback", "Uploads output_dir to the Hugging Face Hub."),
    "hub_token": Field("callback", "Token of the upload; never logged, never saved."),
    "hub_private_repo": Field("callback", "Whether a new repository is private."),
    "hub_model_id": Field("callback", "Repository; the name of output_dir by default."),
    "hub_strategy": Field("callback", "What is uploaded, and when."),
    "hub_always_push": Field("callback", "Uploads even while an upload is running."),
    "hub_revision": Field("callback", "Branch of the upload."),
    # Misc
    "debug": Field("module", "underflow_overflow stops at the first inf or NaN in a layer."),
    "skip_memory_metrics": Field("callback", "False adds memory figures to the metrics."),
    "do_train": Field("no-op", "A switch for scripts."),
    "do_eval": Field("no-op", "A switch for scripts."),
    "do_predict": Field("no-op", "A switch for scripts."),
}


class Renamed(NamedTuple):
    """A field that an earlier transformers had and that today has another name.

    Attributes:
        now: Today's name.
        default: The old default, which asked for nothing.
        translate: Makes today's value of the old value and of all keywords given.
    """

    now: str
    default: Any = None
    translate: Callable[[Any, Mapping[str, Any]], Any] = lambda value, given: value


def _always(new: Any) -> Callable[[Any, Mapping[str, Any]], Any]:
    return lambda value, given: new


def _key(name: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    return lambda value, given: {name: value}


def _warmup(ratio: float, given: Mapping[str, Any]) -> float:
    if not (isinstance(ratio, (int, float)) and 0 <= ratio <= 1):
        raise ValueError(f"warmup_ratio={ratio!r} must be a share of the run, from 0 to 1.")
    # warmup_steps reads 1 as one update. The float just below rounds up to the whole run.
    return min(ratio, math.nextafter(1.0, 0.0))


def _layers(size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": size}


def _repository(value: str, given: Mapping[str, Any]) -> str:
    name = given.get("push_to_hub_model_id") or Path(given.get("output_dir") or "").name
    organization = given.get("push_to_hub_organization")
    return f"{organization}/{name}" if organization else name


# RENAMED, DROPPED and GONE: the fields of transformers 4.10 to 5.10 that 5.23 lacks.
RENAMED: dict[str, Renamed] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "warmup_ratio": Renamed("warmup_steps", 0, _warmup),
    "no_cuda": Renamed("use_cpu", False),
    "adafactor": Renamed("optim", False, _always("adafactor")),
    "group_by_length": Renamed("train_sampling_strategy", False, _always("group_by_length")),
    "include_inputs_for_metrics": Renamed("include_for_metrics", False, _always(["inputs"])),
    "include_tokens_per_second": Renamed("include_num_input_tokens_seen", False, _always("all")),
    "tpu_metrics_debug": Renamed("debug", False, _always("tpu_metrics_debug")),
    "torchdynamo": Renamed("torch_compile_backend"),
    "xpu_backend": Renamed("ddp_backend"),
    "dispatch_batches": Renamed("accelerator_config", None, _key("dispatch_batches")),
    "split_batches": Renamed("accelerator_config", None, _key("split_batches")),
    "fsdp_min_num_params": Renamed("fsdp_config", 0, _layers),
    "fsdp_transformer_layer_cls_to_wrap": Renamed(
        "fsdp_config", None, _key("transformer_layer_cls_to_wrap")
    ),
    "push_to_hub_token": Renamed("hub_token"),
    "push_to_hub_model_id": Renamed("hub_model_id", None, _repository),
    "push_to_hub_organization": Renamed("hub_model_id", None, _repository),
}

# Without effect on a run: name -> what to know instead.
DROPPED: dict[str, str] = {
    "overwrite_output_dir": "a run always writes into output_dir.",
    "logging_dir": "TensorBoard reads the environment variable TENSORBOARD_LOGGING_DIR.",
    "use_legacy_prediction_loop": "there is one evaluation loop, with the same figures.",
    "use_mps_device": "an Apple GPU is used when there is one; see accelerator.",
    "fp16_opt_level": "it was an option of Apex; see fp16 and bf16.",
    "tpu_num_cores": "only launchers read it; see devices.",
    "mp_parameters": "only the launcher of SageMaker read it.",
    "ray_scope": "only hyperparameter search read it.",
}

# Asked for what no longer exists: name -> (values that asked for nothing, what to do instead).
_AUTOCAST = (("auto", "amp", "cuda_amp", "cpu_amp"), "Use fp16=True or bf16=True, without Apex.")
GONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "half_precision_backend": _AUTOCAST,
    "fp16_backend": _AUTOCAST,
    "sharded_ddp": (("", False, [], None), "Use fsdp=True."),
    "use_ipex": ((False,), "Leave it out: torch has these kernels now; see bf16."),
    "jit_mode_eval": ((False,), "Use torch_compile=True."),
    "past_index": ((-1,), "Leave it out: no memory is carried from batch to batch."),
    "save_safetensors": ((True,), "Leave it out: weights are always saved as safetensors."),
    "tp_size": ((0, 1, None), "Use fsdp=True to split a model over devices."),
}

# The flags of the Lightning Trainer, but for max_steps, which is an argument and means the same.
PASSED = frozenset(
    {
        *("logger", "callbacks", "profiler", "plugins", "max_time", "inference_mode"),
        # limit_train_batches counts updates, as a Lightning batch is a whole window.
        *("limit_train_batches", "limit_val_batches"),
        *("detect_anomaly", "sync_batchnorm"),
        *("enable_model_summary", "enable_autolog_hparams"),
    }
)

# Flag -> the argument that says the same; the two must agree.
SHARED: dict[str, str] = {
    "accelerator": "use_cpu",
    "precision": "bf16 and fp16",
    "enable_progress_bar": "disable_tqdm",
    "deterministic": "full_determinism",
    "benchmark": "full_determinism",
    "fast_dev_run": "max_steps",
}

# Which processes run.
PROCESSES = frozenset({"strategy", "devices", "num_nodes"})

# Flag -> what to do instead.
REFUSED: dict[str, str] = {
    "barebones": "It measures Lightning without what makes a run: see profiler.",
    "accumulate_grad_batches": "Use gradient_accumulation_steps.",
    "gradient_clip_val": "Use max_grad_norm.",
    "gradient_clip_algorithm": "Use max_grad_norm, which clips by norm.",
    "max_epochs": "Use num_train_epochs.",
    "min_epochs": "Nothing extends a run: it ends with num_train_epochs, or where a callback says.",
    "min_steps": "Nothing extends a run: it ends with max_steps, or where a callback says.",
    "val_check_interval": "Use eval_strategy='steps' with eval_steps.",
    "check_val_every_n_epoch": "Use eval_strategy='epoch', or 'steps' with eval_steps.",
    "num_sanity_val_steps": "Use eval_on_start=True.",
    "log_every_n_steps": "Use logging_steps.",
    "default_root_dir": "Use output_dir.",
    "enable_checkpointing": "Use save_strategy.",
    "model_registry": "Use push_to_hub=True with hub_model_id.",
    "limit_test_batches": "The call trains and evaluates. Use limit_val_batches.",
    "limit_predict_batches": "The call trains and evaluates. Use limit_val_batches.",
    "overfit_batches": "Use limit_train_batches and train_sampling_strategy='sequential'.",
    "use_distributed_sampler": "Leave it out: hflit deals the rows to the processes itself.",
    "reload_dataloaders_every_n_epochs": "Train again with the new rows and the returned model.",
}

# What every run gives Lightning. A caller who asks for just this is not refused.
FIXED: dict[str, Any] = {
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    # The callback evaluates. With 1 or None here, Lightning 2.6 evaluates once more by itself
    # as soon as something stops the run.
    "check_val_every_n_epoch": 10**9,
}
