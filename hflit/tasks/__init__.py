"""The six tasks: one LightningModule a file, all of them in one table."""

from hflit.tasks.language_generation import LanguageGeneration
from hflit.tasks.language_modeling import LanguageModeling
from hflit.tasks.module import TaskModule
from hflit.tasks.text_classification import TextClassification

TASKS: dict[str, type[TaskModule]] = {
    "text-classification": TextClassification,
    "language-generation": LanguageGeneration,
    "language-modeling": LanguageModeling,
}

__all__ = ["TASKS", "TaskModule"]
