"I3D and EfficientNet-Lite0 through the commands: real clips in every container, upright and uneven, and their features."
import json

import h5py
import numpy as np
import pytest

from helpers import real_weights
from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.predict import read_windows
from paddlevideo_nb.tasks import create_model, get_task, list_models
from paddlevideo_nb.video import Video, write_video

paddle = import_paddle()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film")/"noise.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (70, 48, 64, 3)).astype("uint8"), 25)
    return path


def test_windows_share_frames(film, monkeypatch):
    video, plan = Video(film), [np.arange(s, s + 20) for s in range(0, 50, 5)]
    decoded, frames = [], Video.frames
    monkeypatch.setattr(Video, "frames", lambda self, numbers: ((decoded.append(n) or n, f) for n, f in frames(self, numbers)))
    whole = video.read(np.arange(70))
    decoded.clear()
    for numbers, window in zip(plan, read_windows(video, plan), strict=True): assert (window == whole[numbers]).all()
    assert decoded == list(range(65))  # each once
    repeated = [np.array([3, 3, 1]), np.array([69, 2])]
    assert [w.shape[0] for w in read_windows(video, repeated, lambda f: f[::2])] == [3, 2]


def test_known_by_name():
    assert {"I3D", "EfficientNetLite0"} <= set(list_models())
    with pytest.raises(PvnbError, match="no imagenet weights for I3D"): create_model("i3d", weights="imagenet")
    network = create_model("efficientnetlite0")
    with paddle.no_grad():
        assert network(paddle.zeros([1, 3, 2, 32, 32])).shape == network(paddle.zeros([1, 3, 32, 32])).shape == [1, 1000]


def test_windows_of_snippets():
    task = get_task("i3d")
    for first, last, n in ((0, 7, 300), (296, 299, 300), (0, 4, 5), (100, 163, 300)):
        numbers = task.snippet(first, last, n)
        assert len(numbers) == 64 and numbers.min() >= 0 and numbers.max() < n and (np.diff(numbers) >= 0).all()
        assert set(range(first, last + 1)) <= set(numbers.tolist())


# ---- with the real weights


def frames_of(repo, name, first, last):
    path = repo.parent/"shared"/"data"/"clips"/name
    if not path.is_file(): pytest.skip("no real clips beside this checkout: they may not be passed on")
    return Video(path).read(np.arange(first, last))


def portrait(repo, folder):
    write_video(folder/"a.webm", frames_of(repo, "cleaning_pool.mp4", 60, 124)[:, :, 80:260], 30, codec="vp9")
    return folder/"a.webm", "cleaning pool"


def uneven(repo, folder):
    frames = frames_of(repo, "archery.avi", 30, 110)
    write_video(folder/"a.mp4", frames, 25, times=np.cumsum(np.random.default_rng(0).choice([.03, .05], len(frames))))
    return folder/"a.mp4", "archery"


@pytest.mark.parametrize("kind", [portrait, uneven])
def test_any_film(repo, tmp_path, kind):
    real_weights("i3d")
    film, action = kind(repo, tmp_path)
    assert main(["predict", "I3D", f"--video_path={film}", "num_test_clips=1", f"--save_dir={tmp_path}", "--infer_topk=3"]) == 0
    (found,) = json.loads((tmp_path/"I3D_predictions.json").read_text())
    assert found["top"][0]["name"] == action and found["top"][0]["score"] >= .9 and len(found["frames"]) == 64


def test_features_of_frames(repo, tmp_path):
    real_weights("efficientnet_lite0")
    write_video(tmp_path/"a.mkv", frames_of(repo, "archery.avi", 30, 110), 25)
    assert main(["extract", "EfficientNetLite0", str(tmp_path/"a.mkv"), "--stride", "20", "--out", str(tmp_path/"f.h5")]) == 0
    with h5py.File(tmp_path/"f.h5") as file:
        features, start = file["a/features"][:], file["a/start"][:]
    assert features.shape == (4, 1280) and np.allclose(start, np.arange(4)*.8)
    network, task = create_model("EfficientNetLite0", weights="imagenet"), get_task("efficientnet_lite0")
    with paddle.no_grad(): middle = network.features(paddle.to_tensor(task.prepare(Video(tmp_path/"a.mkv").read(task.snippet(0, 19, 80)))[0][None])).numpy()
    np.testing.assert_allclose(features[0], middle[0], rtol=1e-3, atol=1e-4)
