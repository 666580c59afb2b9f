"""The report of a study: its numbers are those of the photos, it tells what is missing, killed or different, and ranks nothing that other photos judged."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from autohdr.core import AutohdrError, write_csv, write_json, write_text
from autohdr.inference.evaluate import prediction_file
from autohdr.photo import write_photo
from autohdr.runs.compare import account, blocks, cost_table, differences, headline_table, publish, read_study, table, what_differs
from autohdr.runs.execute import run
from autohdr.runs.spec import inputs, make_spec
from autohdr.runs.status import now, write_status
from autohdr.runs.study import load_study, write_study
from autohdr.runs.study import plan as plan_study
from autohdr.runs.tables import STUDY, study_tables
from tests.test_report import browser, open_report  # noqa: F401

NOTEBOOK = Path(__file__).parent.parent / "nbs/experiments/compare.ipynb"
PHOTOS = [f"house{h}/{room}" for h in range(3) for room in ("kitchen", "hall")]


def make_run(folder, name, level, fold=0, state="complete", photos=PHOTOS, size=64, seed=0, arms=None, baselines=True, axes=None, parameters=None, status=None, planned=None, label=None):
    """A run folder with scores drawn around a level, and its line in the plan."""
    rng = np.random.default_rng([*name.encode()])
    values = dict(model="hdrnet", size=size, lr=1e-3, epochs=4, batch_size=4, accumulate=1, loss="l1", init="", model_config={"width": 8}, seed=seed, fold=fold, folds=2) | (parameters or {})
    held = [p for i, p in enumerate(photos) if fold < 0 or i % 2 == fold]
    tables = {}
    for arm, mean in (arms or {"": level}).items():
        l1 = mean + 0.3 * mean * rng.random(len(held))
        tables[arm] = pd.DataFrame(dict(name=held, property="x", height=size * 2 // 3, width=size, l1=l1, psnr=-20 * np.log10(l1) - 2, ssim=0.9 - l1, ciede2000=100 * l1, mse=10 ** (-(-20 * np.log10(l1) - 2) / 10)))
    scores = pd.concat([t.assign(arm=a, fold=fold, seed=seed) for a, t in tables.items()]) if arms else tables[""]
    write_csv(folder / name / "photos.csv", scores)
    place = np.arange(len(held)) * 0.01
    still = scores[scores.arm == next(iter(arms))] if arms else scores
    if baselines:
        write_csv(folder / name / "baselines.csv", pd.concat([still.assign(model=m, l1=v + place, psnr=-20 * np.log10(v + place) - 2) for m, v in (("identity", 0.26), ("gamma", 0.095), ("polynomial", 0.09))]))
    write_csv(folder / name / "history.csv", pd.DataFrame(dict(epoch=[1, 2, 3, 4], loss=level * np.array([4, 3, 2, 1.5]), val_l1=level * np.array([3, 2, 1.1, 1.2]), seconds=[2.0, 4, 6, 8])))
    write_json(folder / name / "metrics.json", dict(photos="test", size=size, parameters=4321, ours=dict(l1=float(scores.l1.mean()))))
    write_text(folder / name / "params.yaml", yaml.safe_dump(dict(notebook="train", parameters=values | dict(run_dir=str(folder / name)))))
    environment = dict(python="3.11.7", cpu="a CPU", gpu="", packages=dict(torch="2.13.0"))
    write_status(folder / name, dict(state=state, reason="", run=name, study="toy", started=now(), ended=now(), seconds=12.0, attempt=1, attempts=[], host="node1", pid=1, axes=axes or {}, heartbeat=now(), git=dict(commit="a" * 40, dirty=False),
                                     environment=environment, smoke=False, inputs=dict(pairs="0123"), cost=dict(seconds=12.0, cpu_seconds=11.0, peak_memory=2**30, gpu_memory=None, energy_wh=0.5, energy_of="CPU package")) | (status or {}))
    write_text(folder / name / "report.html", f"<p>{name}")
    return dict(run=name, base=name.split("-")[0], label=label or name.split("-")[0], part="", axes=axes if axes is not None else dict(fold=fold), needs=[], spec=dict(recipe=name.split("-")[0], parameters=planned or values))


def plan(folder, runs, **more):
    write_json(folder / "study.json", dict(name="toy", about="A toy", tables=[], tables_of={}, runs=runs) | more)
    return folder


def in_process(**parameters):
    """What the run notebook shows, without a kernel of its own."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell, shown = InteractiveShell.instance(), []
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            with capture_output() as out:
                done = shell.run_cell(cell.source)
                done.raise_error()
                if "parameters" in cell.metadata.get("tags", []):
                    shell.push(parameters)
            shown += [o.data.get("text/html", "") for o in out.outputs] + [getattr(done.result, "data", None)]
    return "".join(text for text in shown if isinstance(text, str))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three configurations with two folds, all complete."""
    folder = tmp_path_factory.mktemp("whole")
    return plan(folder, [make_run(folder, f"{name}-fold_{k}", level, k) for name, level in (("good", 0.05), ("other", 0.052), ("bad", 0.12)) for k in (0, 1)])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """More than thirty runs, and everything that can go wrong."""
    folder = tmp_path_factory.mktemp("big")
    rng, runs = np.random.default_rng(0), []
    for i, model in enumerate(("hdrnet", "restormer", "darkir", "nafnet", "retinexformer")):
        for j, lr in enumerate((1e-4, 1e-3, 1e-2)):
            for fold in (0, 1):
                name = f"{model}_384_with_a_rather_long_name-lr_{lr:g}-fold_{fold}"
                changed = dict(model=model, lr=lr, loss="l1" if j else "study_balanced")
                runs.append(make_run(folder, name, 0.05 + 0.008 * i + 0.004 * j, fold, parameters=changed, axes=dict(lr=lr, fold=fold), label=f"{model.capitalize()} 384 with a rather long name, lr {lr:g}"))
                for photo in PHOTOS[fold::2]:
                    write_photo(prediction_file(folder / name / "predictions", photo), rng.random((42, 64, 3), dtype=np.float32))
    runs += [make_run(folder, f"large-fold_{k}", 0.045, k, size=128) for k in (0, 1)]
    runs.append(make_run(folder, "ways", 0.05, -1, arms={"none": 0.05, "gamma before": 0.1, "post only": 0.05, "both": 0.1}, baselines=False, axes={}))
    for state, reason in (("failed", "Cell 5 of 9 raised TrainingDiverged: the loss is not finite"), ("died", "The kernel died (SIGKILL: the machine ran out of memory)"), ("terminated", "Stopped by SIGTERM"), ("paused", "Stopped on request"), ("running", "")):
        runs.append(make_run(folder, f"{state}-fold_0", 0.01, state=state, status=dict(reason=reason, host="elsewhere")))
    runs.append(make_run(folder, "changed-fold_0", 0.01, planned=dict(lr=0.5)))
    runs.append(dict(run="never-fold_0", base="never", label="never", part="", axes=dict(fold=0), needs=[], spec=dict(recipe="never", parameters=dict(model="hdrnet", size=64))))
    make_run(folder, "stranger", 0.01)
    file = folder / runs[0]["run"] / "status.json"
    killed = [dict(state="died", reason="killed by SIGKILL", seconds=3), dict(state="paused", reason="stopped on request after saving", seconds=4)]
    write_json(file, json.loads(file.read_text()) | dict(attempt=3, attempts=killed, host="node2", git=dict(commit="b" * 40, dirty=True)))
    (folder / "_replaced" / "old-20260101").mkdir(parents=True)
    return plan(folder, runs)


@pytest.fixture(scope="module")
def report(big):
    """The notebook, executed where a study's report lies."""
    done = run(make_spec("compare", name="compare", values=dict(study=str(big)), study="toy"), folder=big / "compare", overwrite=True, echo=False)
    publish(big)
    return done


