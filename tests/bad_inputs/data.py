"""Wrong rows, columns, labels and lengths."""

import datasets
import pandas as pd
import pyarrow as pa

from tests.bad_inputs.case import Case, labels, rows
from tests.tasks import tiny

QA, S2S = "question-answering", "sequence-sequence"
LM, MLM, RTD = "language-generation", "language-modeling", "token-detection"
NAN = float("nan")
CLASSES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
)


def classes(*values, names=("a", "b")):
    features = CLASSES.copy()
    features["label"] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_list(labels(*values)).cast(features)


def stream(found):
    return datasets.Dataset.from_list(found).to_iterable_dataset()


COLUMNS = [
    Case("a column that is not there", ("'label'", "'text', 'tag'", "columns=("),
         {"train": [{"text": "w1", "tag": 0}, {"text": "w2", "tag": 1}]}),
    Case("a misspelt column", ("'txet'", "'text', 'label'", "columns=("),
         {"columns": ("txet", "label")}),
    Case("a misspelt column of a frame", ("'sentence'", "training", "columns=("),
         {"columns": ("sentence", "label"), "train": pd.DataFrame(labels(0, 1))}),
    Case("a column that validation lacks", ("'label'", "validation", "columns=("),
         {"validation": [{"text": "w1"}, {"text": "w2"}]}),
    Case("too many columns", ("columns=", "1 to 3 columns"), {"columns": ("a", "b", "c", "d")}),
    Case("no columns", ("columns=()", "1 to 3 columns"), {"columns": ()}),
    Case("a column named twice", ("columns=", "twice"), {"columns": ("text", "text", "label")}),
    Case("no name for a column that is needed", ("columns=", "'label'"),
         {"columns": ("text", None, None)}),
    Case("a frame with two columns of one name", ("more than one column 'label'", "training"),
         {"train": pd.DataFrame([["w1", 0, 1]] * 4, columns=["text", "label", "label"])}),
    Case("a column name that is a number", ("columns=", "5"), {"columns": ("text", 5)}),
    Case("columns of a frame without names", ("columns=(0, ", "must be texts", "other names"),
         {"columns": (0, 1), "train": pd.DataFrame([["w1", 0], ["w2", 1]])}),
    Case("columns in a dict", ("columns={'text': 'a'", "in the order ('text', None, 'label')"),
         {"columns": {"text": "a", "label": "b"}}),
    Case("columns that are a number", ("columns=3", "must be texts"), {"columns": 3}),
    Case("the question's column is missing", ("'question'", "columns=("),
         {"train": [{"context": "w1", "answers": "w1"}]}, task=QA),
    Case("the target's column is missing", ("'target'", "columns=("),
         {"train": [{"source": "w1"}]}, task=S2S),
    Case("the text's column is missing", ("'text'", "columns=("), {"train": [{"body": "w1"}]},
         task=LM),
]  # fmt: skip

