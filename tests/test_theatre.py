"The digit theatre: no leak between splits or within pairs, deterministic, whole or nothing."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import paddlevideo_nb.datasets.theatre as T
from paddlevideo_nb.core import PvnbError, _make_folder, make_folder
from paddlevideo_nb.datasets.theatre import (
    ACTIONS, action_clip, digit_images, load_clips, load_cues, make_clips, mini_command, moment_clip, read_list, reverse_of,
)
from paddlevideo_nb.video import VideoError, probe

FEW = {"jumps": (4, 2), "orders": (4, 2), "repeats": (4, 2)}
SMALL = {"actions": (20, 10), "moments": (20, 10), **FEW}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("mini"), seed=3, workers=1, sizes=SMALL, progress=False)


def leftovers(root):
    return [p.name for p in Path(root).iterdir() if p.name.endswith(".part")]


def test_no_digit_is_in_both_splits():
    (a, la), (b, lb) = digit_images("train"), digit_images("val")
    assert len(a) + len(b) == len(la) + len(lb) == 1797 and a.min() == 0 and a.max() == 1
    assert not {x.tobytes() for x in a} & {x.tobytes() for x in b}
    assert min(np.bincount(lb, minlength=10)) > 30


@pytest.mark.parametrize("label", range(10))
def test_the_partner_is_the_film_backwards(label):
    a = action_clip(label, np.random.default_rng(9), "val")
    assert a.shape == (36, 64, 64, 3) and a.dtype == np.uint8
    assert (a == action_clip(ACTIONS[reverse_of(label)], np.random.default_rng(9), "val")[::-1]).all()
    assert np.abs(np.diff(a.astype(int), axis=0)).mean() > .1, "nothing moves"
    assert {ACTIONS[label], ACTIONS[label ^ 1]} in map(set, zip(ACTIONS[::2], ACTIONS[1::2], strict=True))


def test_names_say_what_is_seen():
    "Centre of ink, angle, size and brightness change as the class name says, over a step without a jump."
    def ink(film):
        film = film.astype(float).sum(-1)
        return np.clip(film - np.percentile(film, 85, axis=(1, 2), keepdims=True), 0, None)

    def median_step(action, measure):
        steps = [np.diff(measure(ink(action_clip(action, np.random.default_rng(seed))))) for seed in range(8)]
        return np.median(np.concatenate(steps))

    y, x = np.mgrid[:64, :64]
    across = lambda m: (m * x).sum((1, 2)) / m.sum((1, 2))  # noqa: E731
    down = lambda m: (m * y).sum((1, 2)) / m.sum((1, 2))  # noqa: E731
    mass = lambda m: m.sum((1, 2))  # noqa: E731
    assert median_step("left", across) < 0 < median_step("right", across)
    assert median_step("up", down) < 0 < median_step("down", down)
    assert median_step("shrink", mass) < 0 < median_step("grow", mass)
    assert median_step("disappear", mass) < 0 < median_step("appear", mass)


def test_clockwise_is_clockwise():
    image = np.zeros((8, 8), dtype=np.float32)
    image[:4, 3:5] = 1  # a hand that points up
    mask = T._mask(T._glyph(image), 32, 32, 32, np.pi / 2)
    assert mask[32, 44] > 200 > mask[20, 32], "turned clockwise by a quarter, it points right"


def test_every_place_in_a_film_has_the_same_distribution():
    "Ink in frame 0, 17 and 35 of `grow` over many films: a naive action would grow from first to last."
    rng = np.random.default_rng(0)
    phases = np.array([T._poses("grow", rng)[2] for _ in range(4000)])
    for t in (17, 35):
        a, b = np.sort(phases[:, 0]), np.sort(phases[:, t])
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 4000
        assert distance < 1.95 * np.sqrt(2 / 4000)