def test_numbers_are_those_of_the_photos(whole):
    summary = table(read_study(whole)).set_index("configuration")
    for name in ("good", "other", "bad"):
        photos = pd.concat([pd.read_csv(whole / f"{name}-fold_{k}" / "photos.csv").assign(fold=k) for k in (0, 1)])
        floor = pd.concat([pd.read_csv(whole / f"{name}-fold_{k}" / "baselines.csv").assign(fold=k) for k in (0, 1)]).query("model == 'gamma'")
        row = summary.loc[name]
        assert row.l1 == pytest.approx(photos.l1.mean(), abs=1e-12) and row.psnr == pytest.approx(photos.psnr.mean(), abs=1e-12) and row.photos == 6 == photos.name.nunique()
        assert row.l1_sd == pytest.approx(photos.groupby("fold").l1.mean().std(), abs=1e-12) and row.folds == 2 and row.seeds == 1
        assert row.psnr_of_mean_mse == pytest.approx(-10 * np.log10(photos.mse.mean())) and row.baselines["gamma"]["l1"] == pytest.approx(floor.l1.mean())
        assert row.beats_gamma.startswith("yes") == (photos.l1.mean() < floor.l1.mean())
    assert summary.loc["bad"].beats_gamma.startswith("no, worse") and summary.block.nunique() == 1 and list(summary.number) == [1, 2, 3] and summary.l1.is_monotonic_increasing


