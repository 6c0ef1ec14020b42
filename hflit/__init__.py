"""hflit: fine-tune any Hugging Face transformer in one call, on Lightning."""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hflit.pipeline import HFTrainer

__version__ = "0.1.0"
__all__ = ["HFTrainer", "__version__", "verify_resume"]

_HOMES = {"HFTrainer": "hflit.pipeline", "verify_resume": "hflit.verify"}

# On some CPUs bitsandbytes asks for a package that speeds up a layout of weights nobody learns in.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# torchmetrics imports matplotlib, which then leaves folders in the home of whoever never used it.
# Its list of fonts goes among the caches of Hugging Face, unless its own folder is there already.
_HOME = Path(os.path.expanduser("~"))  # Path.home() wants every user to have one
if not (_HOME / ".config" / "matplotlib").is_dir():
    _CACHE = Path(os.environ.get("HF_HOME", _HOME / ".cache" / "huggingface"))
    os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "hflit" / "matplotlib"))


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only who uses a name pays for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