ROWS = [
    Case("no rows", ("The training data has no rows",), {"train": []}),
    Case("no validation rows", ("The validation data has no rows",), {"validation": []}),
    Case("an empty frame", ("The training data has no rows",),
         {"train": pd.DataFrame({"text": [], "label": []})}),
    Case("an empty data set", ("The training data has no rows",),
         {"train": datasets.Dataset.from_dict({"text": [], "label": []})}),
    Case("a generator that gives nothing", ("The training data has no rows",),
         lambda _: {"train": iter(())}),
    Case("a row that is no dict", ("Row 3 of the training data", "list", "dict"),
         {"train": rows(["w1", 0])}, TypeError),
    Case("a text that is missing", ("Row 3 of the training data", "no text in 'text'"),
         {"train": rows({"text": None})}),
    Case("a text that is NaN", ("Row 3 of the training data", "no text in 'text'"),
         {"train": pd.DataFrame(rows({"text": NAN}))}),
    Case("half a character in a text", ("Row 3 of the training data", "'text'", "surrogate"),
         {"train": rows({"text": "w1 \ud83d"})}),
    Case("half a character in a text of a frame", ("Row 3 of the training data", "'text'"),
         {"train": pd.DataFrame(rows({"text": "w1 \ud83d"}).copy(), dtype=object)}),
    Case("a validation text that is missing", ("Row 3 of the validation data", "'text'"),
         {"validation": rows({"text": None})}),
    Case("a text among numbers", ("'text'", "training", "row 3", "7"),
         {"train": rows({"text": 7})}),
    Case("texts that are numbers", ("'text'", "holds int64, not text", "row 0"),
         {"train": [{"text": n, "label": n % 2} for n in range(4)]}),
    Case("texts that are bytes", ("'text'", "binary, not text", "row 0"),
         {"train": [{"text": b"w1", "label": n % 2} for n in range(4)]}),
    Case("texts that are lists of words", ("'text'", "not text", "row 0"),
         {"train": [{"text": ["w1"], "label": n % 2} for n in range(4)]}),
    Case("data that are a number", ("train is int", "data"), {"train": 7}, TypeError),
    Case("data that are None", ("train is None",), {"train": None}, TypeError),
    Case("data that are a dict of columns", ("train is dict", "iterable of dicts"),
         {"train": {"text": ["w1"], "label": [0]}}, TypeError),
    Case("data that are a table of Arrow", ("train is Table", "datasets.Dataset"),
         {"train": pa.table({"text": ["w1"], "label": [0]})}, TypeError),
    Case("a dict of data sets without training rows", ("'a', 'b'", "training", "data['name']"),
         {"train": datasets.DatasetDict({"a": classes(0, 1), "b": classes(0, 1)})}),
    Case("the name of a split that is not there", ("validation='dve'", "'train', 'dev'"),
         {"train": datasets.DatasetDict({"train": classes(0, 1), "dev": classes(0, 1)}),
          "validation": "dve"}),
    Case("a stream without a length", ("max_steps", "Streaming"),
         {"train": stream(labels(0, 1)), "max_steps": -1}),
    Case("a stream to be grouped by length", ("train_sampling_strategy='group_by_length'",
         "streaming", "'random'"),
         {"train": stream(labels(0, 1)), "train_sampling_strategy": "group_by_length"}),
    Case("fewer rows than a batch", ("No batch is left", "dataloader_drop_last"),
         {"dataloader_drop_last": True, "per_device_train_batch_size": 100}),
    Case("texts without a single token", ("training", "no tokens", "tokenizer"),
         lambda _: {"train": [{"text": ""}] * 4, "base": _bare(LM)}, task=LM),
    Case("texts without a single token, each alone", ("Row 2", "no tokens", "tokenizer"),
         lambda _: {"train": [{"text": "w1"}, {"text": "w2"}, {"text": " "}], "merge": None,
                    "base": _bare(LM)}, task=LM),
    Case("sources without a single token", ("Row 1", "no tokens", "tokenizer"),
         lambda _: {"train": [{"source": "w1", "target": "w2"}, {"source": "", "target": "w1"}],
                    "base": _bare(S2S)}, task=S2S),
    Case("targets without a single token", ("Row 1", "no tokens", "tokenizer"),
         lambda _: {"train": [{"source": "w1", "target": "w2"}, {"source": "w1", "target": ""}],
                    "base": _bare(S2S)}, task=S2S),
    Case("a text that is missing in a stream", ("Row 3 of the training data", "'text'"),
         {"train": stream(rows({"text": None}))}),
    Case("a label of a stream beyond the rows that were looked at", ("streamed training data",
         "training data lacks: 'd'", "It has 'a', 'b', 'c'"),
         {"train": stream(labels(*"abcabcab", "d")), "per_device_train_batch_size": 4},
         trains=True),
    Case("a text that is missing beyond the rows that were looked at", ("Row 8 of the streamed",),
         {"train": stream([*labels(*"abcabcab"), {"text": None, "label": "a"}]),
          "per_device_train_batch_size": 4}, trains=True),
    Case("a text for a language model that is missing", ("Row 3", "no text in 'text'"),
         {"train": rows({"text": None}, task=MLM)}, task=MLM),
    Case("a source that is missing", ("Row 3", "no text in 'source'"),
         {"train": rows({"source": None}, task=S2S)}, task=S2S),
    Case("a target that is missing", ("Row 3", "no text in 'target'"),
         {"train": rows({"target": None}, task=S2S)}, task=S2S),
    Case("targets that are numbers", ("'target'", "not text", "row 0"),
         {"train": [{"source": "w1", "target": n} for n in range(4)]}, task=S2S),
    Case("a target without references", ("Row 1", "no text in 'target'"),
         {"train": [{"source": "w1", "target": ["w2"]}, {"source": "w1", "target": []}]}, task=S2S),
    Case("a reference that is no text", ("Row 1", "'target'", "not a list of texts"),
         {"train": [{"source": "w1", "target": ["w2"]}, {"source": "w1", "target": [None]}]},
         task=S2S),
]  # fmt: skip