def test_differences_are_paired_by_fold(whole):
    change = differences(read_study(whole), "good").set_index("configuration")
    means = {n: [pd.read_csv(whole / f"{n}-fold_{k}" / "photos.csv").l1.mean() for k in (0, 1)] for n in ("good", "bad")}
    assert change.loc["bad"].l1_mean == pytest.approx(np.subtract(means["bad"], means["good"]).mean()) and change.loc["bad"].l1_folds == 2
    with pytest.raises(AutohdrError, match="Did you mean 'good'"):
        differences(read_study(whole), "god")


def test_seeds_of_a_photo_count_once(tmp_path):
    runs = [make_run(tmp_path, f"a-seed_{s}-fold_{k}", level, k, seed=s, axes=dict(seed=s, fold=k)) for k in (0, 1) for s, level in ((0, 0.05), (1, 0.07)) if (s, k) != (1, 1)]
    row = table(read_study(plan(tmp_path, runs))).iloc[0]
    photos = pd.concat([pd.read_csv(tmp_path / r["run"] / "photos.csv") for r in runs])
    assert row.seeds == 2 and row.photos == 6 and row.runs == 3 and row.l1 == pytest.approx(photos.groupby("name").l1.mean().mean()), "one seed is missing in a fold: its photos weigh no less"


def test_other_photos_are_never_ranked_together(tmp_path):
    runs = [make_run(tmp_path, "a", 0.05, -1), make_run(tmp_path, "bigger", 0.04, -1, size=128), make_run(tmp_path, "fewer", 0.03, -1, photos=PHOTOS[:4]), make_run(tmp_path, "alike", 0.06, -1)]
    renamed = make_run(tmp_path, "edited", 0.02, -1)  # the same names, other pixels: the identity costs something else
    file = tmp_path / "edited/baselines.csv"
    write_csv(file, pd.read_csv(file).assign(l1=lambda t: t.l1 + 0.01))
    results = read_study(plan(tmp_path, [*runs, renamed]))
    assert blocks(results) == [["a", "alike"], ["bigger"], ["fewer"], ["edited"]]
    words = differences(results, "a").set_index("configuration").l1_words
    assert "not comparable: judged by 6 photos at 128 px, the other by 6 photos at 64 px" in words["bigger"] and "4 photos at 64 px" in words["fewer"] and "not by the same ones" in words["edited"]
    assert words["alike"].startswith("+0.0") and differences(results, "a").set_index("configuration").l1_mean.isna().sum() == 3
    shown = headline_table(table(results)).data
    assert "4 groups of photos or sizes" in shown and len(re.findall("class=best>", shown)) == 5, "only a group of two has a best"


