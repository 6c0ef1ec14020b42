"""Wrong arguments, models and tokenizers."""

import json

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)

from tests.bad_inputs.case import Case, labels
from tests.tasks import tiny

QA, S2S = "question-answering", "sequence-sequence"
LM, MLM, RTD = "language-generation", "language-modeling", "token-detection"
TC = "text-classification"

ARGUMENTS = [
    Case("a task that does not exist", ("'token-classification'", "Choose one of: text-class"),
         {"task": "token-classification"}),
    Case("an argument that does not exist", ("'learning_rat'", "Did you mean 'learning_rate'"),
         {"learning_rat": 1e-3}, TypeError),
    Case("two that do not exist", ("'epocs'", "'batchsize'"), {"epocs": 1, "batchsize": 2},
         TypeError),
    Case("a rate that is a word", ("learning_rate='fast'", "a number"), {"learning_rate": "fast"},
         TypeError),
    Case("a negative rate", ("learning_rate=-0.1", "0 or more"), {"learning_rate": -0.1}),
    Case("a rate that is NaN", ("learning_rate=nan",), {"learning_rate": float("nan")}),
    Case("a batch of no rows", ("per_device_train_batch_size=0", "1 or more"),
         {"per_device_train_batch_size": 0}),
    Case("a batch of half a row", ("per_device_train_batch_size=0.5", "whole number"),
         {"per_device_train_batch_size": 0.5}, TypeError),
    Case("an evaluation batch of no rows", ("per_device_eval_batch_size=0", "1 or more"),
         {"per_device_eval_batch_size": 0}),
    Case("a window of nothing", ("gradient_accumulation_steps=0", "1 or more"),
         {"gradient_accumulation_steps": 0}),
    Case("no epochs", ("num_train_epochs=0", "more than 0"), {"num_train_epochs": 0,
                                                             "max_steps": -1}),
    Case("a number of epochs in words", ("num_train_epochs='three'", "a number"),
         {"num_train_epochs": "three", "max_steps": -1}, TypeError),
    Case("no updates", ("max_steps=0", "Give 1 or more"), {"max_steps": 0}),
    Case("an optimizer that does not exist", ("optim='adamw_trch'", "adamw_torch"),
         {"optim": "adamw_trch"}),
    Case("a compiler that does not exist", ("torch_compile_backend='inductr'", "inductor"),
         {"torch_compile_backend": "inductr"}),
    Case("a way to compile that does not exist", ("torch_compile_mode='fast'", "max-autotune"),
         {"torch_compile": True, "torch_compile_mode": "fast"}),
    Case("a schedule that does not exist", ("lr_scheduler_type='linaer'", "linear"),
         {"lr_scheduler_type": "linaer"}),
    Case("an option that the schedule lacks", ("'cosine'", "{'cycles': 3}"),
         {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 3}}),
    Case("a warmup beyond the run", ("warmup_ratio=2", "from 0 to 1"), {"warmup_ratio": 2}),
    Case("a negative warmup", ("warmup_steps", "-3"), {"warmup_steps": -3}),
    Case("a precision that does not exist", ("precision='bf8'", "bf16-mixed"),
         {"precision": "bf8"}),
    Case("half precision without an accelerator", ("fp16=True", "bf16=True"), {"fp16": True}),
    Case("two precisions", ("bf16=True", "precision='32'", "contradict"),
         {"bf16": True, "precision": "32"}),
    Case("checkpoints without a folder", ("save_strategy='steps'", "output_dir"),
         {"save_strategy": "steps"}),
    Case("the best model without evaluations", ("load_best_model_at_end", "eval_strategy"),
         lambda folder: {"load_best_model_at_end": True, "save_strategy": "steps",
                         "output_dir": str(folder / "out")}),
    Case("the best model of evaluations of nothing", ("limit_val_batches=0", "best"),
         lambda folder: {"load_best_model_at_end": True, "save_strategy": "epoch",
                         "eval_strategy": "epoch", "limit_val_batches": 0,
                         "validation": labels(0, 1), "output_dir": str(folder / "out")}),
    Case("evaluations without data", ("eval_strategy", "validation="), {"eval_strategy": "epoch"}),
    Case("a strategy that does not exist", ("eval_strategy='often'", "epoch"),
         {"eval_strategy": "often", "validation": labels(0, 1)}),
    Case("a best figure that there is not", ("'accurcy'", "metrics="),
         {"metric_for_best_model": "accurcy", "eval_strategy": "steps", "eval_steps": 1,
          "validation": labels(0, 1)}),
    Case("a best figure that the metrics lack", ("'accurcy'", "eval_loss", "eval_accuracy"),
         {"metric_for_best_model": "accurcy", "eval_strategy": "steps", "eval_steps": 1,
          "validation": labels(0, 1), "metrics": lambda _: {"accuracy": 1.0}},
         KeyError, trains=True),
    Case("metrics that are a word", ("metrics='accuracy'", "a function, 'auto'"),
         {"metrics": "accuracy", "validation": labels(0, 1)}),
    Case("logs every 0 updates", ("logging_steps", "0"), {"logging_steps": 0}),
    Case("evaluations every -1 updates", ("eval_steps", "-1"),
         {"eval_strategy": "steps", "eval_steps": -1, "validation": labels(0, 1)}),
    Case("accumulation in Lightning's words", ("accumulate_grad_batches=4", "gradient_accumul"),
         {"accumulate_grad_batches": 4}),
    Case("an epoch count in Lightning's words", ("max_epochs=4", "num_train_epochs"),
         {"max_epochs": 4}),
    Case("a callback that is none", ("callbacks", "'mine'"), {"callbacks": ["mine"]}, TypeError),
    Case("Lightning's checkpoints", ("callbacks", "ModelCheckpoint", "Use save_strategy"),
         {"callbacks": [ModelCheckpoint()]}),
    Case("Lightning's early stopping", ("EarlyStopping", "Use transformers.EarlyStoppingCallback"),
         {"callbacks": [EarlyStopping("eval_loss")]}),
    Case("Lightning's accumulation", ("Scheduler", "Use gradient_accumulation_steps"),
         {"callbacks": GradientAccumulationScheduler({0: 2})}),
    Case("Lightning's mean of weights", ("EMAWeightAveraging", "after they were evaluated"),
         {"callbacks": [EMAWeightAveraging()]}),
    Case("Lightning's search for a batch size", ("Finder", "Use auto_find_batch_size"),
         {"callbacks": [BatchSizeFinder()]}),
    Case("a measure of Lightning's loop", ("barebones=True", "profiler"), {"barebones": True}),
    Case("a schedule that divides by zero", ("'polynomial'", "2 of 2 updates warm up"),
         {"lr_scheduler_type": "polynomial", "warmup_steps": 2}),
    Case("a tracker that does not exist", ("report_to", "wandbb"), {"report_to": "wandbb"}),
    Case("an option of another task", ("stride=64", "means nothing to text-classification"),
         {"stride": 64}),
    Case("a prefix for a classifier", ("prefix=", "means nothing to"), {"prefix": "say: "}),
    Case("a merge that does not exist", ("merge='packed'", "'pack'"), {"merge": "packed"},
         task=LM),
    Case("whole words without masks", ("whole_word=True", "masks nothing"), {"whole_word": True},
         task=LM),
    Case("a seed that is none", ("seed=-1", "from 0 to 4294967295"), {"seed": -1}),
    Case("-1 workers", ("dataloader_num_workers=-1", "0 or more"), {"dataloader_num_workers": -1}),
    Case("a strategy of processes that does not exist", ("strategy='dpp'", "ddp"),
         {"strategy": "dpp", "devices": 2}),
    Case("no device", ("devices", "0"), {"devices": 0}),
    Case("what to do with NaN in words", ("nonfinite='raise'", "stop, skip, ignore"),
         {"nonfinite": "raise"}),
    Case("what to do with full disks in words", ("failed_save='ignore'", "continue, stop"),
         {"failed_save": "ignore"}),
    Case("a switch that is a word", ("parity='false'", "True or False"), {"parity": "false"},
         TypeError),
    Case("a prefix that is a number", ("prefix=3", "text"), {"prefix": 3}, TypeError, S2S),
    Case("LoRA in a word", ("lora is str", "LoraConfig"), {"lora": "yes"}, TypeError),
    Case("a setting that LoRA lacks", ("lora", "'rank'"), {"lora": {"rank": 4}}, TypeError),
    Case("a folder that is a file", ("output_dir=", "is a file"),
         lambda folder: {"output_dir": _file(folder / "out")}),
    Case("a temperature of nothing", ("distillation=(0, 0.5)", "above 0"),
         {"distillation": (0, 0.5)}),
    Case("a share above all", ("distillation=(1, 2)", "from 0 to 1"), {"distillation": (1, 2)}),
    Case("a share alone", ("distillation=0.5", "a temperature", "a share"), {"distillation": 0.5}),
    Case("a temperature alone", ("distillation=(2,)", "a share"), {"distillation": (2,)}),
    Case("a temperature in words", ("distillation=('hot', 0.5)",), {"distillation": ("hot", 0.5)}),
    Case("a teacher under parity", ("parity=True", "no teacher"),
         {"teacher": "x", "parity": True}),
    Case("-1 tokenizing processes", ("tokenizers=-1", "number of processes"), {"tokenizers": -1}),
    Case("smoothing beyond all", ("label_smoothing_factor=2", "from 0 to 1"),
         {"label_smoothing_factor": 2}),
]  # fmt: skip


