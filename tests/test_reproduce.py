"""`pvnb reproduce`, on small notebooks made on the spot: every verdict, time limits, interrupts, baselines."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import psutil
import pytest

from paddlevideo_nb import reproduce as module
from paddlevideo_nb.core import PvnbError, read_json
from paddlevideo_nb.reproduce import COLUMNS, ClaimFailed, record, reproduce, reproduce_command

PARAMETERS = 'mode = "mini"\nseed = 0\nweights = ""\ndata_root = ""\nout = ""'
ROW = {"metric": "top1", "measured": 0.5, "claim": "above chance", "ok": True}


def notebook(folder, name, *cells, parameters=PARAMETERS, tagged=True):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (parameters, *cells)])
    if tagged:
        nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def recording(model="Toy", **row):
    return f"from paddlevideo_nb.reproduce import record\nrecord({model!r}, [{ {**ROW, **row}!r}], out=out)"


@pytest.fixture
def run(tmp_path, repo, monkeypatch):
    "Run the notebooks of tmp_path/nb into tmp_path/out; returns the table."
    monkeypatch.chdir(repo)

    def run(*names, **options):
        places = {"out": tmp_path / "out", "notebooks": tmp_path / "nb", "baselines": tmp_path / "base"}
        return reproduce(list(names) or None, **{**places, **options})
    return run


# --- record


def test_record_writes_and_prints(tmp_path, capsys):
    rows = [{**ROW, "measured": np.float32(0.5), "published": 0.67, "ok": np.True_}, {**ROW, "metric": "loss", "measured": 2, "direction": "lower", "tolerance": 0.1}]
    record("Toy", rows, out=tmp_path / "deep" / "er", seconds=1.5)
    kept = read_json(tmp_path / "deep" / "er" / "Toy.json")
    assert kept["model"] == "Toy" and kept["seconds"] == 1.5
    assert [r["metric"] for r in kept["rows"]] == ["top1", "loss"]
    assert kept["rows"][0]["measured"] == 0.5 and kept["rows"][0]["published"] == 0.67 and kept["rows"][0]["ok"] is True
    assert kept["rows"][1]["direction"] == "lower" and kept["rows"][1]["tolerance"] == 0.1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and len(set(map(len, printed))) == 1, "the table is not straight"


def test_record_keeps_the_figure_of_a_failed_claim(tmp_path):
    with pytest.raises(AssertionError, match="Toy: claim failed: beats chance .top1 = 0.4.") as failure:
        record("Toy", [{**ROW, "metric": "fine"}, {**ROW, "measured": 0.4, "ok": False, "claim": "beats chance"}], out=tmp_path)
    assert failure.type is ClaimFailed
    assert [r["ok"] for r in read_json(tmp_path / "Toy.json")["rows"]] == [True, False]


@pytest.mark.parametrize("rows", [
    [], [{**ROW, "measured": float("nan")}], [{**ROW, "measured": float("inf")}], [{**ROW, "measured": "high"}], [{**ROW, "measured": None}],
    [{**ROW, "published": float("nan")}], [{**ROW, "ok": "True"}], [{**ROW, "ok": None}], [{**ROW, "ok": 1}], [{**ROW, "direction": "up"}],
    [{**ROW, "tolerance": -1}], [{**ROW, "metric": ""}], [{**ROW, "claim": ""}], [{**ROW, "metrics": 1}], [ROW, ROW]])
def test_record_refuses(rows, tmp_path):
    with pytest.raises(PvnbError, match="record Toy") as error:
        record("Toy", rows, out=tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# --- verdicts


def test_good_failed_broken_and_untagged(tmp_path, run, capsys):
    nbs = tmp_path / "nb"
    notebook(nbs, "a_good", "assert (mode, seed) == ('mini', 0)", recording("Good"))
    notebook(nbs, "b_weak", recording("Weak", measured=0.1, ok=False))
    notebook(nbs, "c_broken", "x = 1", "# the reason\n" * 9 + "{}['key']", recording("Never"))
    notebook(nbs, "d_untagged", recording("Untagged"), tagged=False)
    notebook(nbs, "e_silent", "x = 1")
    (nbs / "f_damaged.ipynb").write_text("{")
    table = run(jobs=2, timeout=120)
    assert [(row["model"], row["verdict"]) for row in table] == [
        ("Good", "no baseline"), ("Weak", "claim failed"), ("c_broken", "error"), ("d_untagged", "error"), ("e_silent", "error"), ("f_damaged", "error")]
    assert table[1]["measured"] == 0.1
    assert table[2]["claim"] == "cell In [4]: KeyError: 'key'"
    assert "mode, seed, weights, data_root, out" in table[3]["claim"] and table[3]["seconds"] is None
    assert "record" in table[4]["claim"] and "not a readable notebook" in table[5]["claim"]

    streams = capsys.readouterr()
    assert streams.out.startswith("| model ") and len(streams.out.splitlines()) == 8
    for line in ("a_good: ok, ", "b_weak: claim failed, ", "c_broken: error, "):
        assert line in streams.err
    block = streams.err[streams.err.index("---- c_broken"):]
    block = block[:block.index("\n----\n")]
    assert "cell In [4] of c_broken.ipynb" in block and "# the reason" in block and "4 more lines" in block and "KeyError: 'key'" in block
    assert len(block.splitlines()) <= 16 and "\x1b" not in block

    out = tmp_path / "out"
    assert (out / "a_good.ipynb").is_file() and read_json(out / "b_weak" / "Weak.json")["rows"][0]["measured"] == 0.1
    with open(out / "results.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert tuple(kept[0]) == COLUMNS and [row["verdict"] for row in kept] == [row["verdict"] for row in table]
    text = (out / "results.md").read_text()
    assert "6 of 6 notebooks finished; 6 rows, 5 of them bad." in text and streams.out in text


def test_parameters_reach_the_notebook(tmp_path, run):
    (tmp_path / "w.pdparams").write_bytes(b"w")
    (tmp_path / "data").mkdir()
    notebook(tmp_path / "nb", "a", f"assert (mode, seed, weights, data_root) == ('zoo', 7, {str(tmp_path / 'w.pdparams')!r}, {str(tmp_path / 'data')!r})",
             "import os\nthreads = int(os.environ['OMP_NUM_THREADS'])", "from paddlevideo_nb.core import repo_dir\nassert str(repo_dir()) == os.getcwd()",
             "from paddlevideo_nb.reproduce import record\n" + f"record('A', [dict({ROW!r}, measured=threads)], out=out)")
    row, = run(mode="zoo", seed=7, weights=os.path.relpath(tmp_path / "w.pdparams"), data_root=tmp_path / "data", jobs=64)
    assert row["verdict"] == "no baseline" and row["measured"] == 1, row


def test_zoo_mode_holds_to_the_published_figure(tmp_path, run):
    notebook(tmp_path / "nb", "a", recording("Near", measured=0.66, published=0.67, tolerance=0.011))
    notebook(tmp_path / "nb", "b", recording("Far", measured=0.65, published=0.67, tolerance=0.011))
    near, far = run(mode="zoo", jobs=2)
    assert (near["verdict"], near["baseline"], near["tolerance"]) == ("ok", 0.67, 0.011)
    assert far["verdict"] == "off baseline"


def test_timeout_kills_the_kernel_and_its_children(tmp_path, run):
    pids = tmp_path / "pids"
    notebook(tmp_path / "nb", "endless", f"import os, subprocess\nchild = subprocess.Popen(['sleep', '300'])\nopen({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')",
             "while True: pass")
    start = time.monotonic()
    row, = run(timeout=12)
    assert row["verdict"] == "timeout" and row["claim"].startswith("stopped after 12 s in cell In [") and time.monotonic() - start < 30
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "out" / "endless.ipynb").is_file()


def test_two_at_a_time(tmp_path, run):
    meet = "import time, pathlib\npathlib.Path({0!r}).touch()\nend = time.time() + 60\nwhile not pathlib.Path({1!r}).exists() and time.time() < end: time.sleep(0.1)\nassert time.time() < end"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    notebook(tmp_path / "nb", "a", meet.format(a, b), recording("A"))
    notebook(tmp_path / "nb", "b", meet.format(b, a), recording("B"))
    assert [row["verdict"] for row in run(jobs=2, timeout=100)] == ["no baseline"] * 2


# --- baselines


def test_baselines_are_written_by_the_flag_only_and_compared(tmp_path, run):
    base = tmp_path / "base" / "a.json"
    notebook(tmp_path / "nb", "a", recording("A", measured=0.80, tolerance=0.03))
    assert run()[0]["verdict"] == "no baseline" and not base.exists()
    row, = run(update_baselines=True)
    assert row["verdict"] == "ok" and read_json(base) == {"top1": {"value": 0.8, "tolerance": 0.03}}

    notebook(tmp_path / "nb", "a", recording("A", measured=0.76, baseline="top1"))
    row, = run()
    assert (row["verdict"], row["baseline"], row["measured"], row["tolerance"]) == ("off baseline", 0.8, 0.76, 0.03)
    assert run(seed=1)[0]["verdict"] == "no baseline", "baselines belong to seed 0"
    assert read_json(base)["top1"]["value"] == 0.8

    notebook(tmp_path / "nb", "a", recording("A", metric="top5"))
    assert [(row["metric"], row["verdict"]) for row in run()] == [("top5", "no baseline"), ("top1", "off baseline")]

    notebook(tmp_path / "nb", "a", recording("A", measured=0.1, ok=False))
    assert run(update_baselines=True)[0]["verdict"] == "claim failed" and read_json(base)["top1"]["value"] == 0.8


def test_a_damaged_baseline_is_named_before_anything_runs(tmp_path, run):
    notebook(tmp_path / "nb", "a", recording("A"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.json").write_text('{"top1": 3}')
    with pytest.raises(PvnbError, match="a.json"):
        run()
    assert not (tmp_path / "out" / "a.ipynb").exists()


# --- interrupts


def interrupted_run(tmp_path, repo, sent):
    "A run of one quick and one endless notebook that gets the signal `sent` once the first is finished: (exit code, out folder, kernel's pid)."
    pid = tmp_path / "pid"
    notebook(tmp_path / "nb", "a_quick", recording("Quick"))
    notebook(tmp_path / "nb", "b_endless", f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))", "while True: pass")
    notebook(tmp_path / "nb", "c_waiting", recording("Waiting"))
    out = tmp_path / "out"
    code = "import sys\nfrom paddlevideo_nb.cli import main\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, "reproduce", "--notebooks", str(tmp_path / "nb"), "--out", str(out)],
                               cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(sent)
    streams = process.communicate(timeout=60)
    return process.returncode, out, int(pid.read_text()), *streams


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_usable_report(tmp_path, repo, sent):
    code, out, kernel, printed, err = interrupted_run(tmp_path, repo, sent)
    assert code == 130 and err.endswith("interrupted\n")
    with open(out / "results.csv", newline="") as file:
        kept = {row["model"]: row["verdict"] for row in csv.DictReader(file)}
    assert kept == {"Quick": "no baseline", "b_endless": "interrupted", "c_waiting": "interrupted"}
    assert "1 of 3 notebooks finished" in (out / "results.md").read_text() and "| Quick " in printed
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE


def test_report_survives_sigkill(tmp_path, repo):
    code, out, kernel, _, _ = interrupted_run(tmp_path, repo, signal.SIGKILL)
    try:
        assert code == -signal.SIGKILL
        with open(out / "results.csv", newline="") as file:
            assert [row["verdict"] for row in csv.DictReader(file)] == ["no baseline", "interrupted", "interrupted"]
    finally:  # nobody is left to end these
        papermill = psutil.Process(kernel).parent()
        assert "papermill" in papermill.cmdline()
        papermill.kill()
        psutil.Process(kernel).kill()


# --- usage


def test_names(tmp_path, run, repo):
    for name in ("tsn", "attention_cluster"):
        notebook(tmp_path / "nb", name, recording(name))
    assert [p.stem for p in module.find_notebooks(["TSN"], tmp_path / "nb")] == ["tsn"]
    assert [p.stem for p in module.find_notebooks(["Attention-Cluster.ipynb"], tmp_path / "nb")] == ["attention_cluster"]
    with pytest.raises(PvnbError, match="did you mean 'attention_cluster'"):
        run("AtentionCluster")
    with pytest.raises(PvnbError, match="no notebooks in"):
        module.find_notebooks(None, repo / "tests")


@pytest.mark.parametrize("options, said", [
    ({"mode": "maxi"}, "mode"), ({"jobs": 0}, "jobs"), ({"timeout": 0.0}, "timeout"), ({"weights": "no/such.pdparams"}, "weights not found"),
    ({"data_root": "no/such"}, "data_root not found"), ({"update_baselines": True, "seed": 1}, "seed 0"), ({"update_baselines": True, "mode": "zoo"}, "mini")])
def test_what_cannot_be_run_is_said_at_once(options, said, tmp_path, run):
    notebook(tmp_path / "nb", "a", recording("A"))
    with pytest.raises(PvnbError, match=said):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_command_exit_codes(tmp_path, repo, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    notebook(tmp_path / "nb", "a", recording("A"))
    places = ["--notebooks", str(tmp_path / "nb"), "--out", str(tmp_path / "out")]
    assert reproduce_command(["a", *places]) == 0
    assert "1 of 1 rows good" in capsys.readouterr().out
    notebook(tmp_path / "nb", "a", recording("A", ok=False))
    assert reproduce_command(["--jobs", "2", "--timeout", "100", *places]) == 1
    with pytest.raises(SystemExit) as usage:
        reproduce_command(["--mode", "maxi"])
    assert usage.value.code == 2


def test_committed_baselines_are_readable(repo):
    for path in sorted((repo / "tests" / "baselines").glob("*.json")):
        kept = json.loads(path.read_text())
        assert kept and (repo / "nbs" / "papers" / f"{path.stem}.ipynb").is_file(), f"{path.name}: no such notebook"
        assert all(np.isfinite(b["value"]) and b["tolerance"] >= 0 for b in kept.values()), path.name