def test_a_fold_that_is_missing_is_not_made_up(tmp_path):
    runs = [make_run(tmp_path, f"{n}-fold_{k}", level, k) for n, level in (("a", 0.05), ("b", 0.06)) for k in (0, 1)]
    write_status(tmp_path / "b-fold_1", json.loads((tmp_path / "b-fold_1/status.json").read_text()) | dict(state="died", reason="SIGKILL"))
    results = read_study(plan(tmp_path, runs))
    assert blocks(results) == [["a"], ["b"]] and table(results).set_index("configuration").photos.to_dict() == dict(a=6, b=3)
    assert account(results)[0] == (False, "4 runs planned: 3 complete, 1 died.") and "6 photos at 64 px" in differences(results, "a").l1_words[0] + differences(results, "b").l1_words[0]


def test_a_study_in_progress_has_a_report(tmp_path):
    runs = [make_run(tmp_path, "a", 0.05, -1, state="running", status=dict(host="elsewhere"))]
    shutil.rmtree(tmp_path / "a" / "baselines.csv", ignore_errors=True)
    results = read_study(plan(tmp_path, runs))
    assert not len(table(results)) and "nothing to compare" in headline_table(table(results)).data and len(results.history) == 4
    shown = in_process(study=str(tmp_path), run_dir=str(tmp_path / "compare"))
    assert "1 run planned: 1 running." in shown and "There are no scores" in shown
    assert json.loads((tmp_path / "compare/metrics.json").read_text())["table"] == []


def test_an_ensemble_stands_by_its_own_scores(tmp_path):
    """Its folder also holds the scores of its folds, which are of single models and of other photos."""
    runs = [make_run(tmp_path, f"apart-fold_{k}", 0.05, k) for k in (0, 1)] + [make_run(tmp_path, "three", 0.05, -1, axes={}, parameters=dict(members=["a", "b"]))]
    rows = [dict(name=n, model=m, tta=t, l1=v, psnr=20 - 100 * v, ssim=0.9, ciede2000=5.0, mse=0.01, height=42, width=64) for n in ("new/hall", "new/bath") for t in (False, True) for m, v in (("ensemble", 0.04), ("member 1", 0.05), ("member 2", 0.07))]
    write_csv(tmp_path / "three/ensemble_photos.csv", pd.DataFrame(rows))
    told = dict(l1=0.04, psnr=16.0, single=dict(l1=0.06, psnr=14.0), gain_se=dict(l1=0.001, psnr=0.2), members=["member 1", "member 2"], tta=False, photos=2)
    write_json(tmp_path / "three/metrics.json", dict(ours=dict(l1=0.05, psnr=20.0), folds={0: dict(l1=0.05, psnr=20.0, n=3), 1: dict(l1=0.06, psnr=19.0, n=3)}, ensemble=told, size=64))
    results = read_study(plan(tmp_path, runs))
    summary = table(results).set_index("configuration")
    assert blocks(results) == [["apart"], ["three", "three: mean of its members"]] and summary.loc["three"].l1 == pytest.approx(0.04) and summary.loc["three: mean of its members"].l1 == pytest.approx(0.06)
    assert summary.loc["three"].beats_gamma.startswith("not known") and summary.loc["three"].baselines == {}, "the baselines in its folder are of its folds' photos"
    found = study_tables(results, table(results))["ensemble"][1]
    assert found.configuration.unique().tolist() == ["three"] and found["PSNR, dB"].tolist()[:2] == ["20.00", "19.00"] and found.gain.iloc[-1].startswith("+2.00 ± 0.20 dB, L1 -0.0200 ± 0.0010")
    assert not any("its metrics.json says" in text for _, text in account(results))


