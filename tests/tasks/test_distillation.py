"""Learning from a teacher: distances by arithmetic, txtai's formula, all six tasks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from txtai.pipeline import HFTrainer as Txtai

from hflit import HFTrainer
from hflit.tasks import TASKS
from hflit.tasks.distillation import bernoulli_distance, kl_distance
from tests.tasks.tiny import TEXTS, make, rows


def train(task, base, **arguments):
    options = {"stride": 8} if task == "question-answering" else {}
    trainer = HFTrainer()
    model, _ = trainer(
        base, arguments.pop("rows", None) or rows(task), task=task, maxlength=32, **options,
        **{"logging_steps": 1, "max_steps": 4, "learning_rate": 1e-3, **arguments},
    )  # fmt: skip
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], model


def test_32_single_label_loss_is_txtais():
    """On one update without accumulation both take the same blend of the same two losses."""
    settings = {
        "distillation": (2.0, 0.7), "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    student, teacher = make("text-classification", 0), make("text-classification", 1)
    losses, model = train(
        "text-classification", copy.deepcopy(student), teacher=teacher, **settings
    )
    theirs, _ = Txtai()(
        copy.deepcopy(student), rows("text-classification"), maxlength=32,
        teacher=copy.deepcopy(teacher), output_dir="", **settings,
    )  # fmt: skip
    for (name, weight), expected in zip(
        model.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-5, msg=name)
    assert len(losses) == 3


@pytest.mark.parametrize("task", TASKS)
def test_32_every_task_learns_from_its_teacher(task):
    """In txtai only single-label classification does; several labels train the wrong loss."""
    teacher = make(task, 1)
    before = copy.deepcopy(teacher[0].state_dict())
    with_teacher, _ = train(task, make(task, 0), teacher=teacher, distillation=(1.5, 0.5))
    alone, _ = train(task, make(task, 0))
    ignored, _ = train(task, make(task, 0), teacher=teacher, distillation=(1.5, 0.0))
    assert torch.isfinite(torch.tensor(with_teacher)).all()
    assert with_teacher != alone
    torch.testing.assert_close(ignored, alone, rtol=1e-6, atol=0)  # a share of 0 is no teacher
    for name, weight in teacher[0].state_dict().items():
        assert torch.equal(weight, before[name]), name  # the teacher learns nothing


@pytest.mark.parametrize("task", TASKS)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(task):
    losses, _ = train(
        task, make(task, 0), teacher=make(task, 0), distillation=(2.0, 1.0), max_steps=1
    )
    assert losses[0] == pytest.approx(0.0, abs=1e-5)


def windows(kinds):
    """Rows of the three kinds of labels, for a model of as many outputs."""
    labels = {
        "single_label_classification": lambda i: i % 3,
        "multi_label_classification": lambda i: [i % 2, 1, 0],
        "regression": lambda i: i + 0.5,
    }[kinds]
    return [{"text": text, "label": labels(i)} for i, text in enumerate(TEXTS[:8])]


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_accumulation_is_exact(problem):
    labels = 1 if problem == "regression" else 3

    def loss(batch, accumulation):
        return train(
            "text-classification", make("text-classification", 0, labels, problem),
            teacher=make("text-classification", 1, labels, problem), rows=windows(problem),
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=1, distillation=(2.0, 0.5), train_sampling_strategy="sequential",
        )[0][0]  # fmt: skip

    large = loss(8, 1)
    assert loss(2, 4) == pytest.approx(large, rel=1e-6)
    # The same from the definition, with plain torch.
    (student, tokenizer), (teacher, _) = (
        make("text-classification", seed, labels, problem) for seed in (0, 1)
    )
    data = windows(problem)
    inputs = tokenizer([row["text"] for row in data], return_tensors="pt", padding=True)
    target = torch.tensor([row["label"] for row in data])
    with torch.no_grad():
        ours, taught = student.eval()(**inputs).logits, teacher.eval()(**inputs).logits
    if problem == "regression":
        hard, soft = F.mse_loss(ours.squeeze(-1), target), F.mse_loss(ours, taught)
    elif problem == "multi_label_classification":
        hard = F.binary_cross_entropy_with_logits(ours, target.float())
        p, q = (taught / 2).sigmoid(), (ours / 2).sigmoid()
        soft = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    else:
        hard = F.cross_entropy(ours, target)
        p, q = (taught / 2).softmax(-1), (ours / 2).softmax(-1)
        soft = 4 * (p * (p / q).log()).sum(-1).mean()
    assert large == pytest.approx(float(0.5 * hard + 0.5 * soft), rel=1e-5)


def test_distances_by_arithmetic():
    # Teacher 3:1, student 1:1, so 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081.
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    assert float(kl_distance(student, teacher, 1.0)) == pytest.approx(0.1308120, abs=1e-6)
    # Yes with 3/4 against 1/2: the same two outcomes.
    yes = torch.tensor([3.0]).log()
    assert float(bernoulli_distance(torch.zeros(1), yes, 1.0)) == pytest.approx(0.1308120, abs=1e-6)


def test_teachers_that_do_not_fit_are_refused():
    student = make("text-classification", 0)
    model, tokenizer = make("text-classification", 1)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="tokenizer has 106 tokens"):
        train("text-classification", student, teacher=(model, tokenizer))
    model.resize_token_embeddings(106)
    with pytest.raises(ValueError, match="another vocabulary"):
        train("text-classification", student, teacher=(model, tokenizer))
    with pytest.raises(ValueError, match="knows the classes"):
        train("text-classification", student, teacher=make("text-classification", 1, labels=4))
    with pytest.raises(ValueError, match="has no teacher|it has no teacher"):
        train("text-classification", student, teacher=student, parity=True)
    with pytest.raises(ValueError, match="temperature above 0"):
        train("text-classification", student, teacher=student, distillation=(0.0, 0.5))


def test_a_teacher_that_would_learn_itself_is_refused():
    model, tokenizer = make("text-classification", 0)
    call = {"teacher": (model, tokenizer), "max_steps": 1}
    with pytest.raises(ValueError, match="The teacher has the weights of base, which learn"):
        HFTrainer()((model, tokenizer), rows("text-classification"), **call)
    HFTrainer()((model, tokenizer), rows("text-classification"), lora=True, **call)  # base does not


def test_a_teacher_without_a_head_is_refused(tmp_path):
    model, tokenizer = make("language-modeling", 1)
    model.base_model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="without a head for this task"):
        train("language-modeling", make("language-modeling", 0), teacher=str(tmp_path / "body"))
