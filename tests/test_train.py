"""Training: killed and continued, interrupted, broken; evaluation: every video counted."""
import csv
import json
import os
import pickle
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
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.runs import run_arguments
from paddlevideo_nb.tasks import get_task
from paddlevideo_nb.train import OPTIONS, fit, load_checkpoint, train_command
from paddlevideo_nb.zoo import read_metadata, read_weights, save_legacy, save_weights

paddle = import_paddle()
QUIET = {"progress": False, "valid_interval": 0, "log_interval": 1}


def state(network):
    return {k: v.numpy() for k, v in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def clips(mini, tmp_path_factory):
    "A list of 48 of the theatre's clips, absolute paths."
    lines = (mini/"moments"/"val.txt").read_text().splitlines()[:48]
    path = tmp_path_factory.mktemp("list")/"few.txt"
    path.write_text("".join(f"{mini/'moments'/line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def words(clips):
    "Command line words for the smallest TSN on 48 clips: 2 epochs of 6 batches."
    return ["TSN", "--config", "tsn_mini", "width=4", "epoch=2", "batch_size=8", "total_videos=48", *(f"{s}.filelist={clips}" for s in ("TRAIN", "VALID"))]


@pytest.fixture(scope="module")
def task(words):
    return get_task(run_arguments("train", words, OPTIONS, ("TRAIN", "VALID"))[1])


@pytest.fixture(scope="module")
def data(task):
    return task.dataset("train", seed=3, cache=True)


def launch(words, folder, *more):
    line = [sys.executable, "-m", "paddlevideo_nb.train", *words, f"--save_dir={folder}", "--seed=3", "--save_interval=1", "--log_interval=1", "--workers=0", "--cache=True", "--use_gpu=False", *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})


def wait_for_step(process, last, step):
    "Wait until the checkpoint `last` stands at `step` or beyond."
    end = time.time() + 120
    while process.poll() is None and time.time() < end:
        if last.is_file() and json.loads(read_metadata(last)["place"])["step"] >= step:
            return
        time.sleep(.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0][-2000:]}")


def test_killed_and_interrupted_runs_equal_an_uninterrupted_one(words, task, tmp_path):
    whole, history = fit(task, seed=3, valid_data=task.dataset("valid"), progress=False, save_dir=tmp_path/"whole", save_interval=1)
    last = tmp_path/"cut"/"TSN_last.safetensors"
    process = launch(words, tmp_path/"cut")
    wait_for_step(process, last, 2)
    time.sleep(random.uniform(0, .2))  # anywhere: reading, in a step, or writing
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed_at = json.loads(read_metadata(last)["place"])["step"]
    assert 2 <= killed_at < 12

    process = launch(words, tmp_path/"cut", f"--resume={tmp_path/'cut'}")
    wait_for_step(process, last, killed_at + 1)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"--resume {tmp_path/'cut'}" in text, text
    stopped_at = json.loads(read_metadata(last)["place"])["step"]
    assert killed_at < stopped_at <= 12

    continued, again = fit(task, valid_data=task.dataset("valid"), progress=False, save_dir=tmp_path/"cut", resume=tmp_path/"cut")  # its seed, not 0
    assert same(state(whole), state(continued))
    assert [r["epoch"] for r in again if "valid_top1" in r] == [1, 2]
    a, b = (read_weights(tmp_path/d/"TSN_last.safetensors") for d in ("whole", "cut"))
    assert same(a, b) and any(k.endswith("|velocity_0") for k in a) and any(k.startswith("network.") for k in a)
    assert read_metadata(tmp_path/"whole"/"TSN_best.safetensors")["model"] == "TSN"
    assert (tmp_path/"whole"/"TSN_metrics.csv").read_text().startswith("epoch,step")


@pytest.mark.parametrize("step", [1, 6, 7])  # within an epoch, at its very end before it is counted, in the next
def test_resume_at_every_kind_of_step(step, task, data, tmp_path, monkeypatch):
    class Dropping(type(task)):  # TSN itself draws nothing at random in its forward pass
        def forward(self, network, batch, mode="test"):
            image = paddle.nn.functional.dropout(batch["image"], .2, training=network.training)
            return super().forward(network, {**batch, "image": image}, mode)

    task = Dropping(task.config)
    whole, _ = fit(task, seed=3, train_data=data, **QUIET)

    class PowerCut(Exception):
        pass

    import paddlevideo_nb.train as train
    real = train.save_checkpoint
    def save_and_die(path, task, network, optimizer, schedule, place, *more):
        real(path, task, network, optimizer, schedule, place, *more)
        if place["step"] == step:
            raise PowerCut
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(PowerCut):
        fit(task, seed=3, train_data=data, save_dir=tmp_path, save_interval=1, **QUIET)
    monkeypatch.setattr(train, "save_checkpoint", real)
    continued, history = fit(task, train_data=data, resume=tmp_path, **QUIET)
    assert same(state(whole), state(continued))
    assert [r["step"] for r in history] == list(range(1, 13))


def test_optimiser_of_a_used_network_is_restored(task, data, tmp_path):
    "Paddle numbers the accumulators of a second optimiser _1; a resumed run has _0."
    network, _ = fit(task, seed=3, train_data=data, epochs=1, **QUIET)
    fit(task, network=network, seed=4, train_data=data, epochs=1, save_dir=tmp_path, **QUIET)
    fresh = task.network()
    optimizer, _ = task.optimizer(fresh)
    place = load_checkpoint(tmp_path, task, fresh, optimizer)
    assert place["step"] == 6 and same(state(fresh), state(network))
    arrays = {k.removeprefix("optimizer."): a for k, a in read_weights(tmp_path/"TSN_last.safetensors").items() if k.startswith("optimizer.")}
    task.loss(task.forward(fresh, {"image": paddle.zeros([2, 3, 3, 48, 48])}, "train"), {"label": paddle.zeros([2, 1], "int64")}).backward()
    before = {k: p.numpy() for k, p in fresh.named_parameters() if p.trainable}
    decay = task.config.TRAIN.l2_weight_decay
    want = {k: before[k] - optimizer.get_lr()*(.9*arrays[f"{k}|velocity_0"] + p.grad.numpy() + decay*before[k]) for k, p in fresh.named_parameters() if p.trainable}
    optimizer.step()  # a lost velocity would make a different update
    for k, p in fresh.named_parameters():
        if k in want:
            np.testing.assert_allclose(p.numpy(), want[k], rtol=2e-5, atol=1e-6)


def test_resume_refuses_what_does_not_fit(task, data, tmp_path):
    save_weights(tmp_path/"other.safetensors", {"network.w": np.zeros(2)}, {"format": "paddlevideo_nb training checkpoint 1", "model": "STNET"})
    with pytest.raises(PvnbError, match="checkpoint of STNET, not of TSN"):
        fit(task, train_data=data, resume=tmp_path/"other.safetensors", **QUIET)
    with pytest.raises(PvnbError, match="nothing_here"):
        fit(task, train_data=data, resume=tmp_path/"nothing_here", **QUIET)
    (tmp_path/"empty").mkdir()
    with pytest.raises(PvnbError, match="holds no checkpoint"):
        fit(task, train_data=data, resume=tmp_path/"empty", **QUIET)
    with pytest.raises(PvnbError, match="not both"):
        fit(task, network=task.network(), train_data=data, resume=tmp_path, **QUIET)


def test_legacy_weights_start_at_epoch_0_and_say_so(task, data, tmp_path, capsys):
    paddle.seed(9)
    network = task.network()
    values, names = state(network), original_names(network)
    adapt = getattr(network, "adapt_original", lambda n, a: a)
    arrays = {n: values[k] for k, n in names.items()}
    assert all(np.array_equal(adapt(n, a), a) for n, a in arrays.items())
    (tmp_path/"TSN.pdparams").write_bytes(pickle.dumps(arrays, protocol=2))
    resumed, history = fit(task, train_data=data, resume=tmp_path/"TSN.pdparams", epochs=0, **QUIET)
    assert "no optimiser state" in capsys.readouterr().err and history == []
    assert same(state(resumed), values)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(task, data, tmp_path):
    class Broken(type(task)):
        count = 0
        def loss(self, outputs, batch):
            Broken.count += 1
            return super().loss(outputs, batch)*(float("inf") if Broken.count > 2 else 1.)
    with pytest.raises(PvnbError, match="epoch 0, step 2: the loss is inf"):
        fit(Broken(task.config), train_data=data, save_dir=tmp_path, save_interval=1, **QUIET)
    assert json.loads(read_metadata(tmp_path/"TSN_last.safetensors")["place"])["step"] == 2
    assert all(np.isfinite(a).all() for a in read_weights(tmp_path/"TSN_last.safetensors").values())


def test_unreadable_clips_are_named_once_and_an_epoch_of_them_is_an_error(clips, words, tmp_path, capsys):
    (tmp_path/"broken.mp4").write_bytes(b"not a video")
    lines = clips.read_text().splitlines()[:15] + [f"{tmp_path/'broken.mp4'} 1"]
    (tmp_path/"some.txt").write_text("\n".join(lines) + "\n")
    (tmp_path/"none.txt").write_text(f"{tmp_path/'broken.mp4'} 1\n"*8)
    def on(name):
        return get_task(run_arguments("train", [*words, *(f"{s}.filelist={tmp_path/name}" for s in ("TRAIN", "VALID", "TEST"))], OPTIONS, ("TRAIN", "VALID"))[1])
    network, history = fit(on("some.txt"), **QUIET)
    assert len(history) == 4 and capsys.readouterr().err.count("broken.mp4") == 1
    result = evaluate(on("some.txt"), network, batch_size=4, progress=False)
    assert result["skipped"] == 1 and result["videos"] == 15  # the incomplete batch counts
    with pytest.raises(PvnbError, match="broken.mp4"):
        fit(on("none.txt"), **QUIET)
    with pytest.raises(PvnbError, match="none of 8 samples"):
        evaluate(on("none.txt"), network, progress=False)


def test_batch_size_may_not_change_within_an_epoch(task, data, words, tmp_path):
    class Stop(Exception):
        pass
    class Fragile:
        left = 20
        def __len__(self): return len(data)
        def set_epoch(self, epoch): data.set_epoch(epoch)
        def __getitem__(self, i):
            self.left -= 1
            if self.left < 0:
                raise Stop
            return data[i]
    with pytest.raises(RuntimeError):
        fit(task, train_data=Fragile(), save_dir=tmp_path, save_interval=1, **QUIET)
    other = get_task(run_arguments("train", [*words, "batch_size=6"], OPTIONS, ("TRAIN", "VALID"))[1])
    with pytest.raises(PvnbError, match="batches of 8, not of 6"):
        fit(other, train_data=data, resume=tmp_path, **QUIET)


def test_command_says_what_is_wrong(words, tmp_path):
    if not paddle.is_compiled_with_cuda():
        with pytest.raises(PvnbError, match="CPU build"):
            train_command([*words, "--use_gpu=True", f"--save_dir={tmp_path}"])
    with pytest.raises(PvnbError, match="log_interval"):
        train_command([*words, "--log_intervl=3"])
    with pytest.raises(PvnbError):
        train_command([*words, "num_clases=3"])
    assert list(tmp_path.iterdir()) == []


def test_both_ways_to_write_a_line_are_one():
    new = run_arguments("train", ["tsn", "log_interval=5", "TRAIN.batch_size=8", "fix_random_seed=True"], OPTIONS, ("TRAIN",))
    old = run_arguments("train", ["--model_name=TSN", "--config=./configs/tsn.yaml", "--log_interval", "5", "--batch_size=8", "--fix_random_seed=True"], OPTIONS, ("TRAIN",))
    assert new[1].TRAIN == old[1].TRAIN == {**load_config("tsn").TRAIN, "batch_size": 8}
    assert new[0].log_interval == old[0].log_interval == 5 and new[0].fix_random_seed is old[0].fix_random_seed is True


@pytest.fixture(scope="module")
def few(clips):
    "The first 24 of the clips, and the command line words for a run on them."
    path = clips.with_name("24.txt")
    path.write_text("\n".join(clips.read_text().splitlines()[:24]) + "\n")
    return ["MODEL.width=4", "TRAIN.batch_size=8", "TRAIN.total_videos=24", *(f"{s}.filelist={path}" for s in ("TRAIN", "VALID"))]


def test_both_spellings_train_the_same_weights(few, tmp_path):
    shared = [*few, "--use_gpu=False", "--seed=5", "--log_interval=1"]
    assert main(["train", "TSN", "--config", "tsn_mini", *shared, "epoch=2", f"--save_dir={tmp_path/'new'}"]) == 0
    line = [sys.executable, "-m", "paddlevideo_nb.train", "--model_name=TSN", "--config=./configs/tsn_mini.yaml", *shared, "--epoch=2", f"--save_dir={tmp_path/'old'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    for which in ("last", "best"):
        a, b = (read_weights(tmp_path/d/f"TSN_{which}.safetensors") for d in ("new", "old"))
        assert same(a, b) and any(k.startswith("optimizer.") for k in a)
    rows = list(csv.DictReader((tmp_path/"new"/"TSN_metrics.csv").open()))
    assert {"epoch", "step", "loss", "learning_rate", "clips_per_second", "valid_loss", "valid_top1", "valid_top5"} <= rows[0].keys()
    assert [int(r["step"]) for r in rows if r["loss"]] == [1, 2, 3, 4, 5, 6] and [int(r["epoch"]) for r in rows if r["valid_top1"]] == [1, 2]


@pytest.mark.parametrize("form", [1, 2, 3])
def test_command_goes_on_from_legacy_weights(form, few, tmp_path, capsys):
    paddle.seed(9)
    network = get_task(load_config("tsn_mini", MODEL={"width": 4})).network()
    names, values = original_names(network), state(network)
    old = save_legacy(tmp_path/"TSN.pdparams", {name: values[key] for key, name in names.items()}, form)
    words = [*few, "epoch=1", "learning_rate=0.0", "--log_interval=1", "--use_gpu=False", f"--resume={old}", f"--save_dir={tmp_path/'out'}"]
    assert main(["train", "TSN", "--config", "tsn_mini", *words]) == 0
    assert "training starts at epoch 0" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path/"out"/"TSN_metrics.csv").open()))
    assert (rows[0]["epoch"], rows[0]["step"]) == ("0", "1")
    after = read_weights(tmp_path/"out"/"TSN_last.safetensors")  # a rate of 0 leaves every trained weight where the file put it
    trained = [k for k, p in network.named_parameters() if p.trainable]
    assert len(trained) > 20 and all(np.array_equal(after[f"network.{k}"], values[k]) for k in trained)