def planned_and_done(folder, text):
    """A study as `autohdr study` plans it, its runs' folders filled as if all had been trained."""
    (folder / "toy.yaml").write_text(text)
    study = plan_study(folder / "toy.yaml", folder / "runs")
    write_study(study)
    for task in study.tasks:
        values = task.spec.parameters
        make_run(study.folder, task.name, 0.05, values["fold"], seed=values["seed"], size=values["size"], axes=task.spec.axes)
        (task.folder / "model.safetensors").write_text(task.name)
        write_text(task.folder / "params.yaml", yaml.safe_dump(dict(notebook=str(task.spec.notebook), parameters=values)))
        write_status(task.folder, json.loads((task.folder / "status.json").read_text()) | dict(inputs=inputs(task.spec)))
    return study.folder


def test_what_counts_is_what_a_study_would_not_make_anew(tmp_path, monkeypatch):
    """A base that was made anew or failed, and data that changed, take the runs that used them out of the report; data that is only out of reach does not."""
    monkeypatch.setenv("AUTOHDR_CACHE", str(tmp_path / "cache"))
    for photo in ("before", "after"):
        write_photo(tmp_path / f"data/{photo}.png", np.full((8, 8, 3), 0.5, np.float32))
    folder = planned_and_done(tmp_path, f"recipe: hdrnet_512\nparameters: {{pairs: {tmp_path / 'data'}}}\nruns:\n  first: {{}}\n  second: {{parameters: {{init: 'run:first'}}}}\n")

    def counted():
        results = read_study(folder)
        states = {t.name: t.state for t in load_study(folder, read=True).tasks}
        assert results.runs.set_index("run").state.to_dict() == states, "the report and the plan say the same"
        return sorted(results.scores.run.unique()), " ".join(t for _, t in account(results))

    runs, told = counted()
    assert runs == ["first", "second"] and "could not" not in told and "out of reach" not in told
    (tmp_path / "data").rename(tmp_path / "away")
    runs, told = counted()
    assert runs == ["first", "second"] and "first, second: counted as they are, but what it has read is out of reach" in told
    (tmp_path / "away").rename(tmp_path / "data")
    (folder / "first/model.safetensors").write_text("made anew")
    runs, told = counted()
    assert runs == ["first"] and "second: it is no longer the run of the plan (init: the file changed). Its scores are not in this report." in told
    (folder / "first/model.safetensors").write_text("first")
    good = json.loads((folder / "first/status.json").read_text())
    write_status(folder / "first", good | dict(state="failed", reason="ValueError"))
    runs, told = counted()
    assert runs == [] and "starts from first, which is not complete" in told
    write_status(folder / "first", good)
    write_photo(tmp_path / "data/before.png", np.full((8, 8, 3), 0.4, np.float32))
    runs, told = counted()
    assert runs == [] and "pairs: the photos changed" in told


def test_a_grid_of_seeds_repeats_a_configuration(tmp_path):
    folder = planned_and_done(tmp_path, "recipe: hdrnet_512\nruns: {small-seed_1: {}}\ngrid: {lr: [1e-3, 1e-2], seed: [0, 1]}\nfolds: 2\n")
    summary = table(read_study(folder)).set_index("configuration")
    assert set(summary.index) == {"lr 1e-3", "lr 1e-2"}
    assert (summary.seeds == 2).all() and (summary.folds == 2).all() and (summary.runs == 4).all()


