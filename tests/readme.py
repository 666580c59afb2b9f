"""README.md out of nbs/index.ipynb: `python -m tests.readme [model.safetensors of a demo run, to draw its first picture anew]`."""
import sys
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


def tour(checkpoint, photo="house06_0", width=1200) -> Path:
    """The README's first picture: a sample room that the demo does not train on, before, edited and as it should be."""
    import cv2
    import numpy as np

    from autohdr.data.pairs import read_pair
    from autohdr.data.samples import sample_pairs
    from autohdr.inference.predict import predict
    from autohdr.models.zoo import load_model
    from autohdr.photo import write_photo

    row = sample_pairs().set_index("name").loc[photo]
    assert row.split == "test"
    before, after, _ = read_pair(row)
    strip = np.concatenate([before, predict(load_model(checkpoint), before), after], 1)
    strip = cv2.resize(strip, (width, round(strip.shape[0] * width / strip.shape[1])), interpolation=cv2.INTER_AREA)
    return write_photo(ROOT / "nbs/images/tour.jpg", strip, quality=88)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(tour(sys.argv[1]))
    print(write_text(ROOT / "README.md", readme()))
