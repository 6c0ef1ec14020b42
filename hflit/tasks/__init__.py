"""The six tasks: one LightningModule a file, all of them in one table."""

from hflit.tasks.language_generation import LanguageGeneration
from hflit.tasks.language_modeling import LanguageModeling
from hflit.tasks.module import TaskModule
from hflit.tasks.question_answering import QuestionAnswering
from hflit.tasks.sequence_sequence import SequenceSequence
from hflit.tasks.text_classification import TextClassification
from hflit.tasks.token_detection import TokenDetection

TASKS: dict[str, type[TaskModule]] = {
    "text-classification": TextClassification,
    "question-answering": QuestionAnswering,
    "sequence-sequence": SequenceSequence,
    "language-generation": LanguageGeneration,
    "language-modeling": LanguageModeling,
    "token-detection": TokenDetection,
}

__all__ = ["TASKS", "TaskModule"]