LABELS = [
    Case("a label that is missing", ("Row 3 of the training data", "no label in 'label'"),
         {"train": rows({"label": None})}),
    Case("a label that is NaN", ("Row 2 of the training data", "no label in 'label'"),
         {"train": labels(0.5, 1.5, NAN)}),
    Case("a label that is infinite", ("inf", "row 2", "training"),
         {"train": labels(0.5, 1.5, float("inf"))}),
    Case("labels of one class", ("Every label", "0", "needs two"), {"train": labels(0, 0, 0)}),
    Case("labels of two kinds", ("'label'", "row 1", "'a'", "0"), {"train": labels(0, "a", 1)}),
    Case("labels that are dicts", ("'label'", "struct", "Labels are numbers"),
         {"train": labels({"a": 1}, {"a": 2})}),
    Case("labels that are dates", ("'label'", "timestamp", "Labels are numbers"),
         {"train": pd.DataFrame({"text": ["w1"] * 2, "label": pd.to_datetime(["2020", "2021"])})}),
    Case("lists of fractions", ("'label'", "lists of fractions"),
         {"train": labels([0.5, 0.2], [0.1, 0.9])}),
    Case("uneven lists of numbers", ("'label'", "1 to 3 values"),
         {"train": labels([0], [1, 0, 1], [1])}),
    Case("empty lists", ("'label'", "No row"), {"train": labels([], [])}),
    Case("a missing label in a list", ("Row 1", "missing label in 'label'"),
         {"train": labels([0, 1], [None, 1])}),
    Case("a validation label that training lacks", ("validation", "'z'", "'a', 'b'"),
         {"train": labels("a", "b"), "validation": labels("a", "z")}),
    Case("a validation class that training lacks", ("validation", "2", "0, 1"),
         {"train": labels(0, 1), "validation": labels(0, 2),
          "base": tiny.make("text-classification", 0, labels=2)}),
    Case("validation labels that are no scores", ("'label'", "validation", "scores"),
         {"train": labels(0.5, 1.0), "validation": labels("a", "b")}),
    Case("validation labels that are lists", ("validation", "a list of labels", "one label"),
         {"train": labels(0, 1), "validation": labels([0, 1], [1, 0])}),
    Case("validation lists of another width", ("validation", "lists of 3 values"),
         {"train": labels([0, 1, 1], [1, 0, 0]), "validation": labels([0, 1], [1, 0])}),
    Case("rows without a class", ("'label'", "-1 in ClassLabel"), {"train": classes(0, 1, -1)}),
    Case("other classes in validation", ("'label'", "['b', 'a']", "['a', 'b']"),
         {"train": classes(0, 1), "validation": classes(0, 1, names=("b", "a"))}),
    Case("words as the answers of a score", ("'label'", "row 2", "'high'"),
         {"train": labels(0.1, 0.7, "high")}),
]  # fmt: skip

