"""Options of training: each does what it says, and a run that was cut off goes on with all of them."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.runs import run_arguments
from paddlevideo_nb.tasks import get_task
from paddlevideo_nb.train import OPTIONS, Average, _parts, fit
from paddlevideo_nb.zoo import read_metadata, read_weights

paddle = import_paddle()
nn = paddle.nn

QUIET = {"progress": False, "valid_interval": 0, "log_interval": 1}


def state(network):
    return {k: v.numpy() for k, v in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


class Plain(nn.Layer):
    "No batch norm, no dropout."
    def __init__(self, classes, *_):
        super().__init__()
        self.stack = nn.Sequential(nn.Conv2D(3, 8, 5, 4), nn.ReLU(), nn.Conv2D(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(16, classes))

    def forward(self, x):  # [N, T, 3, H, W]
        return self.stack(x.flatten(0, 1)).reshape([*x.shape[:2], -1]).mean(1)


@pytest.fixture(scope="module")
def words(mini, tmp_path_factory):
    lines = (mini/"moments"/"val.txt").read_text().splitlines()[:48]
    path = tmp_path_factory.mktemp("list")/"few.txt"
    path.write_text("".join(f"{mini/'moments'/line}\n" for line in lines))
    return ["TSN", "--config", "tsn_mini", "width=4", "epoch=2", "batch_size=8", "total_videos=48", *(f"{s}.filelist={path}" for s in ("TRAIN", "VALID"))]


@pytest.fixture(scope="module")
def task(words):
    return get_task(run_arguments("train", words, OPTIONS, ("TRAIN", "VALID"))[1])


@pytest.fixture(scope="module")
def plain(task):
    class PlainTask(type(task)):
        networks = {"TSN": Plain}
    return PlainTask(task.config)


@pytest.fixture(scope="module")
def data(task):
    return task.dataset("train", seed=3, cache=True)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_equal_the_batch(parts, plain, data):
    whole, history = fit(plain, seed=3, train_data=data, **QUIET)
    cut, again = fit(plain, seed=3, train_data=data, accumulate=parts, **QUIET)
    for key, value in state(whole).items():
        np.testing.assert_allclose(state(cut)[key], value, rtol=0, atol=1e-5*np.abs(value).max())
    assert len(history) == 12 and np.allclose([r["loss"] for r in history], [r["loss"] for r in again], rtol=1e-5)


def test_accumulated_sums_are_sums():
    "Attention LSTM's loss is the sum over the batch, of four parts as of one."
    config = load_config("attention_lstm_mini", MODEL={"drop_rate": 0.0})
    task = get_task(config)
    dims = [*config.MODEL.feature_dims, 128][:2]

    class Data:
        def __len__(self): return 16
        def __getitem__(self, i):
            r = np.random.default_rng(i)
            return {"rgb": r.normal(size=(6, dims[0])).astype("float32"), "audio": r.normal(size=(6, dims[1])).astype("float32"), "lengths": np.int64(6),
                    "label": (r.random(config.MODEL.num_classes) < .2).astype("float32")}
    config.TRAIN["batch_size"] = 16
    (whole, a), (cut, b) = (fit(task, seed=1, epochs=1, train_data=Data(), accumulate=n, **QUIET) for n in (1, 4))
    assert a[0]["loss"] > 5 and np.isclose(a[0]["loss"], b[0]["loss"], rtol=1e-5)
    moved = [k for k, v in state(whole).items() if not k.endswith("attend.bias")]  # softmax cancels that one: its gradient is rounding
    for key in moved:
        np.testing.assert_allclose(state(cut)[key], state(whole)[key], rtol=0, atol=1e-4*np.abs(state(whole)[key]).max() + 1e-7)


def test_batches_that_cannot_be_cut_are_refused():
    batch = {"label": np.zeros((4, 1)), "proposals": np.zeros((30, 32)), "name": ["a"]*4}
    assert _parts(batch, 1) == [batch]
    with pytest.raises(PvnbError, match="'proposals' has 30 rows for 4 samples"):
        _parts(batch, 2)


def test_clipping_limits_the_norm_of_all_gradients(plain, data):
    class Descent(type(plain)):
        def optimizer(self, network): return paddle.optimizer.SGD(1.0, network.parameters()), None
    task, moves = Descent(plain.config), {}
    paddle.seed(3)
    start = state(task.network())
    for limit in (0.0, .01, 1e6):
        class One:  # a single batch
            def __len__(self): return 8
            def __getitem__(self, i): return data[i]
        network, _ = fit(task, seed=3, train_data=One(), epochs=1, clip_norm=limit, **QUIET)
        moves[limit] = np.sqrt(sum(((state(network)[k] - start[k])**2).sum() for k in start))
    assert moves[0.0] > .1 and abs(moves[.01] - .01) < 1e-5 and moves[1e6] == moves[0.0]


def test_average_is_the_recursion_over_all_updates(task, data, tmp_path, monkeypatch):
    import paddlevideo_nb.train as train
    real, steps = train.save_checkpoint, {}
    def save(path, task, network, optimizer, schedule, place, *more):
        if path.name.endswith("_last.safetensors"):
            steps[place["step"]] = state(network)
        real(path, task, network, optimizer, schedule, place, *more)
    monkeypatch.setattr(train, "save_checkpoint", save)
    network, history = fit(task, seed=3, train_data=data, valid_data=task.dataset("valid"), save_dir=tmp_path, save_interval=1, ema=.7, progress=False, log_interval=1)
    paddle.seed(3)
    want = {k: v.astype("float64") for k, v in state(task.network()).items()}
    for t in range(1, 13):
        d = min(.7, (1 + t)/(10 + t))
        want = {k: d*v + (1 - d)*steps[t][k] for k, v in want.items()}
    kept = read_weights(tmp_path/"TSN_last.safetensors")
    for key, value in state(network).items():
        np.testing.assert_allclose(value, want[key], rtol=1e-5, atol=1e-6)
        assert np.array_equal(kept[f"average.{key}"], value) and np.array_equal(kept[f"network.{key}"], steps[12][key])
    raw, _ = fit(task, seed=3, train_data=data, **QUIET)
    assert same(state(raw), steps[12])  # the average takes no part in training
    valid = [r for r in history if "valid_top1" in r]
    best = max(valid, key=lambda r: r["valid_top1"])
    from paddlevideo_nb.evaluate import evaluate
    from paddlevideo_nb.zoo import load_weights
    found = evaluate(task, load_weights(task.network(), tmp_path/"TSN_best.safetensors"), task.dataset("valid"), mode="valid", progress=False)
    assert abs(found["loss"] - best["valid_loss"]) < 1e-5 and found["top1"] == best["valid_top1"]


def test_average_of_whole_numbers_is_the_last():
    layer = nn.Linear(1, 1)
    layer.register_buffer("count", paddle.to_tensor([3]))
    average = Average(layer, .5)
    layer.count.set_value(paddle.to_tensor([8]))
    average.update(layer, 1)
    assert average.values["count"].item() == 8 and average.values["count"].dtype == paddle.int64


def launch(words, folder, *more):
    line = [sys.executable, "-m", "paddlevideo_nb.train", *words, f"--save_dir={folder}", "--seed=3", "--save_interval=1", "--log_interval=1", "--workers=0", "--cache=True",
            "--use_gpu=False", "--valid_interval=0", *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_cut_off_anywhere_the_options_go_on(number, words, task, data, tmp_path):
    options = {"ema": .9, "accumulate": 2, "clip_norm": 1.0}
    whole, _ = fit(task, seed=3, train_data=data, save_dir=tmp_path/"whole", **options, **QUIET)
    process, last = launch(words, tmp_path/"cut", *(f"--{k}={v}" for k, v in options.items())), tmp_path/"cut"/"TSN_last.safetensors"
    end = time.time() + 60
    while not last.is_file() and process.poll() is None and time.time() < end:
        time.sleep(.005)
    time.sleep(random.uniform(0, .3))
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else 130), text
    if number == signal.SIGTERM:
        assert f"--resume {tmp_path/'cut'}" in text
    assert 1 <= json.loads(read_metadata(last)["place"])["step"] < 12
    resumed, _ = fit(task, train_data=data, save_dir=tmp_path/"cut", resume=tmp_path/"cut", **options, **QUIET)
    assert same(state(whole), state(resumed))
    a, b = (read_weights(tmp_path/d/"TSN_last.safetensors") for d in ("whole", "cut"))
    assert same(a, b) and {k.split(".")[0] for k in a} == {"network", "optimizer", "average"}


def test_an_average_begins_where_a_checkpoint_has_none(task, data, tmp_path):
    first, _ = fit(task, seed=3, train_data=data, epochs=1, save_dir=tmp_path, **QUIET)
    network, _ = fit(task, train_data=data, epochs=1, resume=tmp_path, ema=.9, **QUIET)
    assert same(state(first), state(network))  # no update followed


def test_half_precision_on_a_cpu_says_that_it_is_none(plain, data, capsys):
    network, _ = fit(plain, seed=3, train_data=data, epochs=1, **QUIET)
    half, _ = fit(plain, seed=3, train_data=data, epochs=1, amp="O1", **QUIET)
    if paddle.get_device() == "cpu":
        assert "amp=O1 has no effect on the CPU" in capsys.readouterr().err and same(state(network), state(half))


@pytest.mark.parametrize("wrong, said", [({"amp": "O3"}, "expected O1 or O2"), ({"accumulate": 0}, "accumulate 0"), ({"ema": 1.0}, "ema 1.0"), ({"clip_norm": -1.0}, "clip_norm -1.0")])
def test_values_out_of_range(wrong, said, plain, data):
    with pytest.raises(PvnbError, match=said):
        fit(plain, train_data=data, **wrong, **QUIET)


def test_profiler_writes_a_trace_and_its_summary(words, tmp_path, capsys):
    more = ["--use_gpu=False", "--is_profiler=1", f"--profiler_path={tmp_path/'profile'}", "--log_interval=2", f"--save_dir={tmp_path/'out'}", "--epoch=9"]
    assert main(["train", *words, *more]) == 0
    traces = list((tmp_path/"profile").glob("*.json"))
    assert len(traces) == 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any("conv2d" in str(e.get("name")) for e in events)
    summary = (tmp_path/"profile"/"summary.txt").read_text()
    assert "conv2d" in summary and "Operator Summary" in summary and summary.strip() in capsys.readouterr().out
    assert json.loads(read_metadata(tmp_path/"out"/"TSN_last.safetensors")["place"])["step"] == 7  # 2 to warm up, 5 to measure
