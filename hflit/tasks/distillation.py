"""Distances between what a student and its teacher say, summed over the items of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much it counts.

    The loss is `(1 - alpha) * loss on the labels + alpha * distance to the teacher` (Hinton et al.
    2015, "Distilling the Knowledge in a Neural Network").

    Attributes:
        teacher: A model of the same task, vocabulary and classes; it does not learn.
        temperature: Divides the logits of both; above 1 it softens the distributions.
        alpha: Share of the teacher, from 0 (labels only) to 1 (teacher only).
    """

    teacher: Any
    temperature: float = 1.0
    alpha: float = 0.5


def kl_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, in nats, summed over items.

    Args:
        student: Logits, `(items, classes)`.
        teacher: Logits, `(items, classes)`.
        temperature: Divides the logits. The sum is multiplied by its square, since the gradient
            shrinks by as much.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> kl_distance(logits, logits, temperature=2.0)
        tensor(0.)
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2


def bernoulli_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of independent yes-or-no answers, in nats, summed over all of them.

    Args:
        student: Logits of any shape.
        teacher: Logits of the same shape.
        temperature: As in `kl_distance`.
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    probability = teacher.sigmoid()
    yes = probability * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (1 - probability) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).sum() * temperature**2