ANSWERS = [
    Case("an answer that is not in its context", ("Row 3", "'nowhere'", "skip_misaligned=True"),
         {"train": rows({"answers": "nowhere"}, task=QA)}, task=QA),
    Case("an answer that starts elsewhere", ("Row 3", "answer_start=1", "'w21'", "skip_misalig"),
         {"train": rows({"context": "w20 w21", "answers": {"text": ["w21"], "answer_start": [1]}},
                        task=QA)}, task=QA),
    Case("an answer before its context", ("Row 3", "answer_start=-4", "skip_misaligned=True"),
         {"train": rows({"answers": {"text": ["w21"], "answer_start": [-4]}}, task=QA)}, task=QA),
    Case("answers that are numbers", ("'answers'", "row 3", "7"),
         {"train": rows({"answers": 7}, task=QA)}, task=QA),
    Case("answers without a text", ("Row 3", "answer_start", "not a string"),
         {"train": rows({"answers": {"answer_start": [1]}}, task=QA)}, task=QA),
    Case("answers of unlike numbers", ("Row 3", "not a string"),
         {"train": rows({"answers": {"text": ["w1"], "answer_start": [1, 2]}}, task=QA)}, task=QA),
    Case("a question that is missing", ("Row 3", "no text in 'question'"),
         {"train": rows({"question": None}, task=QA)}, task=QA),
    Case("a context that is missing", ("Row 3", "no text in 'context'"),
         {"train": rows({"context": None}, task=QA)}, task=QA),
    Case("no answer that is aligned", ("none is aligned",),
         {"train": [{"question": "w1", "context": "w2", "answers": "w3"}],
          "skip_misaligned": True}, task=QA),
    Case("a question too long for its context", ("Row 3", "leaves 0", "maxlength=16", "stride=4"),
         {"train": rows({"question": "w1 " * 40}, task=QA), "maxlength": 16, "stride": 4}, task=QA),
    Case("a stride as long as a span", ("stride=40", "less than", "maxlength=32"),
         {"stride": 40, "maxlength": 32}, task=QA),
    Case("a stride below nothing", ("stride=-1", "at least 0"), {"stride": -1, "maxlength": 32},
         task=QA),
]  # fmt: skip

LENGTHS = [
    Case("no length", ("maxlength=0", "at least 1"), {"maxlength": 0}),
    Case("a length below nothing", ("maxlength=-5", "at least 1"), {"maxlength": -5}),
    Case("a length with room for no text", ("maxlength=2", "no room for text", "2 special"),
         {"maxlength": 2}),
    Case("a length beyond the model", ("maxlength=1000", "64 tokens the model takes"),
         {"maxlength": 1000}),
    Case("a length that is a word", ("maxlength='long'", "whole number"), {"maxlength": "long"},
         TypeError),
    Case("a length that is a fraction", ("maxlength=12.5", "whole number"), {"maxlength": 12.5},
         TypeError),
    Case("a target length with room for no text", ("target_maxlength=0", "at least 1"),
         {"target_maxlength": 0}, task=S2S),
    Case("rows to fill without a length", ("merge='concat'", "give maxlength"),
         lambda _: {"base": _unlimited(S2S)}, task=LM),
    Case("a tokenizing batch of nothing", ("tokenizebatch=0", "at least 1"), {"tokenizebatch": 0}),
]  # fmt: skip


def _unlimited(task):
    """A causal model and a tokenizer, neither of which has a limit."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=105, hidden_size=16, n_layer=1, n_head=2)
    tokenizer = tiny.make(task, 0)[1]
    tokenizer.model_max_length = int(1e30)
    return BloomForCausalLM(config), tokenizer


def _bare(task):
    """A model, and a tokenizer that adds no tokens of its own."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny.make(task, 0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return model, tokenizer


CASES = [*COLUMNS, *ROWS, *LABELS, *ANSWERS, *LENGTHS]
