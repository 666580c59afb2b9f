"""The claim that matters, on real photographs: with ten pairs the default model already beats any one curve, on photos it never saw."""
import json
from pathlib import Path

import pytest

from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"


@pytest.mark.skipif(not PAIRS.is_dir(), reason="needs the real pairs of ../shared/data")
def test_cross_validated_hdrnet_beats_the_fitted_curves(tmp_path):
    run_dir = run(make_spec("hdrnet_crossval", [f"pairs={PAIRS}", "final=false"]), tmp_path, echo=False)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["photos"] == "out of fold" and metrics["ours"]["n"] == 10
    assert metrics["ours"]["l1"] < min(b["l1"] for b in metrics["baselines"].values()), metrics