def test_moments_hold_the_digit_for_a_third_that_starts_anywhere():
    firsts = []
    for seed in range(150):
        film, first, last = moment_clip(seed % 10, np.random.default_rng(seed))
        firsts.append(first)
        assert film.shape == (36, 64, 64, 3) and last - first == 11 and 0 <= first <= 24
        jumps = np.abs(np.diff(film.astype(int), axis=0)).mean((1, 2, 3))
        cuts = [t for t in (first - 1, last) if 0 <= t < 35]
        others = np.delete(jumps, cuts)
        assert not cuts or min(jumps[cuts]) > others.max(), "the scene changes at the ends of the cue and nowhere else"
    assert min(firsts) <= 1 and max(firsts) >= 23 and 10 < np.mean(firsts) < 14


def test_clutter_keeps_the_ink_and_loses_the_digit():
    image = digit_images("train")[0][0]
    shuffled = T._clutter(image, np.random.default_rng(0))
    assert sorted(shuffled.ravel()) == sorted(image.ravel()) and not (shuffled == image).all()


def test_the_files(clips):
    for name, columns in (("actions", 2), ("moments", 2)):
        labels = (clips / name / "labels.txt").read_text().splitlines()
        assert [line.split()[1] for line in labels] == [str(i) for i in range(10)]
        for split, count in zip(("train", "val"), SMALL[name], strict=True):
            rows = read_list(clips / name / f"{split}.txt")
            assert len(rows) == count and all(p.is_file() for p, _ in rows)
            assert set(np.bincount([label for _, label in rows])) == {count // 10}
            assert all(len(line.split(" ")) == columns and not line.startswith("/") for line in (clips / name / f"{split}.txt").read_text().splitlines())
    info = probe(read_list(clips / "moments" / "val.txt")[0][0])
    assert (info.frames, info.fps, info.width, info.height, info.codec) == (36, 12, 64, 64, "h264")
    cues = load_cues(clips)
    assert len(cues) == 30 and len(load_cues(clips, "val")) == 10
    assert all((clips / "moments" / file).is_file() and 0 <= first and last == first + 11 < 36 for file, (_, first, last) in cues.items())


def test_decoded_twins_are_exact_and_clips_are_what_was_drawn(clips):
    x, y = load_clips(clips, "actions", "train", progress=False)
    order = {label: x[y == label] for label in range(10)}
    for label in range(0, 10, 2):
        assert (order[label] == order[label + 1][:, ::-1]).all()
    drawn = action_clip(0, T._rng(3, "actions", "train", 0, 0), "train")
    assert np.abs(order[0][0].astype(int) - drawn).mean() < 3


def test_a_second_call_writes_nothing(clips):
    before = {p: p.stat().st_mtime_ns for p in clips.rglob("*")}
    start = time.time()
    assert make_clips(clips.parent, seed=3, sizes=SMALL) == clips
    assert time.time() - start < .2 and before == {p: p.stat().st_mtime_ns for p in clips.rglob("*")}


def test_workers_and_order_do_not_matter_and_the_seed_does(clips, tmp_path):
    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    same = make_clips(tmp_path, seed=3, workers=3, sizes=SMALL, progress=False)
    other = make_clips(tmp_path, seed=4, workers=1, sizes=SMALL, progress=False)
    assert same.name == clips.name != other.name
    assert content(same) == content(clips) and content(same) != content(other)


def test_fewer_classes(tmp_path):
    folder = make_clips(tmp_path, workers=1, sizes={"actions": (10, 10), "moments": (6, 3), **FEW}, classes=3, progress=False)
    assert {label for _, label in read_list(folder / "moments" / "train.txt")} == {0, 1, 2}
    assert len((folder / "moments" / "labels.txt").read_text().splitlines()) == 3
    assert T.contact_sheet(folder).axes


def test_an_interrupted_run_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(T, "_write_lists", stop)
        with pytest.raises(KeyboardInterrupt):
            make_clips(tmp_path, workers=2, sizes=SMALL, progress=False)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert (make_clips(tmp_path, workers=1, sizes=SMALL, progress=False) / "about.json").is_file()


CALL = "from paddlevideo_nb.datasets.theatre import make_clips; print(make_clips({root!r}, workers=1, sizes={sizes!r}, progress=False))"


def start_process(root, sizes):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", CALL.format(root=str(root), sizes=sizes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_a_killed_run_leaves_no_half_set(tmp_path):
    process = start_process(tmp_path, {"actions": (400, 10), "moments": (20, 10), **FEW})
    deadline = time.time() + 60
    while not list(tmp_path.glob(".*.part/actions/train/*.mp4")) and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(tmp_path) and not list(tmp_path.glob("clips*"))
    make_folder(tmp_path / leftovers(tmp_path)[0].split(".")[1], lambda part: None, {})
    assert not leftovers(tmp_path) and len(list(tmp_path.glob("clips*/about.json"))) == 1


def test_two_processes_at_the_same_time_make_one_set(tmp_path):
    processes = [start_process(tmp_path, SMALL) for _ in range(2)]
    results = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and not leftovers(tmp_path)
    x, _ = load_clips(results[0][0].strip(), "moments", "val", progress=False)
    assert len(x) == 10


def test_without_a_lock_the_slower_of_two_gives_way(clips, tmp_path):
    make_clips(tmp_path, seed=3, workers=1, sizes=SMALL, progress=False)
    settings = (1, False, 3, SMALL, 10)
    _make_folder(tmp_path / clips.name, False, lambda part: T._write_all(part, *settings), {})  # as a process without the lock would
    assert not leftovers(tmp_path) and (tmp_path / clips.name / "about.json").is_file()


def test_a_worker_that_fails_is_said_in_one_line(tmp_path):
    with pytest.raises(PvnbError, match="writing the digit theatre failed: ValueError") as error:
        list(T._films_by_processes(2, tmp_path, 0, {"actions": (10,), "moments": (10, 10)}, 10))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, what", [
    (lambda root: digit_images("test"), "'test'"), (lambda root: reverse_of(10), "10"), (lambda root: action_clip("jump", None), "'jump'"),
    (lambda root: moment_clip(10, np.random.default_rng(0)), "10"), (lambda root: make_clips(root, seed=-1), "-1"),
    (lambda root: make_clips(root, classes=1), "classes is 1"), (lambda root: make_clips(root, sizes={"action": (10, 10)}), "'action'"),
    (lambda root: make_clips(root, sizes={"actions": (11, 10)}), "11"), (lambda root: make_clips(root, sizes={"moments": (10, 0)}), "0"),
    (lambda root: load_clips(root, "actions", "test"), "actions/test"), (lambda root: load_clips(root, "actions", "val"), "val.txt"),
])
def test_bad_input_is_said_in_one_line(call, what, tmp_path):
    with pytest.raises(PvnbError) as error:
        call(tmp_path)
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "clips-v2-seed0" / "mine").mkdir(parents=True)
    with pytest.raises(PvnbError, match="move it away"):
        make_clips(tmp_path)
    assert (tmp_path / "clips-v2-seed0" / "mine").is_dir()


def test_a_bad_line_and_a_damaged_clip_are_named(tmp_path):
    (tmp_path / "actions").mkdir()
    (tmp_path / "actions" / "val.txt").write_text("a.mp4 0\nb.mp4\n")
    with pytest.raises(PvnbError, match="line 2"):
        load_clips(tmp_path, "actions", "val", progress=False)
    (tmp_path / "actions" / "val.txt").write_text("a.mp4 0\n")
    (tmp_path / "actions" / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(VideoError, match="a.mp4"):
        load_clips(tmp_path, "actions", "val", progress=False)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(T, "SIZES", SMALL)
    assert mini_command(["--root", str(tmp_path), "--seed", "5", "--workers", "1", "--sheet", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "clips-v2-seed5" in out and "20 clips for training, 10 for validation, 10 classes" in out
    assert 5_000 < (tmp_path / "sheet.png").stat().st_size <= 150_000