def test_attempts_on_other_code_or_machines_are_told(tmp_path):
    git, environment = dict(commit="a" * 40, dirty=False), dict(python="3.11.7", cpu="a CPU", gpu="", threads="1", packages=dict(torch="2.13.0"))
    tries = dict(same=(git, environment), moved=(git, environment | dict(cpu="another CPU", gpu="H100", threads="2", packages=dict(torch="2.12.0"))), edited=(git | dict(commit="b" * 40, dirty=True, diff="0123456789"), environment), dark=(None, None))
    runs = []
    for name, (code, machine) in tries.items():
        earlier = dict(attempt=1, state="paused", reason="stopped", host="node1", git=code, environment=machine)
        runs.append(make_run(tmp_path, name, 0.05, -1, axes={}, status=dict(attempt=2, attempts=[earlier], git=git, environment=environment)))
    results = read_study(plan(tmp_path, runs))
    told = [t for _, t in account(results)]
    differ = {t.split(":")[0]: t for t in told if "its attempts differ in" in t}
    assert set(differ) == {"moved", "edited"} and "commit (bbbbbbbbbb, then aaaaaaaaaa); uncommitted changes (yes, hash 01234567, then none)" in differ["edited"]
    assert all(f"{w} (" in differ["moved"] for w in ("processor", "GPU", "threads", "version of torch")) and "commit" not in differ["moved"]
    assert "is not recorded: dark." in " ".join(told) and any("On the same processor, code and number of threads" in t and "to rounding" in t for t in told)
    rows = what_differs(results)[1]
    assert rows[rows.what == "commit"].value.tolist() == ["a" * 10, "bbbbbbbbbb, then aaaaaaaaaa"], "what was the same for the last attempt alone is not the same"


def test_energy_of_runs_that_overlapped_is_not_added_up(tmp_path):
    at = lambda a, b, host="node1": dict(started=f"2026-01-01T00:00:{a:02}+00:00", ended=f"2026-01-01T00:00:{b:02}+00:00", host=host)
    runs = [make_run(tmp_path, n, 0.05, -1, axes={}, status=t) for n, t in dict(a=at(0, 10), b=at(10, 20), c=at(5, 15, "node2")).items()]
    shown = cost_table(read_study(plan(tmp_path, runs))).data
    assert "energy, of the whole machine or GPU, 1.5 Wh (3 runs measured)" in shown and "overlapped" not in shown
    spent = dict(seconds=4.0, cpu_seconds=3.0, peak_memory=2**30, gpu_memory=None, energy_wh=0.25, energy_of="CPU package")
    killed = at(25, 26) | dict(cost=None, seconds=None, spent=spent, attempt=2, attempts=[at(19, 21) | dict(state="died", spent=spent | dict(peak_memory=2**31))])
    results = read_study(plan(tmp_path, [*runs, make_run(tmp_path, "d", 0.05, -1, axes={}, state="died", status=killed)]))
    shown = cost_table(results).data
    assert "count it each (b, d), so there is no sum" in shown and "Wh (" not in shown, "an earlier attempt counts as well"
    row = results.runs.set_index("run").loc["d"]
    assert row.seconds == 8 and row.cpu_seconds == 6 and row.energy_wh == 0.5 and row.peak_memory == 2**31, "what a run took that never completed"


def test_torn_files_are_told(tmp_path):
    runs = [make_run(tmp_path, n, 0.05, -1) for n in ("a", "torn", "empty", "lies")]
    (tmp_path / "torn/metrics.json").write_text('{"ours": ')
    (tmp_path / "empty/photos.csv").unlink()
    write_json(tmp_path / "lies/metrics.json", dict(ours=dict(l1=0.01)))
    told = " ".join(t for _, t in account(read_study(plan(tmp_path, runs))))
    assert "torn: unreadable" in told and "empty" in told and "no scores per photo" in told and "lies: its metrics.json says L1 0.0100, its photos say 0.0" in told
    with pytest.raises(AutohdrError, match="neither a study.json nor folders of runs"):
        read_study(tmp_path / "a")


def test_everything_that_went_wrong_is_told(big):
    results = read_study(big)
    told = " ".join(t for _, t in account(results))
    assert "40 runs planned: 33 complete" in told
    for words in ("raised TrainingDiverged", "ran out of memory", "Stopped by SIGTERM", "paused: Stopped on request", "running", "never started", "other parameters than planned (lr)", "left out: stranger", "1 run of an earlier plan put aside in _replaced: old-20260101",
                  "took 3 attempts (died: killed by SIGKILL; paused: stopped on request after saving)", "1 run interrupted or retried, 2 times in all", "differ in commit", "differ in uncommitted changes", "differ in host"):
        assert words in told, words
    assert not set(results.scores.run) & {"failed-fold_0", "died-fold_0", "terminated-fold_0", "paused-fold_0", "running-fold_0", "changed-fold_0", "stranger"}, "scores of runs that did not end well do not count"


