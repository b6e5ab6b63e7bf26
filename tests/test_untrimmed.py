"Untrimmed videos of the digit theatre: programmes, features of motion that is known, the folder."
import json

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.datasets.activitynet import ActivityNetDataset
from paddlevideo_nb.datasets.theatre import digit_images
from paddlevideo_nb.datasets.untrimmed import DIM, LABELS, describe, make_untrimmed, motion_features, untrimmed_video
from paddlevideo_nb.video import VideoError, read_video, write_video


def test_programme_and_film_fit_together():
    for number in range(6):
        film, segments, labels = untrimmed_video(np.random.default_rng(number), seconds=12)
        assert film.shape == (144, 64, 64, 3) and 1 <= len(segments) == len(labels) <= 3
        length = (segments[:, 1] - segments[:, 0])/12
        assert (length > .05 - 1/144 - 1e-9).all() and (length < .5 + 1/144 + 1e-9).all() and segments[0, 0] > 0 and segments[-1, 1] < 12
        assert (segments[1:, 0] > segments[:-1, 1]).all() and set(labels) <= set(range(len(LABELS)))
    with pytest.raises(PvnbError, match="at least 5"):
        untrimmed_video(np.random.default_rng(0), seconds=2)
    with pytest.raises(PvnbError, match="unknown split"):
        untrimmed_video(np.random.default_rng(0), "test")


def test_a_film_is_a_function_of_its_generator():
    one, two, other = (untrimmed_video(np.random.default_rng(s), seconds=6) for s in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(one, two, strict=True)) and (one[0] != other[0]).any()


def test_no_handwriting_in_both_parts():
    train, val = (digit_images(split)[0].reshape(-1, 64) for split in ("train", "val"))
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in val}


def blob(places, size=96):
    "A bright blob at each of `places` (x, y): uint8 [n, size, size, 3]."
    y, x = np.mgrid[:size, :size]
    return np.stack([np.repeat(np.uint8(30 + 200*np.exp(-((x - a)**2 + (y - b)**2)/80))[..., None], 3, 2) for a, b in places])


@pytest.mark.parametrize(("way", "axis", "sign"), [((2, 0), 0, 1), ((-2, 0), 0, -1), ((0, 2), 1, 1), ((0, -2), 1, -1)])
def test_features_know_the_direction_of_a_known_motion(way, axis, sign):
    whole = motion_features(blob([(48 + way[0]*t, 48 + way[1]*t) for t in range(6)]))[32:34]
    assert np.sign(whole[axis]) == sign and abs(whole[axis]) > 5*abs(whole[1 - axis])


def test_speed_is_measured_and_place_is_kept():
    slow, fast = (motion_features(blob([(24 + v*t, 24) for t in range(6)])) for v in (1, 2))
    assert 1.6 < fast[32]/slow[32] < 2.4
    right = slow[:16].reshape(4, 4)
    assert right[:2, :2].max() > 10*np.abs(right[2:, 2:]).max()  # upper left, where the blob is


def test_turning_and_growing():
    y, x = np.mgrid[:64, :64] - 31.5
    def bar(angle): return np.exp(-(x*np.sin(angle) - y*np.cos(angle))**2/20)*(np.hypot(x, y) < 24)
    def disc(r): return 1/(1 + np.exp((np.hypot(x, y) - r)/1.5))
    def film(pictures): return np.stack([np.repeat(np.uint8(30 + 200*p)[..., None], 3, 2) for p in pictures])
    clockwise, counter = (motion_features(film([bar(sign*.1*t) for t in range(6)])) for sign in (1, -1))
    grow, shrink = (motion_features(film([disc(14 + sign*t) for t in range(6)])) for sign in (1, -1))
    assert clockwise[35] > .1 and counter[35] < -.1 and grow[34] > .1 and shrink[34] < -.1
    assert abs(clockwise[34]) < .2*clockwise[35] and abs(grow[35]) < .2*grow[34]


def test_bad_frames_are_named():
    for frames in (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3))):
        with pytest.raises(PvnbError, match="expected uint8"):
            motion_features(frames)
    with pytest.raises(PvnbError, match="fewer than 2"):
        describe(np.zeros((1, 8, 8, 3), np.uint8))


def test_describe_takes_frames_and_files_at_any_rate(tmp_path):
    film, _, _ = untrimmed_video(np.random.default_rng(2), seconds=6)
    features = describe(film)
    assert features.shape == (12, DIM) and features.dtype == np.float32
    np.testing.assert_allclose(features[3], motion_features(film[18:24]), atol=1e-6)
    assert describe(film[:10]).shape == describe(iter(film[:10])).shape == (2, DIM) and describe(film[:7]).shape == (1, DIM)
    for name, frames, fps in (("same", film, 12), ("double", np.repeat(film, 2, 0), 24), ("triple", np.repeat(film, 3, 0), 36)):
        write_video(tmp_path/f"{name}.mp4", frames, fps, crf=12)
        again = describe(tmp_path/f"{name}.mp4")
        assert again.shape == features.shape and np.corrcoef(again.ravel(), features.ravel())[0, 1] > .95
    with pytest.raises(VideoError):
        describe(tmp_path/"none.mp4")


def test_folder(tmp_path):
    folder = make_untrimmed(tmp_path, sizes={"train": 3, "val": 2}, progress=False, workers=2)
    table = json.loads((folder/"annotations.json").read_text())["database"]
    assert {e["subset"] for e in table.values()} == {"training", "validation"} and len(table) == 5
    assert (folder/"labels.txt").read_text().split() == [w for i, name in enumerate(LABELS) for w in (name, str(i))]
    film = read_video(folder/"videos"/"theatre_val_0001.mp4")
    entry = table["theatre_val_0001"]
    assert len(film) == entry["duration_frame"] and abs(entry["duration"] - len(film)/12) < 1e-3
    stored, again = np.load(folder/"features"/"theatre_val_0001.npy"), describe(film)
    assert stored.shape == again.shape and np.corrcoef(stored.ravel(), again.ravel())[0, 1] > .95
    data = ActivityNetDataset(folder/"annotations.json", folder/"features", mode="train", tscale=20, feature_dim=DIM)
    assert len(data) == 3 and data.counts["cut off"] == 0 and data[0]["feature"].shape == (DIM, 20)
    before = (folder/"features"/"theatre_train_0000.npy").read_bytes()
    other = make_untrimmed(tmp_path/"other", sizes={"train": 3, "val": 2}, progress=False, workers=1)
    assert (other/"features"/"theatre_train_0000.npy").read_bytes() == before, "one thread or two: the same"


@pytest.mark.parametrize(("arguments", "words"), [({"seed": -1}, "seed"), ({"sizes": {"test": 3}}, "unknown split"), ({"sizes": {"train": 0}}, "at least 1")])
def test_bad_arguments(tmp_path, arguments, words):
    with pytest.raises(PvnbError, match=words):
        make_untrimmed(tmp_path, **arguments)


def test_an_incomplete_folder_is_not_taken_for_a_whole_one(tmp_path):
    (tmp_path/"untrimmed-v1-seed0-2-1").mkdir()
    with pytest.raises(PvnbError, match="not complete"):
        make_untrimmed(tmp_path, sizes={"train": 2, "val": 1})
