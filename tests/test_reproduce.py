"""A run done again gives the same numbers bit for bit, and the command says so honestly where it does not."""
import json
import os
import subprocess

import pytest

from autohdr.runs.execute import run
from autohdr.runs.spec import make_spec
from autohdr.runs.status import read_status
from tests.toys import COMMAND


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny training, run by the command so that its environment is that of a user."""
    root = tmp_path_factory.mktemp("runs")
    subprocess.run([*COMMAND, "run", "hdrnet_512", "--smoke", "--name", "one", "--root", str(root)], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return root / "hdrnet_512/one"


def again(run_dir, *args):
    return subprocess.run([*COMMAND, "reproduce", str(run_dir), *args], capture_output=True, text=True)


def test_what_a_run_records(trained):
    status = read_status(trained)
    assert set(status["inputs"]) == {"pairs"} and status["environment"]["threads"] == "1" and status["cost"]["peak_memory"] > 100e6 and status["cost"]["cpu_seconds"] > 1
    assert "torch==" in (trained / "packages.txt").read_text() and status["attempts"] == [] and status["heartbeat"]


def test_the_same_numbers_and_not_the_same(trained):
    metrics = trained / "metrics.json"
    untouched = metrics.read_text()
    told = json.loads(untouched)
    told["ours"]["l1"] += 1e-12
    metrics.write_text(json.dumps(told))
    done = again(trained, "--tolerance", "0")
    assert done.returncode == 1 and "1 of" in done.stderr and "ours.l1" in done.stdout and "Traceback" not in done.stderr
    found = json.loads((trained.parent / "_reproduced/one/reproduction.json").read_text())
    assert [n["number"] for n in found["numbers"] if not n["same"]] == ["ours.l1"], "every other number is the same, bit for bit"
    metrics.write_text(untouched)
    assert (trained.parent / "_reproduced/one/metrics.json").read_text() == untouched


def test_other_data_is_refused(tmp_path, trained):
    import shutil

    from autohdr.data.samples import sample_pairs

    for row in sample_pairs().head(6).to_dict("records"):
        for side in ("before", "after"):
            (tmp_path / f"pairs/{side}").mkdir(parents=True, exist_ok=True)
            shutil.copy(row[side], tmp_path / f"pairs/{side}/{row['name'].replace('/', '_')}.jpg")
    spec = make_spec("hdrnet_512", [f"pairs={tmp_path / 'pairs'}"], "two", smoke=True)
    done = run(spec, tmp_path, echo=False)
    photo = next((tmp_path / "pairs/after").iterdir())
    photo.write_bytes(photo.read_bytes() + b"\0")
    told = again(done)
    assert told.returncode == 1 and str(tmp_path / "pairs") in told.stderr and "not those that the run has read" in told.stderr and not (tmp_path / "hdrnet_512/_reproduced/two").exists()
    assert again(tmp_path).returncode == 1
