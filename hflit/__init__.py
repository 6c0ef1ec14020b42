"""hflit: fine-tune any Hugging Face transformer in one call, on Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["HFTrainer", "__version__"]

_HOMES = {"HFTrainer": "hflit.pipeline"}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only who uses a name pays for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
