"Localizers: the pieces against plain counterparts, learnt from a small data set of two classes, kept, loaded, and asked by the command."
import json

import numpy as np
import pytest

from paddlevideo_nb import localizers
from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError, write_json, write_text
from paddlevideo_nb.localizers import (SegmentClassifier, best_threshold, calibrated, condensed, fit_calibration, gaps, learn_localizer, load_localizer, localize_learned, pooled_rows, right_rows,
                                       save_localizer, shown_rows, summary_rows)
from paddlevideo_nb.video import write_video

CLASSES = ("pour", "stir")


def test_pooled_rows_is_an_integral():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 3))
    fine = rows.repeat(1000, 0)  # a thousand points to a row
    for a, b in rng.uniform(0, 1, (20, 2)):
        a, b = sorted((a, b))
        want = fine[int(round(a*10000)):int(round(b*10000))]
        found, = summary_rows(rows, [[a, b]])
        np.testing.assert_allclose(found, [*want.mean(0), *want.std(0)], atol=.02)
    assert pooled_rows(rows, np.zeros((0, 2))).shape == (0, 3)
    assert np.isfinite(summary_rows(rows, [[.5, .5], [1, 1], [-1, 2]])).all()
    np.testing.assert_allclose(pooled_rows(rows, [[-1, 2]])[0]*3, rows.mean(0), atol=1e-12)  # what lies outside of the film counts as nothing


def test_condensed_and_gaps():
    rows = np.arange(12.0)[:, None].astype(np.float32)
    assert condensed(rows, 8) is rows
    np.testing.assert_allclose(condensed(rows, 4)[:, 0], [1, 4, 7, 10], atol=1e-6)
    np.testing.assert_allclose(gaps([[.5, .6], [.1, .2], [.55, .9]]), [[0, .1], [.2, .5], [.9, 1]])
    assert gaps([[0, 1]]).shape == (0, 2) and gaps(np.zeros((0, 2))).tolist() == [[0, 1]]


