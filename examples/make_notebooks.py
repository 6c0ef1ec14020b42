"""Runs the examples and keeps them as notebooks with their output: `make notebooks`.

The scripts are the source: edit those, never a notebook.
"""

import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
SCRIPTS = [*sorted(HERE.glob("train_*.py")), HERE / "answer_questions.py"]


def main(names: list[str]) -> None:
    """Run all examples, or those named."""
    for script in [path for path in SCRIPTS if not names or path.stem in names]:
        notebook = jupytext.read(script)
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"  # not drawn anew each time
        NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            if cell.cell_type == "code":  # without what libraries say about themselves
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        jupytext.write(notebook, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
