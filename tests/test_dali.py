"""DALI's reader: without DALI a clear error; with it the ordinary reader's frames."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.kinetics import KineticsDataset
from paddlevideo_nb.datasets.loader import make_loader
from paddlevideo_nb.evaluate import reader_processes
from paddlevideo_nb.tasks import get_task
from paddlevideo_nb.video import write_video

paddle = import_paddle()
HAVE = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAVE, reason="nvidia-dali-cuda120 is not installed")
SHAPE = dict(seg_num=3, seglen=2, short_size=48, target_size=40, image_mean=[.485, .456, .406], image_std=[.229, .224, .225])


def film(seed, frames=24):
    y, x = np.mgrid[:60, :80]
    return np.stack([np.stack([100 + 60*np.sin(x/17 + seed + t/4), 90 + 50*np.cos(y/13 + t/5), 110 + 40*np.sin((x + y)/23)], -1) for t in range(frames)]).clip(0, 255).astype("uint8")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for i, (name, codec) in enumerate({"a.mp4": "vp9", "b.avi": "mjpeg", "c.mp4": "vp9", "d.avi": "mjpeg"}.items()):
        write_video(folder/name, film(i), 10, codec=codec)
    (folder/"list.txt").write_text("".join(f"{folder/n} {i}\n" for i, n in enumerate(("a.mp4", "b.avi", "c.mp4", "d.avi"))))
    return folder


@pytest.mark.skipif(HAVE, reason="DALI is installed")
def test_without_dali_the_ordinary_reader_is_named(films):
    task = get_task(load_config("tsn_dist_and_dali", **{"TRAIN.filelist": str(films/"list.txt")}))
    with pytest.raises(PvnbError, match="pip install nvidia-dali-cuda120, or use_dali=False format=mp4"):
        task.dataset("train")


def test_its_configuration_starts_no_decoding_processes():
    task = get_task(load_config("tsn_dist_and_dali"))
    assert reader_processes(task, "train") == 0 and reader_processes(task, "valid") > 0  # VALID does not ask for DALI


@needs_dali
@pytest.mark.parametrize("mode", ["valid", "test"])
def test_same_clips_as_the_ordinary_reader(mode, films):
    from paddlevideo_nb.datasets.dali import DaliClips
    a, b = (next(iter(make_loader(kind(films/"list.txt", mode, "mp4", **SHAPE), 4))) for kind in (KineticsDataset, DaliClips))
    assert list(a["image"].shape) == list(b["image"].shape) == [4, 3, 6, 40, 40] and a["label"].tolist() == b["label"].tolist()
    apart = np.abs(a["image"].numpy() - b["image"].numpy()).mean((1, 2, 3, 4))
    other = np.abs(a["image"].numpy() - np.roll(b["image"].numpy(), 1, 1)).mean((1, 2, 3, 4))
    assert apart.max() < .06 and (other > 3*apart).all()  # units of a standard deviation; other frames would be farther


@needs_dali
def test_training_clips_follow_the_seed_and_the_processes(films):
    from paddlevideo_nb.datasets.dali import DaliClips
    def read(seed, epoch=0, **more):
        return [b["image"].numpy() for b in make_loader(DaliClips(films/"list.txt", "train", "pkl", **SHAPE, seed=seed), 2, shuffle=True, seed=seed, epoch=epoch, **more)]
    first, again, other = read(3), read(3), read(3, epoch=1)
    assert len(first) == 2 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))  # a batch that was handed over is not written over by the next
    assert not np.array_equal(first[0], other[0])
    halves = [make_loader(DaliClips(films/"list.txt", "train", "mp4", **SHAPE, seed=3), 1, shuffle=True, seed=3, rank=r, world=2) for r in (0, 1)]
    shared = [np.concatenate([h["image"].numpy() for h in pair]) for pair in zip(*halves, strict=True)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(first, shared, strict=True))


@needs_dali
def test_broken_files_are_skipped_and_other_codecs_named(films, tmp_path):
    from paddlevideo_nb.datasets.dali import DaliClips
    (tmp_path/"broken.mp4").write_bytes(b"\0"*300)
    write_video(tmp_path/"h.mp4", film(0), 10)
    (tmp_path/"list.txt").write_text(f"{films/'a.mp4'} 0\n{tmp_path/'broken.mp4'} 1\n")
    batch = next(iter(make_loader(DaliClips(tmp_path/"list.txt", "valid", "mp4", **SHAPE), 2)))
    assert len(batch["image"]) == 1 and "broken.mp4" in batch["skipped"][0]
    if paddle.get_device() == "cpu":
        (tmp_path/"list.txt").write_text(f"{tmp_path/'h.mp4'} 0\n")
        with pytest.raises(PvnbError, match="h.mp4 is h264.*use_dali=False"):
            next(iter(make_loader(DaliClips(tmp_path/"list.txt", "valid", "mp4", **SHAPE), 1)))


@needs_dali
def test_the_published_configuration_trains(films, tmp_path):
    lists = [f"{s}.filelist={films/'list.txt'}" for s in ("TRAIN", "VALID", "TEST")]
    words = ["TSN", "--config", "tsn_dist_and_dali", "num_layers=50", "width=4", "short_size=48", "target_size=40", "VALID.format=mp4", *lists, "--use_gpu=False"]
    assert main(["train", *words, "batch_size=2", "epoch=1", "--valid_interval=0", f"--save_dir={tmp_path}"]) == 0
    assert main(["eval", *words, "--batch_size=3", f"--weights={tmp_path/'TSN_last.safetensors'}", f"--save_dir={tmp_path}"]) == 0
    assert Path(tmp_path/"TSN_metrics.json").is_file()
