"""What the tests of several processes have them do: a module that the processes can import."""
import contextlib
import os
import time
from pathlib import Path
from unittest.mock import patch


def slopes(groups, lr, weight_decay):
    """Plain gradient descent: what Adam does with a gradient that is all but zero depends on its last digit."""
    import torch

    return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)


def cut(plan, state):
    """Take the photos of a batch one at a time, as where memory is short."""
    state.split = 1


def descend(cases, pairs):
    """Train each (recipe, folder) by plain gradient descent."""
    import torch

    import autohdr.training.loop as loop

    with patch.object(torch.optim, "AdamW", slopes):
        for recipe, run_dir in cases:
            with patch.object(loop, "follow_plan", cut) if run_dir.name == "cut" else contextlib.nullcontext():
                loop.train(recipe, pairs, run_dir)


def asked(number, at):
    """A question that only process `number` says yes to, when it is asked for the time `at`, and then at every third."""
    from autohdr.training.processes import rank

    calls = [0]

    def stop_requested():
        calls[0] += 1
        return rank() == number and calls[0] >= at and (calls[0] - at) % 3 == 0

    return stop_requested


def everything(cases, adam, halted, pairs):
    """All of this in one start of processes, which takes longer than the rest; ends by being stopped."""
    import autohdr.training.loop as loop
    from autohdr.core import StopRequested

    descend(cases, pairs)
    for recipe, run_dir in adam:
        loop.train(recipe, pairs, run_dir)
    with patch.object(loop, "stop_requested", asked(1, 3)):
        try:
            loop.train(*halted)
        except StopRequested as e:
            print(e)
        loop.train(*halted)


def explode(recipe, pairs, run_dir):
    """Train with a loss that one process finds to be no number."""
    import autohdr.training.loop as loop
    from autohdr.training.processes import rank

    real, calls = loop.training_terms, [0]

    def terms(*args):
        calls[0] += 1
        return {k: v * (float("nan") if rank() == 1 and calls[0] == 3 else 1) for k, v in real(*args).items()}

    with patch.object(loop, "training_terms", terms):
        loop.train(recipe, pairs, run_dir)


def linger(folder):
    """Say who is there, and stay."""
    from autohdr.training.processes import rank

    (Path(folder) / f"pid-{rank()}").write_text(str(os.getpid()))
    print("here", flush=True)
    time.sleep(600)

