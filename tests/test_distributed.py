"""Several processes: they train and judge as one does, and end together, with a reason."""
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.datasets.loader import epoch_order
from paddlevideo_nb.distributed import Part, exchange, my_batches, reason
from paddlevideo_nb.zoo import read_weights

REPO = str(Path(__file__).resolve().parents[1])


@pytest.fixture(autouse=True, scope="module")
def children_find_the_package():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = REPO + (f"{os.pathsep}{before}" if before else "")
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def clip_list(mini, path, count):
    lines = (mini/"moments"/"val.txt").read_text().splitlines()[:count]
    path.write_text("".join(f"{mini/'moments'/line}\n" for line in lines))
    return path


def tsn(clips, folder, *more):
    lists = [f"{s}.filelist={clips}" for s in ("TRAIN", "VALID", "TEST")]
    return ["TSN", "--config", "tsn_mini", "width=4", "total_videos=48", "--use_gpu=False", "--seed=3", "--log_interval=1", *lists, f"--save_dir={folder}", *more]


def weights(folder, model="TSN"):
    return read_weights(folder/f"{model}_last.safetensors")


def apart(a, b, size=lambda x: np.abs(x).max()):
    "Largest difference of two sets of arrays, each relative to its array; `size` of an array: by default its largest entry."
    assert a.keys() == b.keys()
    return max(float(size(a[k].astype("float64") - b[k])/max(size(a[k]), 1e-12)) for k in a)


