"""A SLURM cluster of one node on loopback, for as long as a block lasts; see slurm_cluster.sh."""
import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
PROGRAMS = ["slurmctld", "slurmd", "munged", "squeue", "timeout", "slurmdbd", "mariadbd"]
PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server"


def needs_slurm():
    """Skip where no cluster can be started; in CI that is a failure."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [p for p in PROGRAMS if not shutil.which(p, path=path)]
    if os.getuid() == 0 and not missing:
        return
    why = f"only root can start SLURM's daemons; with it, apt install {PACKAGES}" if os.getuid() else f"{', '.join(missing)} missing: apt install {PACKAGES}"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def free_ports() -> int:
    """The first of four ports in a row that nobody has; below those that the system hands out."""
    for start in random.Random(os.getpid()).sample(range(11000, 31000, 4), 1000):
        with contextlib.ExitStack() as held:
            try:
                for port in range(start, start + 4):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return start
    raise RuntimeError("no four free ports in a row")


@contextlib.contextmanager
def cluster(accounting=False, **settings):
    """Start a cluster and point this process's SLURM commands to it; yields its folder."""
    folder, path = Path(tempfile.mkdtemp(prefix="slurm-")), os.environ["PATH"]
    env = {**os.environ, "PATH": path + ":/usr/sbin:/sbin", **{k: str(v) for k, v in settings.items()}}
    command = ["bash", str(SCRIPT), "start", str(folder), str(free_ports()), *(["accounting"] if accounting else [])]
    quiet = dict(stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    subprocess.Popen(["bash", str(SCRIPT), "guard", str(folder), str(os.getpid())], env=env, stderr=subprocess.DEVNULL, start_new_session=True, **quiet)
    try:
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=200, **quiet)
        assert done.returncode == 0, done.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], env=env, stderr=subprocess.DEVNULL, timeout=120, **quiet)
        shutil.rmtree(folder, ignore_errors=True)
