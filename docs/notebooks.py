"""Hook of MkDocs: the executed notebooks of examples/ become pages, made anew at each build."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook."""
    for path in sorted(Path(config.config_file_path).parent.glob("examples/*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(path))
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files