@pytest.mark.parametrize("n, batch, world", [(48, 8, 2), (23, 6, 3), (7, 2, 2), (16, 8, 4)])
def test_processes_share_the_batches_of_one(n, batch, world):
    one = epoch_order(n, True, seed=3, epoch=1)
    shares = [epoch_order(n, True, seed=3, epoch=1, rank=r, world=world) for r in range(world)]
    for k in range(n//batch):
        part = slice(k*batch//world, (k + 1)*batch//world)
        assert sorted(np.concatenate([s[part] for s in shares])) == sorted(one[k*batch:(k + 1)*batch])


def test_a_part_is_a_data_set():
    class Data:
        def __len__(self): return 7
        def __getitem__(self, i): return i*10
        def collate(self, samples): return {"sum": sum(samples)}
    part = Part(Data(), [2, 5])
    assert len(part) == 2 and part[1] == 50 and part.collate([1, 2]) == {"sum": 3} and not hasattr(part, "set_epoch")
    assert my_batches(Data(), 3, first=1).indices == [3, 4, 5, 6] and list(exchange(iter("ab"), 2)) == ["a", "b"]


def test_reason_names_the_process_that_failed_first(tmp_path):
    lost = "pvnb: error: lost another process of this job, so this one ends too (Connection reset by peer)\n"
    (tmp_path/"workerlog.0").write_text("step 1\n" + lost)
    (tmp_path/"workerlog.1").write_text("step 1\n")
    assert reason(tmp_path, 2).startswith("process 1 of 2: it ended without a word")
    (tmp_path/"workerlog.1").write_text("Traceback ...\nValueError: no such thing\nlast words of a library\n")
    assert reason(tmp_path, 2).startswith("process 1 of 2: ValueError: no such thing (log: ")
    (tmp_path/"workerlog.1").write_text("FatalError: `Termination signal` is detected by the operating system.\n")
    assert "lost another process" in reason(tmp_path, 2)


def test_two_processes_equal_one_without_batch_norm(features, tmp_path):
    lists = [f"{s}.filelist={features/'flash'/'val.list'}" for s in ("TRAIN", "VALID")]
    words = ["train", "AttentionCluster", "--config", "attention_cluster_mini", "drop_rate=0.0", "epoch=1", "batch_size=40", "--use_gpu=False", "--log_interval=1", *lists]
    for n in (1, 2):
        assert main([*words, f"--save_dir={tmp_path/str(n)}", f"--nproc={n}"]) == 0
    # softmax over time cancels the bias of its scores: its gradient is rounding alone
    one, two = ({k: a for k, a in weights(tmp_path/str(n), "AttentionCluster").items() if k.startswith("network.") and "conv.bias" not in k} for n in (1, 2))
    # and Adam makes large steps of the few gradients that are nearly 0, so single entries may differ by more than arrays do
    assert len(one) > 5 and apart(one, two, np.linalg.norm) < 1e-5 and apart(one, two) < 2e-4
    rows = [list(csv.DictReader((tmp_path/str(n)/"AttentionCluster_metrics.csv").open())) for n in (1, 2)]
    assert len(rows[0]) == len(rows[1]) > 5
    for a, b in zip(*rows, strict=True):
        for key in a.keys() - {"clips_per_second"}:
            assert a[key] == b[key] or abs(float(a[key]) - float(b[key])) <= 1e-5*abs(float(a[key])), key
    log = (tmp_path/"2"/"log"/"workerlog.1").read_text()
    assert "process 1 of 2" in log and "loss" not in log and "checkpoints" not in log  # the first one speaks


def test_batch_norm_over_all_processes(mini, tmp_path):
    clips = clip_list(mini, tmp_path/"few.txt", 8)
    words = ["epoch=1", "batch_size=8", "--valid_interval=0"]
    for name, more in {"one": (), "synced": ("--nproc=2",), "own": ("--nproc=2", "--sync_bn=False")}.items():
        assert main(["train", *tsn(clips, tmp_path/name, *words, *more)]) == 0
    one = weights(tmp_path/"one")
    assert any(k.endswith("norm._mean") for k in one) and any(k.endswith("|velocity_0") for k in one)
    assert apart(one, weights(tmp_path/"synced")) < 5e-5 < 1e-2 < apart(one, weights(tmp_path/"own"))


def test_killed_process_ends_the_job_which_then_goes_on(mini, tmp_path, capfd):
    clips = clip_list(mini, tmp_path/"few.txt", 48)
    words = ["epoch=2", "batch_size=8", "--valid_interval=0", "--save_interval=1", "--nproc=2"]
    assert main(["train", *tsn(clips, tmp_path/"whole", *words)]) == 0
    job = subprocess.Popen([sys.executable, "-m", "paddlevideo_nb.cli", "train", *tsn(clips, tmp_path/"cut", *words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not (tmp_path/"cut"/"TSN_last.safetensors").is_file() and job.poll() is None and time.time() < end:
        time.sleep(.02)
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("PADDLE_TRAINER_ID") == "1"]
    assert len(workers) == 1
    workers[0].kill()
    error = job.communicate(timeout=60)[1]
    assert job.returncode == 2 and "process 1 of 2: it ended without a word" in error and "workerlog.1" in error
    assert main(["train", *tsn(clips, tmp_path/"cut", *words, f"--resume={tmp_path/'cut'}")]) == 0
    a, b = weights(tmp_path/"whole"), weights(tmp_path/"cut")
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_evaluation_is_shared_and_the_same(mini, tmp_path, capfd):
    clips = clip_list(mini, tmp_path/"few.txt", 13)
    (tmp_path/"broken.mp4").write_bytes(b"\0"*300)
    with clips.open("a") as file:
        file.write(f"{tmp_path/'broken.mp4'} 1\n")
    assert main(["train", *tsn(clips, tmp_path, "epoch=1", "batch_size=7", "--valid_interval=0")]) == 0
    for n in (1, 2):
        line = ["eval", "TSN", "--config", "tsn_mini", "width=4", f"TEST.filelist={clips}", "batch_size=5", "--use_gpu=False", f"--weights={tmp_path/'TSN_last.safetensors'}"]
        assert main([*line, f"--save_dir={tmp_path/str(n)}", f"--nproc={n}"]) == 0
    one, two = (json.loads((tmp_path/str(n)/"TSN_metrics.json").read_text()) for n in (1, 2))
    assert one["videos"] == two["videos"] == 13 and one["skipped"] == two["skipped"] == 1
    assert one["top1"] == two["top1"] and abs(one["loss"] - two["loss"]) < 1e-5


def test_a_fault_of_all_is_one_line(mini, tmp_path, capfd):
    clips = clip_list(mini, tmp_path/"few.txt", 9)
    assert main(["train", *tsn(clips, tmp_path, "batch_size=9", "--nproc=2")]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pvnb: error:")]
    assert len(errors) == 1 and "9 clips a step cannot be shared by 2 processes" in errors[0]


def test_several_models_are_not_shared(tmp_path):
    with pytest.raises(PvnbError, match="nproc"):
        from paddlevideo_nb.evaluate import evaluate_command
        evaluate_command(["TSN", "--nproc=2", "+", "TSN"])
