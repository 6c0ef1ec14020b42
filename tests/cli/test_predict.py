"""`hflit predict` and `HFTrainer.predict`: rows in, predictions out, in the same order."""

import csv
import datetime
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import pipeline

from hflit import HFTrainer
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows

COLUMNS = {
    "text-classification": {"label", "score"},
    "question-answering": {"answer", "score", "start", "end"},
    "sequence-sequence": {"generated"},
    "language-generation": {"generated"},
    "language-modeling": {"filled", "tokens", "scores"},
    "token-detection": {"tokens", "scores"},
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_says_something_about_each_row(task, program):
    data = rows(task)
    if task == "language-modeling":
        data = [{"text": row["text"] + " [MASK]"} for row in data]
    trainer = HFTrainer()
    options = {"stride": 8} if task == "question-answering" else {}
    if task == "sequence-sequence":
        options["generation_max_length"] = 5
    trainer(make(task, 0), data, task=task, max_steps=1, maxlength=32, output_dir="out", **options)
    found = trainer.predict(data, batch_size=5)
    assert len(found) == len(data)
    assert set(found[0]) == COLUMNS[task]
    if task == "question-answering":
        for row, each in zip(data, found, strict=True):
            assert row["context"][each["start"] : each["end"]] == each["answer"]
    if task == "language-modeling":
        assert all(len(each["tokens"]) == 1 and "[MASK]" not in each["filled"] for each in found)

    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        status, _, err = program(
            "predict", "--model", "out", "--data", "new.jsonl", "--output", name, "--batch_size", 5
        )
        assert status == 0, err
        assert f"{len(data)} predictions ({task})" in err
    kept = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [_rounded(row) for row in kept] == [_rounded(row) for row in found]
    table = datasets.Dataset.from_parquet("out.parquet", cache_dir="cache")
    assert [_rounded(row) for row in table] == [_rounded(row) for row in found]
    with open("out.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(data)


def _rounded(row):
    kept = {}
    for name, value in row.items():
        if name in ("score", "scores"):
            value = torch.tensor(value).mul(1e4).round().tolist()
        kept[name] = value
    return kept


def test_a_classifier_says_what_the_pipeline_of_transformers_says(tiny_bert, ragged_rows):
    data = ragged_rows(50)
    trainer = HFTrainer()
    model, tokenizer = trainer(tiny_bert(), data, max_steps=2)
    expected = pipeline("text-classification", model, tokenizer=tokenizer, device="cpu")(
        [row["text"] for row in data]
    )
    found = trainer.predict(data)
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([e["score"] for e in expected])


def test_several_labels_and_scores_of_a_regression(tiny_bert, ragged_rows):
    data = ragged_rows(12)
    several = [{**row, "label": [1, 0, 1]} for row in data]
    trainer = HFTrainer()
    trainer(tiny_bert(num_labels=3), several, max_steps=30, learning_rate=1e-2)
    assert trainer.predict(several)[0]["label"] == ["LABEL_0", "LABEL_2"]
    scores = [{**row, "label": i / 7} for i, row in enumerate(data)]
    trainer(tiny_bert(num_labels=1), scores, max_steps=1)
    assert set(trainer.predict(scores)[0]) == {"score"}


def test_a_prompt_is_not_ended_and_keeps_its_end(monkeypatch):
    """GPT-2 with BERT's tokenizer, as the Chinese ones: 64 positions, half of them to write in."""
    trainer = HFTrainer()
    model, tokenizer = trainer(
        make("language-generation", 0), rows("language-generation"), max_steps=1,
        task="language-generation", merge=None, maxlength=8,
    )  # fmt: skip
    given, generate = [], type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **told: given.append(told) or generate(self, **told),
    )
    words = [f"w{n}" for n in range(20)]
    (found,) = trainer.predict([{"text": " ".join(words)}])
    assert tokenizer.convert_ids_to_tokens(given[0]["input_ids"][0]) == ["[CLS]", *words]
    assert found["generated"]

    words = [f"w{n}" for n in range(50)]
    with pytest.warns(UserWarning, match="Prompts are cut at their start to 32 tokens"):
        trainer.predict([{"text": " ".join(words)}, {"text": ""}])
    # An empty one has room for more.
    prompts = [tokenizer.convert_ids_to_tokens(each["input_ids"][0]) for each in given[1:]]
    assert sorted(prompts, key=len) == [["[CLS]"], ["[CLS]", *words[-31:]]]


def test_a_short_prompt_is_continued_as_if_it_were_alone():
    """Once a long neighbour left it as little room as itself."""
    trainer = HFTrainer()
    task = "language-generation"
    trainer(make(task, 0), rows(task), task=task, max_steps=1, merge=None, cache=False)
    trainer.saved.model.generation_config.eos_token_id = None  # goes on to the end
    short, long = {"text": "w1 w2"}, {"text": "w3 " * 30}
    alone, beside = trainer.predict([short]), trainer.predict([short, long])
    assert beside[0] == alone[0]
    assert len(beside[1]["generated"].split()) < len(alone[0]["generated"].split())


@pytest.mark.parametrize("unanswerable", [False, True])
def test_predicted_answers_are_those_that_were_evaluated(unanswerable):
    """Where all rows have an answer, none may be left out; once the null token won here alone."""
    task = "question-answering"
    given = [row for row in rows(task) if row["answers"]]
    given += [{**given[0], "answers": None}] * unanswerable
    trainer = HFTrainer()
    options = {"maxlength": 16, "stride": 4, "metrics": "auto", "max_steps": 1}
    model, _ = make(task, 0)
    with torch.no_grad():
        model.qa_outputs.weight[:, 0] += 5.0
    trainer((model, make(task, 0)[1]), given, given, task=task, cache=False, **options)
    found = trainer.predict(given)
    right = [
        said["answer"] == (row["answers"] or "") for said, row in zip(found, given, strict=True)
    ]
    assert 100 * sum(right) / len(right) == pytest.approx(trainer.metrics["eval_exact_match"])
    if not unanswerable:
        assert all(said["answer"] for said in found)


def test_one_of_several_splits_has_to_be_named(tiny_bert, ragged_rows):
    """Once the validation split was taken, without a word."""
    trainer = HFTrainer()
    trainer(tiny_bert(), ragged_rows(8), max_steps=1)
    splits = {name: Dataset.from_list(ragged_rows(3)) for name in ("validation", "test")}
    with pytest.raises(ValueError, match=r"hold 'validation', 'test'. Pass one, as in data"):
        trainer.predict(DatasetDict(splits))
    assert len(trainer.predict(DatasetDict(test=splits["test"]))) == 3


def test_who_has_trained_nothing_can_predict_nothing():
    with pytest.raises(RuntimeError, match="Nothing was trained yet"):
        HFTrainer().predict([{"text": "w1"}])


def test_one_output_of_no_stated_problem_is_a_score(tiny_bert):
    """As rerankers have it; a softmax over one class is 1."""
    texts = [{"text": "w1"}, {"text": "w2 w3"}]
    rows = [{**row, "label": n + 0.5} for n, row in enumerate(texts)]
    trainer = HFTrainer()
    model, tokenizer = trainer(tiny_bert(num_labels=1), rows, max_steps=1)
    model.config.problem_type = None
    with torch.no_grad():
        expected = [model(**tokenizer(row["text"], return_tensors="pt")).logits for row in texts]
    found = [each["score"] for each in trainer.predict(texts)]
    assert found == pytest.approx([float(each) for each in expected], abs=1e-6)


def test_the_truth_can_be_kept_beside(base, program):
    program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")
    out = program("predict", "--model", "out", "--data", "val.jsonl", "--keep", "[text, label]")[1]
    assert list(json.loads(out.splitlines()[0])) == ["text", "given_label", "label", "score"]


def test_a_question_without_room_for_its_context_is_told_by_its_row():
    """Once by its place in a batch, which is sorted by length."""
    trainer, data = HFTrainer(), rows("question-answering")
    trainer(make("question-answering", 0), data, task="question-answering", max_steps=1,
            maxlength=16, stride=4)  # fmt: skip
    data[7]["question"] = "w1 " * 12
    with pytest.raises(ValueError, match="Row 7: the question 'w1 w1"):
        trainer.predict(data, batch_size=5)


def test_the_masks_of_two_texts_are_filled_each_in_its_own():
    trainer = HFTrainer()
    model, tokenizer = trainer(
        make("language-modeling", 0), rows("language-modeling"), task="language-modeling",
        max_steps=1, maxlength=12,
    )  # fmt: skip
    texts = {"text": "w1 [MASK]", "more": "[MASK] w2 [MASK]"}
    (found,) = trainer.predict([texts], columns=["text", "more"])
    one, two, three = found["tokens"]
    assert found["filled"] == [f"w1 {one}", f"{two} w2 {three}"]
    with torch.no_grad():
        tokens = tokenizer(*texts.values(), return_tensors="pt")
        logits = model(**tokens).logits[tokens["input_ids"] == tokenizer.mask_token_id]
    assert found["tokens"] == tokenizer.convert_ids_to_tokens(logits.argmax(dim=-1))
    # What is cut off keeps its masks, and takes none of the other's.
    long = {"text": "w1 " * 20 + "[MASK]", "more": "[MASK]"}
    with pytest.warns(UserWarning, match="Row 0 has masks beyond what the model takes"):
        (found,) = trainer.predict([long], columns=["text", "more"])
    assert found["filled"] == [long["text"], found["tokens"][0]]


def test_what_is_kept_of_a_table_stands_there_as_it_stood(base, program):
    """Numbers were read: 007 became 7, and 1.10 became 1.1."""
    program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")
    Path("new.csv").write_text("text,id,label,given_label\nw1,007,1.10,a\nw2,,3,b\n")
    call = ("predict", "--model", "out", "--data", "new.csv", "--output", "out.csv", "--keep")
    status, _, err = program(*call, "[id, label]")
    assert status == 0, err
    with open("out.csv", newline="") as file:
        found = [(row["id"], row["given_label"]) for row in csv.DictReader(file)]
    assert found == [("007", "1.10"), ("", "3")]
    told = program(*call, "[label, given_label]")[2]
    assert "--keep: 'label' would be called given_label, as another column is" in told


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_any_type_can_be_kept(streaming, base, program):
    """Once types were guessed from the first row, whatever it lacked, and JSON had no times."""
    program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")
    day = datetime.datetime(2026, 11, 26, 12)
    given = {
        "text": ["w1", "w2 w3"],
        "note": [None, "x"],
        "tags": [[], ["a", "b"]],
        "when": [None, day],
        "number": [None, 3],
        "label": [None, 1],
    }
    datasets.Dataset.from_dict(given).to_parquet("new.parquet")
    data = f"{{path: new.parquet, streaming: {streaming}}}"
    words = ["predict", "--model", "out", "--data", data, "--keep"]
    words += ["[note, tags, when, number, label]", "--output"]
    for name in ("out.parquet", "out.jsonl", "out.csv"):
        status, _, err = program(*words, name)
        assert status == 0, err
    kept = ["note", "tags", "when", "number", "given_label"]
    table = pq.read_table("out.parquet")
    assert table.column_names == [*kept, "label", "score"]
    expected = [given[name.removeprefix("given_")] for name in kept]
    assert [table[name].to_pylist() for name in kept] == expected
    last = json.loads(Path("out.jsonl").read_text().splitlines()[1])
    assert [last[name] for name in kept] == ["x", ["a", "b"], "2026-11-26 12:00:00", 3, 1]
    last = Path("out.csv").read_text().splitlines()[2]
    assert last.startswith('x,"[""a"", ""b""]",2026-11-26 12:00:00,3,1,')


def test_a_stream_that_knows_no_types_shows_its_first_rows(base, program):
    program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")
    Path("new.jsonl").write_text('{"text": "w1", "note": null}\n{"text": "w2", "note": "x"}\n')
    words = ["predict", "--model", "out", "--data", "{path: new.jsonl, streaming: true}", "--keep"]
    assert program(*words, "note", "--output", "out.parquet")[0] == 0
    assert pq.read_table("out.parquet")["note"].to_pylist() == [None, "x"]
    told = program(*words, "[nope]")[2]
    assert "--keep=['nope'] is not in the data, which has ['text', 'note']." in told


def test_a_stream_gives_the_same_predictions_and_is_not_copied(base, program, datasets_cache):
    program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")
    words = ["predict", "--model", "out", "--keep", "[text]", "--data"]
    before = set(datasets_cache.rglob("*"))
    streamed = program(*words, "{path: val.jsonl, streaming: true}")[1]
    assert set(datasets_cache.rglob("*")) == before
    assert streamed == program(*words, "val.jsonl")[1]
    assert len(streamed.splitlines()) == 24
    half = program(*words, "{path: val.jsonl, split: 'train[50%:]'}")[1]
    texts = [json.loads(line)["text"] for line in half.splitlines()]
    assert texts == [row["text"] for row in rows("text-classification")[12:]]


def test_what_cannot_be_predicted_is_said(base, program):
    base("language-modeling")
    Path("bad.jsonl").write_text('{"text": "w1"}\n{"text": null}\n')
    Path("other.jsonl").write_text('{"txt": "w1"}\n')
    words = ["predict", "--model", "base", "--data"]
    assert "Row 1 of the new data has no text in 'text'" in program(*words, "bad.jsonl")[2]
    assert "Column 'text' is not in the new data" in program(*words, "other.jsonl")[2]
    assert "--output=x.xml must end in" in program(*words, "bad.jsonl", "--output", "x.xml")[2]
    assert not Path("x.jsonl").exists()
    assert program(*words, "bad.jsonl", "--output", "x.jsonl")[0] == 2
    assert not list(Path().glob("x.jsonl*"))
    assert "--model and --data must be given" in program("predict")[2]


@pytest.mark.parametrize("data", ["new.csv", "n*.csv", ".", "link.csv", "{path: new.csv}"])
@pytest.mark.parametrize("output", ["new.csv", "./link.csv"])
def test_predictions_do_not_replace_the_rows(data, output, program):
    """Once the texts were gone; nothing is loaded before this is said."""
    Path("new.csv").write_text("text\nw1\n")
    Path("link.csv").symlink_to("new.csv")
    status, _, err = program("predict", "--model", "no", "--data", data, "--output", output)
    assert (status, Path("new.csv").read_text()) == (2, "text\nw1\n")
    assert "would replace the rows of --data" in err


def test_a_link_for_predictions_stays_one(base, program):
    base()
    Path("there").mkdir()
    Path("out.jsonl").symlink_to("there/real.jsonl")
    words = ["--model", "base", "--data", "val.jsonl", "--output", "out.jsonl"]
    assert program("predict", *words)[0] == 0
    assert Path("out.jsonl").is_symlink()
    lines = Path("there/real.jsonl").read_text().splitlines()
    assert len(lines) == len(rows("text-classification"))
    assert [path.name for path in Path("there").iterdir()] == ["real.jsonl"]


def test_an_empty_output_is_refused(program):
    words = ["--model", "no", "--data", "no.csv", "--output", ""]
    assert "--output= must end in one of: .jsonl" in program("predict", *words)[2]


def test_numbers_in_place_of_texts_are_told_as_such(base, program):
    """Once the row was said to have no text."""
    base()
    Path("new.jsonl").write_text('{"text": 7}\n{"text": 8}\n')
    told = "Column 'text' of the new data holds int, not text: row 0 is 7."
    assert told in program("predict", "--model", "base", "--data", "new.jsonl")[2]
    # Of a csv all is text, also beside columns that are kept, where 007 once was.
    Path("new.csv").write_text("text,id\n007,1\n7,2\n")
    words = ("predict", "--model", "base", "--data", "new.csv")
    alone = [json.loads(line) for line in program(*words)[1].splitlines()]
    beside = [json.loads(line) for line in program(*words, "--keep", "id")[1].splitlines()]
    assert beside == [{"id": f"{n}", **each} for n, each in enumerate(alone, 1)]