def film(rng, count=60):
    "Rows `[count, 8]` of a film, its segments (shares) and their names: each class is loud in its own two numbers."
    rows, segments, names = rng.normal(0, .3, (count, 8)).astype(np.float32), [], []
    for at in (0, count//2):
        a = at + rng.integers(2, 10)
        b = a + rng.integers(8, 18)
        k = int(rng.integers(2))
        rows[a:b, 2*k:2*k + 2] += 2
        segments.append((a/count, b/count))
        names.append(CLASSES[k])
    return rows, (np.array(segments), names)


def test_classifier_names_segments():
    rng = np.random.default_rng(0)
    model = SegmentClassifier.learn([film(rng) for _ in range(12)], CLASSES)
    for _ in range(10):
        rows, (segments, names) = film(rng)
        p = model(rows, segments)
        assert [CLASSES[k] for k in p.argmax(1)] == names and (p.max(1) > .5).all() and (p.sum(1) <= 1 + 1e-9).all()
        assert (model(rows, gaps(segments)).sum(1) < .5).mean() > .5  # background


@pytest.mark.parametrize("named", [("pour",), ("pour", "stir")])
def test_classifier_with_few_classes(named):
    "One class or two, films that are one segment from end to end: no background to learn from."
    rng = np.random.default_rng(1)
    films = [(rng.normal(i % len(named), .1, (20, 4)), (np.array([[0, 1.0]]), [named[i % len(named)]])) for i in range(6)]
    p = SegmentClassifier.learn(films, CLASSES)(films[0][0], [[0, 1]])
    assert p.shape == (1, 2) and np.isfinite(p).all() and p[0, 0] > .5 and (len(named) == 2 or p[0, 1] < 1e-9)


def test_classifier_without_segments():
    with pytest.raises(PvnbError, match="no training video has a segment"): SegmentClassifier.learn([(np.zeros((5, 2)), (np.zeros((0, 2)), []))], CLASSES)


def row(a, b, score, label="x"): return {"segment": [a, b], "score": score, "label": label}


def test_what_is_shown():
    rows = [row(0, 10, .9), row(1, 10, .8), row(20, 30, .7), row(22, 24, .65), row(28, 40, .6), row(50, 50, .6), row(60, 70, .2)]
    assert [r["segment"] for r in shown_rows(rows, .5)] == [[0, 10], [20, 30], [28, 40]]
    assert len(shown_rows(rows, .1)) == 4 and shown_rows(rows, .95) == [] and shown_rows([], .5) == []


def test_each_annotation_is_found_once():
    truth = [row(0, 10, 1), row(20, 30, 1, "y")]
    assert right_rows([row(0, 9, .9), row(0, 10, .8), row(20, 30, .7), row(21, 30, .6, "y")], truth).tolist() == [True, False, False, True]


def test_calibration():
    rng = np.random.default_rng(0)
    s = rng.uniform(.01, .5, 4000)
    right = rng.uniform(size=4000) < np.sqrt(s)  # right more often than the score says
    after = calibrated(s, *fit_calibration(s, right))
    assert abs(after.mean() - right.mean()) < .02 < abs(s.mean() - right.mean())
    assert (np.argsort(s) == np.argsort(after)).all() and np.allclose(calibrated(s, 1, 0), s)
    assert fit_calibration(s, np.ones(4000, bool)) == (1, 0) and fit_calibration(s, s < .2) == (1, 0)


def test_threshold_with_the_best_f1():
    truth = {f"f{i}": [row(0, 10, 1)] for i in range(20)}
    rows = {name: [row(0, 10, .6 + .01*i), row(20, 30, .3)] for i, name in enumerate(truth)}
    level, f1 = best_threshold(rows, truth)
    assert .3 < level <= .6 and f1 == 1
    assert best_threshold({n: [] for n in truth}, truth)[1] == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A data set in the ActivityNet form: 40 films of a minute, 8 numbers a second, two classes."
    folder, rng, database = tmp_path_factory.mktemp("data"), np.random.default_rng(3), {}
    (folder/"features").mkdir()
    for i in range(40):
        rows, (segments, names) = film(rng)
        np.save(folder/"features"/f"f{i}.npy", rows)
        database[f"f{i}"] = {"duration": 60.0, "subset": "validation" if i % 4 == 0 else "training", "annotations": [{"segment": (60*s).tolist(), "label": n} for s, n in zip(segments, names, strict=True)]}
    write_json(folder/"annotations.json", {"version": "VERSION 1.3", "taxonomy": [], "database": database})
    write_text(folder/"labels.txt", "pour 0\nstir 1\n")
    write_json(folder/"about.json", {"features": "motion"})
    return folder


@pytest.fixture(scope="module", params=["BMN", "BSN"])
def learnt(request, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localizers, "SIZES", {"train": 60})  # fewer passes than a real data set of this size is given
        return learn_localizer(data, request.param, progress=False)


def test_two_classes_are_learnt(learnt, data):
    assert learnt.labels == list(CLASSES) and learnt.about["training_films"] == 30 and learnt.about["films"] == 10
    assert learnt.about["map50"] > .5
    rng = np.random.default_rng(99)
    hits = 0
    for _ in range(10):
        rows, (segments, names) = film(rng)
        found, curves = learnt.find({"features": rows, "duration": 60.0})
        truth = [row(*(60*s), 1, n) for s, n in zip(segments, names, strict=True)]
        hits += right_rows(shown_rows(found, learnt.threshold), truth).sum()
        assert all(0 <= r["score"] <= 1 and 0 <= r["segment"][0] <= r["segment"][1] <= 60 for r in found) and {"start", "end"} <= set(curves)
    assert hits >= 12  # of 20


def test_kept_and_loaded(learnt, tmp_path):
    folder = save_localizer(learnt, tmp_path/"kept")
    again = load_localizer(folder)
    rows = film(np.random.default_rng(7))[0]
    for one, two in zip(learnt.find({"features": rows, "duration": 10})[0], again.find({"features": rows, "duration": 10})[0], strict=True):
        assert one["label"] == two["label"] and one["score"] == pytest.approx(two["score"], abs=1e-6)
    with pytest.raises(PvnbError, match="exists; name a new folder"): save_localizer(learnt, folder)
    with pytest.raises(PvnbError, match=r"shape \[60, 9\], expected \[S, 8\]"): again.find({"features": np.zeros((60, 9)), "duration": 1})
    about = json.loads((folder/"about.json").read_text())
    write_json(folder/"about.json", {k: v for k, v in about.items() if k != "labels"})
    with pytest.raises(PvnbError, match="no key 'labels'"): load_localizer(folder)


def test_features_of_another_width_are_refused(learnt, tmp_path):
    "A localizer of 8 numbers a row says so when the film gives 44, and writes nothing."
    write_video(tmp_path/"film.mp4", np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8), 12)
    with pytest.raises(PvnbError, match=r"44\], expected \[S, 8\] as this localizer was trained on motion"): localize_learned(tmp_path/"film.mp4", tmp_path/"out", learnt, progress=False)
    assert not list((tmp_path/"out").glob("*.json"))


def test_data_sets_that_teach_nothing(data, tmp_path):
    whole = json.loads((data/"annotations.json").read_text())
    for change, message in ((lambda v: {**v, "annotations": []}, "no training video has a segment"), (lambda v: {**v, "subset": "validation"}, "training")):
        write_json(tmp_path/"annotations.json", {**whole, "database": {k: change(v) for k, v in whole["database"].items()}})
        if not (tmp_path/"features").exists(): (tmp_path/"features").symlink_to(data/"features")
        with pytest.raises(PvnbError, match=message): learn_localizer(tmp_path, progress=False)
    with pytest.raises(PvnbError, match="proposals is 'TAG', expected BMN or BSN"): learn_localizer(data, "TAG")


@pytest.mark.parametrize("words, message", [
    ([], "which video"), (["nowhere.mp4"], "nowhere.mp4"), (["VIDEO", "--threshold", "2"], "threshold is 2.0, expected 0 to 1"), (["VIDEO", "--classifier", "TSM"], "--classifier goes with --proposals"),
    (["VIDEO", "--proposals", "BMN", "--learn", "x"], "--learn needs --localizer"), (["VIDEO", "VIDEO"], "shares its name"), (["VIDEO", "--proposals", "BMN", "--localizer", "nowhere"], "nowhere"),
])
def test_words_of_the_command(words, message, tmp_path, capsys):
    write_video(tmp_path/"film.mp4", np.zeros((24, 64, 64, 3), np.uint8), 12)
    assert main(["localize", *(str(tmp_path/"film.mp4") if w == "VIDEO" else w for w in words), *(() if "--out" in words else ("--out", str(tmp_path/"out")))]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path/"out").exists()


def test_a_classifier_of_clips_must_look_at_clips():
    with pytest.raises(PvnbError, match="BMN does not classify clips"): localizers.clip_classifier("BMN")
