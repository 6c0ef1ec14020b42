"""The six tasks: one LightningModule a file, all of them in one table."""

from hflit.tasks.module import TaskModule
from hflit.tasks.text_classification import TextClassification

TASKS: dict[str, type[TaskModule]] = {
    "text-classification": TextClassification,
}

__all__ = ["TASKS", "TaskModule", "TextClassification"]
