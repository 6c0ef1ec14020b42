"""Hook of MkDocs: what the site takes from elsewhere, made anew at each build.

The executed notebooks of examples/ become pages, and the pictures of benchmarks/results/ files.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook, and each picture."""
    root = Path(config.config_file_path).parent
    for path in sorted(root.glob("examples/*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(path))
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    for path in sorted(root.glob("benchmarks/results/*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
