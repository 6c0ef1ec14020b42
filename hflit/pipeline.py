"""HFTrainer: one run, told top to bottom."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import align_special_tokens, enable_full_determinism

from hflit.adapters import add_adapter, merged, weight_figures
from hflit.arguments import Arguments
from hflit.artifacts import check_base, save_artifacts
from hflit.loading import Base
from hflit.loop.bridge import Bridge
from hflit.loop.checkpoints import Checkpoints
from hflit.loop.finders import find_rate
from hflit.loop.folders import clean
from hflit.loop.hub import HubUpload
from hflit.loop.memory import fit_in_memory
from hflit.loop.resume import load_weights
from hflit.loop.run import batch_record, lightning_run, run_length
from hflit.loop.stops import Stops
from hflit.loop.strategies import Processes, run_in_processes
from hflit.loop.switches import model_switched, process_switched
from hflit.predict import predictions
from hflit.ranks import from_first
from hflit.report.card import write_card
from hflit.report.facts import data_facts, run_facts
from hflit.request import Plan, make_plan, read_request
from hflit.saved import Saved, save_run
from hflit.tasks import TaskModule
from hflit.tasks.distillation import Distillation
from hflit.tasks.parts import packable

logger = logging.getLogger(__name__)

# From so many parameters on it is worth a third of a second to free what the last run left.
LARGE = 1_000_000


class HFTrainer:
    """Fine-tunes any Hugging Face transformer in one call.

    After a call, `state` is the `TrainerState` of the run (`global_step`, `log_history`,
    `best_metric`, ...), `metrics` its last `train_*` and `eval_*` figures, and `lightning` the
    Lightning Trainer that ran it, but where the call started processes of their own for it.
    `predict` asks the trained model. After Ctrl-C or an error in training all of them are of
    the run as far as it got.
    """

    state: TrainerState
    metrics: dict[str, float]
    lightning: L.Trainer
    saved: Saved

    def __call__(
        self,
        base: Any,
        train: Any,
        validation: Any = None,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        stride: int = 128,
        task: str = "text-classification",
        prefix: str | None = None,
        metrics: Callable[..., dict[str, Any]] | str | None = None,
        tokenizers: int | bool | None = None,
        checkpoint: bool | str | os.PathLike[str] | None = None,
        quantize: Any = None,
        lora: Any = None,
        merge: str | None = "concat",
        teacher: Any = None,
        distillation: tuple[float, float] = (1.0, 0.5),
        tokenizebatch: int = 1000,
        parity: bool = False,
        merge_adapter: bool = False,
        cache: bool = True,
        whole_word: bool = False,
        skip_misaligned: bool = False,
        target_maxlength: int | None = None,
        generation_max_length: int | None = None,
        generation_num_beams: int | None = None,
        nonfinite: str | None = None,
        failed_save: str = "continue",
        trust_remote_code: bool = False,
        max_tokens_per_batch: int | None = None,
        find_learning_rate: bool = False,
        **args: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Train a model on labelled rows.

        Args:
            base: Hub id, local folder, or `(model, tokenizer)`, which is trained in place; with
                `lora` it stays as it is.
            train: Rows to learn from: `datasets.Dataset`, `IterableDataset` (with `max_steps`) or
                `DatasetDict`, pandas or polars DataFrame, iterable of dicts; or the name of a file
                (csv, tsv, json, jsonl, parquet, arrow, txt), a folder or a data set of the Hub; or
                one of these as `path` of a dict with keywords of `datasets.load_dataset`.
            validation: Rows to evaluate on, the same kinds; None for no evaluation.
            columns: Column names by task; for text-classification text, second text or None,
                label.
            maxlength: Longest row in tokens; by default what tokenizer and model can take.
            stride: Tokens shared by neighbouring windows of a long context (question-answering).
            task: Name of the task.
            prefix: Put before each source (sequence-sequence).
            metrics: Function from `transformers.EvalPrediction` to a dict, or `"auto"` for the
                task's own metrics.
            tokenizers: Processes that tokenize; True for one per core.
            checkpoint: Go on from this `checkpoint-N` folder, as if the run had never stopped; True
                for the newest whole one in `output_dir`.
            quantize: Load the base with quantized weights, on a CPU too: True for 4 bits (nf4,
                quantized twice), a dict to change that (`{"load_in_8bit": True}`), or a
                `transformers.BitsAndBytesConfig`. Quantized weights do not learn.
            lora: Learn low-rank changes of the weights, and the head of the task in full: True
                for r=16, alpha=8 and dropout 0.05 on all linear layers, a dict to change that, or
                a `peft.LoraConfig`. Returns and saves a `PeftModel`.
            merge: How texts fill rows (language tasks).
            teacher: Model to distil from, given as `base` is: one of the same task, vocabulary and
                classes.
            distillation: Temperature of the teacher, and its share of the loss from 0 to 1.
            tokenizebatch: Rows tokenized at a time. Never changes the result.
            parity: Run exactly the operations of `transformers.Trainer`, bit for bit.
            merge_adapter: Add what LoRA learned to the weights at the end, for a plain model.
                Quantized weights become floats for that, as rounded as they were in training.
            cache: Keep tokenized rows in the Hugging Face data sets cache; False keeps them in
                memory only.
            skip_misaligned: Leave out rows whose answer is not in the context where it should be;
                otherwise they are an error (question-answering).
            whole_word: Mask all tokens of a word or none (language-modeling, token-detection).
            target_maxlength: Longest target in tokens (sequence-sequence); by default what
                tokenizer and model can take.
            generation_max_length: Longest text in tokens that `metrics="auto"` generates
                (sequence-sequence); by default what the model's generation config says, else 128.
            generation_num_beams: Beams of that search; by default what the model's generation
                config says, else 1.
            nonfinite: What becomes of an update whose loss or gradient is NaN or infinite:
                `"stop"`, an error that names the update and its rows while the weights are still
                good; `"skip"`, a warning, and the weights stay as they are; `"ignore"`, NaN in all
                weights. By default stop, and ignore with parity, as transformers does.
            failed_save: What becomes of the run when a checkpoint cannot be written: `"continue"`
                with a warning, or `"stop"`. Earlier checkpoints stay whole.
            trust_remote_code: Run the code that comes with the base or the teacher, where
                transformers has none for their kind of model. Read that code first.
            max_tokens_per_batch: Train on batches of rows of like length, as many as hold at most
                so many tokens with their padding (sequence-sequence: of the source), in place of
                `per_device_train_batch_size` rows.
            find_learning_rate: Begin with a range test of up to 100 updates, and train from the
                first weights with a tenth of the learning rate at which the loss was lowest, in
                place of `learning_rate`. A run that goes on keeps the rate it found.
            args: Fields of `transformers.TrainingArguments` and flags of the Lightning Trainer.

        Returns:
            The trained model, in evaluation mode, and its tokenizer.

        Raises:
            TypeError: An argument has an unknown name, or data of an unknown kind.
            ValueError: An argument, a column, a label or a row is wrong. This and the others are
                raised before any weight is loaded.
            FileNotFoundError: No model, file or data set goes by a name.
            ImportError: An argument needs a package that is not installed.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "args")}
        request = read_request(given, args, HFTrainer.__call__)
        arguments, processes = request.arguments, request.processes
        if processes.start is not None:
            return self._call_in_processes(processes, given, args)
        arguments.set_ranks(*processes[:4])
        if arguments.should_save:
            clean(Path(arguments.output_dir or ""))
        with process_switched(arguments):
            plan = make_plan(request)
            changes, _, record = plan.settle()
            module = _loaded(plan, changes)
            model, tokenizer = module.model, plan.start.tokenizer
            hub = HubUpload()
            if arguments.push_to_hub:
                request.flags["callbacks"].append(hub)
            if find_learning_rate and plan.resumed is None:
                # Rates that end in losses without a value are tried too, so nonfinite comes after.
                _find_rate(plan, module)
            module.nonfinite = nonfinite or ("ignore" if parity else "stop")
            facts = run_facts(HFTrainer.__call__, given, args, plan.data, arguments)
            self.saved = Saved(task, model, tokenizer, facts)  # of a run that is stopped, too
            stops = Stops()
            with stops.noted():
                bridge = self._train(plan, module, record, stops)
                if merge_adapter:
                    model = request.task_class.each_model(model, merged)
                    self.saved = Saved(task, model, tokenizer, facts)
                model.eval()
                if arguments.should_save:
                    folder = arguments.output_dir or ""
                    save_artifacts(folder, model, tokenizer, bridge.state, arguments)
                    splits = plan.data.tokens
                    facts["splits"] = {split: data_facts(plan.data, split) for split in splits}
                    save_run(folder, facts)
                    write_card(folder, facts, self.state.log_history, self.metrics)
                    hub.finish(arguments)
                if bridge.failure is not None:
                    saved = f"; the model is in {folder}" if arguments.should_save else ""
                    logger.error("The evaluation after training failed%s.", saved)
                    raise bridge.failure
                from_first(None, processes.world)  # all of output_dir is there
        return model, tokenizer

    def _call_in_processes(
        self, processes: Processes, given: dict[str, Any], args: dict[str, Any]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The same call in new processes; the first of them tells how it went."""
        told = run_in_processes(processes, type(self), {**given, **args})
        model, tokenizer, self.state, self.metrics, settings = told
        base = given["base"]
        if isinstance(base, (list, tuple)) and not given["lora"]:
            own, trained = base[0].eval(), model
            if type(own) is type(trained):
                model, own.config = own, trained.config
            else:  # token-detection made a pair of it
                trained = trained.generator
            own.load_state_dict(trained.state_dict())
        self.saved = Saved(given["task"], model, tokenizer, settings)
        return model, tokenizer

    def _train(
        self, plan: Plan, module: TaskModule, record: dict[str, Any], stops: Stops
    ) -> Bridge:
        """Train, and what has watched it.

        Args:
            plan: Settled.
            module: The task with its model.
            record: What the rest of the run cannot change.
            stops: Notes the signals that ask it to stop.
        """
        request, model, data = plan.request, module.model, plan.data
        given, arguments, flags = request.given, request.arguments, request.flags
        _seed(arguments)

        def fit() -> Bridge:
            length = run_length(arguments, flags, data)
            run = {**record, **batch_record(arguments)}
            if given["find_learning_rate"]:
                run["found_rate"] = arguments.learning_rate
            tokenizer, failed_save = plan.start.tokenizer, given["failed_save"]
            checkpoints = Checkpoints(arguments, model, tokenizer, run, plan.resumed, failed_save)
            bridge, self.lightning = lightning_run(
                arguments, {**flags}, length, module, data, given["metrics"], checkpoints, stops
            )
            model.train()
            model.zero_grad()
            if not given["parity"]:  # after a lack of memory transformers goes on with its numbers
                _seed(arguments)
            try:
                self.lightning.fit(module, data)
            finally:  # as far as a run got that is stopped
                self.state, self.metrics = bridge.state, bridge.metrics
            bridge.metrics.update(weight_figures(model))  # in the precision of the run
            return bridge

        with _switched(plan, module):
            return fit_in_memory(fit, model, arguments)

    def predict(
        self, rows: Any, columns: list[str] | None = None, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """What the trained model says about each row, in their order; see `predictions`.

        Args:
            rows: What the call takes as `train`; labels are not read.
            columns: Columns of text; by default those of the training rows.
            batch_size: Rows that the model reads at a time.

        Raises:
            RuntimeError: Nothing was trained yet.
        """
        if not hasattr(self, "saved"):
            raise RuntimeError("Nothing was trained yet: predict asks the model of the last call.")
        return list(predictions(self.saved, rows, columns, batch_size))


def _loaded(plan: Plan, changes: dict[str, Any]) -> TaskModule:
    """The task and its model, as the first update finds them.

    Args:
        plan: Settled.
        changes: Values for the model's config.
    """
    request, start, resumed = plan.request, plan.start, plan.resumed
    given, arguments, task_class = request.given, request.arguments, request.task_class

    def model_of(base: Base, changes: dict[str, Any]) -> Any:
        model = task_class.load(base, changes)
        if given["merge"] == "pack":
            causal, longest = task_class.predicts_next, plan.data.tokenization.maxlength
            task_class.each_model(model, lambda each: packable(each, causal, longest))
        return model

    _seed(arguments)
    model = model_of(start, changes)
    if not given["parity"]:
        task_class.start_head(model, plan.data.tokens["train"])
    if sum(p.numel() for p in model.parameters()) >= LARGE:
        gc.collect()  # models and optimizers of runs before: Lightning ties them in cycles
    align_special_tokens(model, start.tokenizer)
    if request.adapter is not None:
        if start.model is not None and arguments.output_dir and not given["merge_adapter"]:
            model = task_class.each_model(model, check_base)
        model = task_class.each_model(model, partial(add_adapter, config=request.adapter))
    own = {**plan.options}
    if plan.school is not None:
        own["distillation"] = Distillation(model_of(plan.school, {}), *given["distillation"])
    module = task_class(model, arguments, given["parity"], **own)
    if resumed is not None:
        if request.flags["precision"] == "64-true":
            model.double()  # as Lightning will, too late for half of the digits
        load_weights(model, resumed.folder)
    return module


def _seed(arguments: Arguments) -> None:
    seed = enable_full_determinism if arguments.full_determinism else set_seed
    seed(arguments.seed)


def _switched(plan: Plan, module: TaskModule) -> AbstractContextManager[None]:
    """The model as the arguments want it while it trains."""
    teacher = None if module.distillation is None else module.distillation.teacher
    given = plan.request.given
    merges = given["merge_adapter"]
    return model_switched(module.model, plan.request.arguments, given["parity"], teacher, merges)


def _find_rate(plan: Plan, module: TaskModule) -> None:
    """Train with the learning rate that a range test finds."""
    arguments, flags = plan.request.arguments, plan.request.flags
    with _switched(plan, module):
        arguments.learning_rate = fit_in_memory(
            lambda: find_rate(module, plan.data, flags), module.model, arguments
        )
