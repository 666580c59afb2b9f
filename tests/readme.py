"""README.md out of nbs/index.ipynb: `python -m tests.readme`."""
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from autohdr.core import write_text

ROOT = Path(__file__).parent.parent


def readme() -> str:
    """The index notebook as Markdown, cells marked `#| hide` left out; links are relative to the top of the tree."""
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("#| hide")]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    lines = [line for line in text.replace("](images/", "](nbs/images/").splitlines() if not line.startswith("#| ")]
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    print(write_text(ROOT / "README.md", readme()))