def _file(path):
    path.write_text("mine")
    return str(path)


def saved(folder, task=TC, **changes):
    """A folder with a model, and what becomes of its files: text, or None for gone."""
    base = folder / "base"
    model, tokenizer = tiny.make(task, 0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, text in changes.items():
        path = base / name.replace("__", ".")
        path.unlink() if text is None else path.write_text(text)
    return str(base)


def cut(folder):
    """A folder whose weights end too early."""
    base = saved(folder)
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return base


def without(token, task=TC):
    """A model, and its tokenizer without one of its tokens."""
    model, tokenizer = tiny.make(task, 0)
    setattr(tokenizer, token, None)
    return model, tokenizer


def slow():
    """A tokenizer that does not tell which characters a token comes from."""
    model, tokenizer = tiny.make(QA, 0)

    class Slow(type(tokenizer)):
        is_fast = property(lambda self: False)

    tokenizer.__class__ = Slow
    return model, tokenizer


def large():
    """A tokenizer with more tokens than the model has embeddings."""
    model, tokenizer = tiny.make(TC, 0)
    tokenizer.add_tokens(["new1", "new2"])
    return model, tokenizer


def other_words():
    """A model and a tokenizer that agree, with two words more than the others."""
    model, tokenizer = large()
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def short():
    """A model with 16 positions."""
    model, tokenizer = tiny.make(TC, 0)
    model.config.max_position_embeddings = 16
    return type(model)(model.config), tokenizer


def adapter(folder):
    """A folder that holds an adapter and nothing else."""
    base = folder / "adapter"
    base.mkdir()
    (base / "adapter_config.json").write_text("{}")
    return str(base)


def custom(folder):
    """A folder with a kind of model that comes with its own code."""
    base = saved(folder)
    path = folder / "base" / "config.json"
    names = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    path.write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    (folder / "base" / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return base


MODELS = [
    Case("a teacher that is a number", ("teacher is int", "(model, tokenizer)"), {"teacher": 7},
         TypeError),
    Case("a base that is a number", ("base is int", "(model, tokenizer)"), {"base": 7}, TypeError),
    Case("a model without its tokenizer", ("base is", "(model, tokenizer)"),
         lambda _: {"base": tiny.make(TC, 0)[0]}, TypeError),
    Case("a tokenizer that is a name", ("tokenizer in base is str", "Load it first"),
         lambda _: {"base": (tiny.make(TC, 0)[0], "bert")}, TypeError),
    Case("a base that is nowhere", ("'runs/nothing'", "no folder", "Hub"),
         {"base": "runs/nothing"}, FileNotFoundError),
    Case("an empty folder", ("no folder with a model",),
         lambda folder: {"base": _made(folder / "empty")}, FileNotFoundError),
    Case("a config that is cut off", ("config.json", "JSON"),
         lambda folder: {"base": saved(folder, config__json='{"model_type": "be')}),
    Case("a config of no kind of model", ("base", "model_type"),
         lambda folder: {"base": saved(folder, config__json="{}")}),
    Case("a folder without a tokenizer", ("base", "tokenizer"),
         lambda folder: {"base": saved(folder, tokenizer__json=None, tokenizer_config__json=None)}),
    Case("a folder without weights", ("base", "not there", "model.safetensors"),
         lambda folder: {"base": saved(folder, model__safetensors=None)}),
    Case("weights that are cut off", ("base", "cannot be read", "cut off"),
         lambda folder: {"base": cut(folder)}),
    Case("an adapter alone", ("holds an adapter", "merge_adapter=True"),
         lambda folder: {"base": adapter(folder)}),
    Case("a model with its own code", ("base", "code", "trust_remote_code=True"),
         lambda folder: {"base": custom(folder)}),
    Case("a head of another task", ("BertForQuestionAnswering", "AutoModelForSequenceClass"),
         lambda _: {"base": tiny.make(QA, 0)}),
    Case("a classifier that should answer", ("BertForSequenceClassification", "QuestionAnswering"),
         lambda _: {"base": tiny.make(TC, 0)}, task=QA),
    Case("a decoder that should fill masks", ("no mask token",),
         lambda _: {"base": without("mask_token", LM)}, task=MLM),
    Case("a causal model that should fill masks", ("GPT2LMHeadModel", "AutoModelForMaskedLM"),
         lambda _: {"base": tiny.make(LM, 0)}, task=MLM),
    Case("an encoder that should translate", ("BertForMaskedLM", "AutoModelForSeq2SeqLM"),
         lambda _: {"base": tiny.make(MLM, 0)}, task=S2S),
    Case("a folder of an encoder that should translate", ("base", "bert", "AutoModelForSeq2SeqLM"),
         lambda folder: {"base": saved(folder)}, task=S2S),
    Case("a model with other classes", ("3 classes", "2", "by name"),
         lambda _: {"base": tiny.make(TC, 0), "train": labels("a", "b")}),
    Case("a tokenizer without padding", ("no padding token", "tokenizer.pad_token"),
         lambda _: {"base": without("pad_token")}),
    Case("a tokenizer without a mask", ("no mask token",),
         lambda _: {"base": without("mask_token", MLM)}, task=MLM),
    Case("a tokenizer without a mask for detection", ("no mask token",),
         lambda _: {"base": without("mask_token", RTD)}, task=RTD),
    Case("a tokenizer that knows no characters", ("Slow", "fast tokenizer"),
         lambda _: {"base": slow()}, task=QA),
    Case("a tokenizer with too many tokens", ("107 tokens", "105", "resize_token_embeddings"),
         lambda _: {"base": large()}),
    Case("a teacher with another vocabulary", ("teacher", "another vocabulary"),
         lambda _: {"teacher": other_words()}),
    Case("a teacher with other classes", ("teacher knows the classes", "training data"),
         lambda _: {"teacher": tiny.make(TC, 0, labels=2)}),
    Case("a teacher of shorter rows", ("teacher takes 16 tokens", "maxlength=64"),
         lambda _: {"teacher": short()}),
    Case("a teacher without a head", ("teacher is a BertForMaskedLM", "Train it first"),
         lambda folder: {"teacher": saved(folder, MLM)}),
]  # fmt: skip


def _made(folder):
    folder.mkdir()
    return str(folder)


CASES = [*ARGUMENTS, *MODELS]
