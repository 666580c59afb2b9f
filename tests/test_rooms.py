"""`autohdr scenes`: more rendered rooms, killed and gone on with; none of them among the bundled ones."""
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from autohdr.cli import main
from autohdr.data import scenes
from autohdr.data.pairs import scan_pairs
from autohdr.data.samples import sample_pairs


def test_without_mitsuba_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mitsuba", None)  # as if it were not there
    with pytest.raises(SystemExit) as stopped:
        main(["scenes", "3", "--out", str(tmp_path / "rooms")])
    assert stopped.value.code == 1 and "pip install 'autohdr[scenes]'" in capsys.readouterr().err
    assert not (tmp_path / "rooms").exists()


def test_rooms_are_rendered_killed_and_gone_on_with(tmp_path):
    if not scenes.has_mitsuba():
        assert not os.environ.get("CI"), "CI renders: install the extra 'scenes'"
        pytest.skip("the extra 'scenes' (Mitsuba) is not installed")
    command = [sys.executable, "-u", "-c", "from autohdr.cli import main; main()"]
    ask = lambda n, out: [*command, "scenes", str(n), "--out", str(tmp_path / out), "--long-side", "64", "--spp", "2"]
    run = subprocess.Popen(ask(3, "rooms"), stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "; 1 of 3" in line:
            break
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
    kept = pd.read_csv(tmp_path / "rooms/pairs.csv").name.tolist()
    done = subprocess.run(ask(3, "rooms"), check=True, capture_output=True, text=True)
    assert 1 <= len(kept) < 3 and not any(f"{name} " in done.stdout for name in kept), "finished pairs are kept"
    assert "; 3 of 3, 0 s to go" in done.stdout and "3 pairs of" in done.stdout
    pairs, problems = scan_pairs(tmp_path / "rooms/pairs.csv")
    assert len(pairs) == 3 and not len(problems) and set(pairs.width) | set(pairs.height) <= {64, 42}
    assert not set(pairs.seed) & set(sample_pairs(faults=True).seed)
    assert (pairs.window != "").all()