def test_the_study_s_figures_stay_in_its_columns(big, report):
    written = json.loads((report / "metrics.json").read_text())
    cited = {v for v in STUDY.claimed if re.search(r"\d\.\d", v)}
    for name, rows in written["tables"].items():
        ours = {str(v) for row in rows for k, v in row.items() if k != "study"}
        assert not ours & cited, f"{name}: a figure of the study among ours"
    assert set(written["tables"]) == {"models", "resolution", "losses", "pre_post"}
    text = (report / "report.html").read_text()
    tables = "".join(re.findall(r"<div class=.scroll both.*?</table>", text, re.S))
    for claimed in ("0.0514", "0.1293", "0.1012", "31.8 dB"):
        cells = re.findall(rf"<td[^>]*>{re.escape(claimed)}</td>", tables)
        assert cells and all("theirs" in cell for cell in cells), claimed
    assert "the study, on other data" in text and "23.21 dB" in text


def test_tables_are_chosen_by_the_plan(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    content = json.loads((tmp_path / "s/study.json").read_text())
    write_json(tmp_path / "s/study.json", content | dict(tables=["losses", "models"]))
    results = read_study(tmp_path / "s")
    found = study_tables(results, table(results))
    assert list(found) == ["losses", "models"] and found["losses"][1].empty and len(found["models"][1]) == 3
    verdicts = found["models"][1].set_index("configuration").verdict
    assert verdicts["bad"] == "does not beat the fitted gamma" and verdicts["good"].startswith("best")
    write_json(tmp_path / "s/study.json", content | dict(tables_of={"good-fold_0": "models", "good-fold_1": "models", "bad-fold_0": "losses"}))
    results = read_study(tmp_path / "s")
    assert study_tables(results, table(results))["models"][1].configuration.tolist() == ["good"], "only the runs of the included study of that name"


def test_metrics_of_the_report(big, report):
    written = json.loads((report / "metrics.json").read_text())
    assert written["planned"] == 40 and written["complete"] == 33 and written["states"]["died-fold_0"] == "died" and len(written["table"]) == 15 + 1 + 4
    name = "Hdrnet 384 with a rather long name, lr 0.001"
    photos = pd.concat([pd.read_csv(big / f"hdrnet_384_with_a_rather_long_name-lr_0.001-fold_{k}/photos.csv") for k in (0, 1)])
    assert next(r for r in written["table"] if r["configuration"] == name)["l1"] == pytest.approx(photos.l1.mean())
    assert len(pd.read_csv(report / "table.csv")) == 20 and (report / "by_photo_0.csv").exists()


def test_links_lead_somewhere_and_nowhere_else(big, report):
    for page in (report / "report.html", big / "report.html"):
        text = page.read_text()
        links = re.findall(r"<a href=.([^'\">]+report\.html)", text)
        assert len(links) == 39 and all((page.parent / link).is_file() for link in links), page
        assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text.split("<main>")[1]) and page.stat().st_size < 25e6


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_a_browser(report, open_report, width):  # noqa: F811
    page = open_report(report, width)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    assert page.locator(".js-plotly-plot").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the side"
    assert all(p.bounding_box()["height"] > 300 for p in page.locator(".js-plotly-plot").all())
    names = page.locator("table:has(th button:text-is('fitted gamma')) tbody").first.locator("td:first-child")
    first = names.first.inner_text()
    page.get_by_role("button", name="fitted gamma").first.click()
    assert names.count() == 6 and names.first.inner_text() in PHOTOS and first in PHOTOS
    assert page.locator(".ah-gallery img").count() >= 45 and page.locator(".ah-gallery img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