def test_command_names_and_skips_a_broken_clip(few, tmp_path, capsys):
    (tmp_path/"broken.mp4").write_bytes(b"\0"*300)
    lines = Path(few[-1].partition("=")[2]).read_text().splitlines()
    (tmp_path/"some.txt").write_text("\n".join([*lines[:23], f"{tmp_path/'broken.mp4'} 0"]) + "\n")
    (tmp_path/"none.txt").write_text(f"{tmp_path/'broken.mp4'} 0\n"*8)
    def run(name):
        return main(["train", "TSN", "--config", "tsn_mini", *few, f"TRAIN.filelist={tmp_path/name}", "epoch=1", "--use_gpu=False", f"--save_dir={tmp_path/name}-out"])
    assert run("some.txt") == 0 and "broken.mp4" in capsys.readouterr().err
    assert json.loads(read_metadata(tmp_path/"some.txt-out"/"TSN_last.safetensors")["place"])["step"] == 3
    assert run("none.txt") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pvnb: error:") and "broken.mp4" in error


def test_command_answers_faults_with_one_line(few, tmp_path, capsys):
    save_weights(tmp_path/"other.safetensors", {"network.w": np.zeros(2)}, {"format": "paddlevideo_nb training checkpoint 1", "model": "STNET"})
    faults = {"--log_intervl=3": "--log_interval", f"--resume={tmp_path/'other.safetensors'}": "checkpoint of STNET, not of TSN"}
    if not paddle.device.cuda.device_count():
        faults["--use_gpu=True"] = "use_gpu=False runs on the CPU"
    for word, expected in faults.items():
        assert main(["train", "TSN", "--config", "tsn_mini", *few, word, f"--save_dir={tmp_path/'out'}"]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pvnb: error:")]
        assert len(errors) == 1 and expected in errors[0], (word, errors)
    assert not list((tmp_path/"out").glob("*.safetensors"))
