"The reader of the Non-local paper: views, lists, faults, reproducibility; and its lists from a Kinetics csv."
import cv2
import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError, golden_dir
from paddlevideo_nb.datasets import views as module
from paddlevideo_nb.datasets.kinetics import kinetics_command, read_list, write_nonlocal_lists
from paddlevideo_nb.datasets.loader import Skipped, make_loader
from paddlevideo_nb.datasets.views import (ViewsDataset, crop_normalised, list_views, random_frames, random_offsets, read_view_list, resize_short,
                                           spatial_offsets, view_frames)
from paddlevideo_nb.video import VideoError, read_video, write_video

TINY = dict(video_length=4, sample_rate=3, crop_size=32)
SHAPES = ((50, 48, 80), (17, 80, 48), (6, 40, 40))  # frames, height, width


def film(k=0, n=20, h=48, w=64):
    y, x = np.mgrid[:h, :w]
    return [np.stack([(2 * x + 3 * i + 40 * k) % 256, (3 * y + i) % 256, np.full_like(x, (5 * i + 60 * k) % 256)], -1).astype(np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Three films and two lists of them: `path label`, and the original's test list with its list of labels."
    folder = tmp_path_factory.mktemp("films")
    for k, (n, h, w) in enumerate(SHAPES):
        write_video(folder/"a class"/f"film {k}.mp4", film(k, n, h, w))
    (folder/"val.list").write_text("".join(f"a class/film {k}.mp4 {5 - k}\n" for k in range(3)))
    (folder/"test.list").write_text("".join(f"a class/film {k}.mp4 {k} {i} {j}\n" for k in range(3) for i in range(10) for j in range(3)))
    return folder


def original_numbers(frames, view, rate, length):
    "The frame numbers of the original, one by one."
    start = int(float(frames) / float(10) * view) % frames
    return [(start + k * rate) % frames for k in range(length)]


@pytest.mark.parametrize("n", [1, 7, 57, 250, 299, 1001])
def test_frames_of_test_views(n):
    for i in range(10):
        for rate, length in ((8, 8), (2, 32), (1, 5)):
            assert view_frames(n, i, 10, rate, length).tolist() == original_numbers(n, i, rate, length)
    with pytest.raises(PvnbError, match="0 frames"):
        view_frames(0, 0, 10, 8, 8)


def test_random_frames_stay_within_a_film_that_is_long_enough():
    rng = np.random.default_rng(0)
    drawn = [random_frames(36, 4, 8, rng) for _ in range(300)]
    assert all((np.diff(d) == 4).all() for d in drawn) and {int(d[0]) for d in drawn} == {0, 1, 2, 3, 4}
    assert random_frames(32, 4, 8, rng).tolist() == list(range(0, 32, 4))
    assert random_frames(10, 4, 8, rng).tolist() == [0, 4, 8, 2, 6, 0, 4, 8]


def test_resize_keeps_the_aspect_and_equals_opencv():
    x = np.random.default_rng(0).integers(0, 256, (2, 50, 90, 3), np.uint8)
    assert np.array_equal(resize_short(x, 40)[1], cv2.resize(x[1], (72, 40)))
    assert resize_short(x.transpose(0, 2, 1, 3), 33).shape == (2, 59, 33, 3)


@pytest.mark.parametrize("height,width,size,places", [
    (256, 340, 256, [(0, 0), (0, 42), (0, 84)]), (455, 256, 256, [(0, 0), (99, 0), (198, 0)]), (300, 400, 256, [(0, 72), (22, 72), (44, 72)]),
    (257, 340, 256, [(0, 0), (0, 42), (0, 84)]), (256, 256, 256, [(0, 0)] * 3)])
def test_spatial_views(height, width, size, places):
    assert [spatial_offsets(height, width, size, p) for p in range(6)] == places * 2
    rng = np.random.default_rng(0)
    drawn = {random_offsets(34, 32, 32, rng) for _ in range(100)}
    assert drawn == {(0, 0), (1, 0), (2, 0)}
    for small in ((255, 400), (400, 255)):
        with pytest.raises(PvnbError, match="smaller than the crop of 256x256"):
            spatial_offsets(*small, 256)


def test_every_view_by_hand(films):
    "Each of the 30 views of each film, against a plain transcription of the rules."
    data = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), num_classes=6, **TINY)
    assert len(data) == 90
    for k, (n, h, w) in enumerate(SHAPES):
        whole = read_video(films/"a class"/f"film {k}.mp4")
        shape = (round(h * 32 / min(h, w)), round(w * 32 / min(h, w)))
        for i in range(10):
            clip = np.stack([cv2.resize(whole[f], shape[::-1]) for f in original_numbers(n, i, 3, 4)]).transpose(3, 0, 1, 2)
            for p in range(3):
                top, left = ((shape[0] - 32) // 2 * p, 0) if shape[0] > 33 else (0, (shape[1] - 32) // 2 * p)
                sample = data[k * 30 + i * 3 + p]
                assert np.array_equal(sample["image"], (clip[:, :, top:top + 32, left:left + 32].astype(np.float32) - 114.75) / 57.375)
                assert {key: v.tolist() for key, v in sample.items() if key != "image"} == {"label": [5 - k], "video": [k], "view": [i * 3 + p]}
                assert sample["image"].dtype == np.float32 and sample["label"].dtype == sample["video"].dtype == sample["view"].dtype == np.int64


def test_mirrored_and_central_views(films):
    six = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), num_test_clips=30, use_multi_crop=2, **TINY)
    one = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), num_test_clips=5, use_multi_crop=0, **TINY)
    assert len(six) == 90 and len(one) == 15 and six.temporal_views == 5
    for k in range(3):
        for i in range(5):
            images = [six[k * 30 + i * 6 + p]["image"] for p in range(6)]
            assert all(np.array_equal(images[p][..., ::-1], images[p + 3]) for p in range(3))
            assert np.array_equal(one[k * 5 + i]["image"], images[1])
    for clips, crops, words in ((31, 1, "multiple of 3"), (3, 2, "multiple of 6"), (30, 3, "use_multi_crop is 3"), (0, 0, "num_test_clips is 0")):
        with pytest.raises(PvnbError, match=words):
            list_views(clips, crops)


def test_indices(films):
    data = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), **TINY)
    assert data[-1]["view"].tolist() == [29] and data[-1]["video"].tolist() == [2]
    with pytest.raises(IndexError):
        data[90]


def test_a_moment_is_decoded_once(films, monkeypatch):
    read, opened = [], []

    class Watched(module.Video):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

        def read(self, numbers):
            read.append(len(numbers))
            return super().read(numbers)
    monkeypatch.setattr(module, "Video", Watched)
    data = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), **TINY)
    for i in range(len(data)):
        data[i]
    assert len(opened) == 3 and read == [4] * 30
    assert data.kept[1].shape[0] == 4, "only the last view is kept"


def test_training_and_validation(films):
    train = ViewsDataset(films/"val.list", "train", jitter_scales=(36, 44), **TINY)
    valid = ViewsDataset(films/"val.list", "valid", jitter_scales=(36, 44), **TINY)
    assert len(train) == len(valid) == 3 and train[1]["image"].shape == (3, 4, 32, 32) and train[1]["label"].tolist() == [4]

    def images(data, epoch):
        data.set_epoch(epoch)
        return np.stack([data[i]["image"] for i in range(3)])
    assert np.array_equal(images(train, 0), images(train, 0)) and not np.array_equal(images(train, 0), images(train, 1))
    assert np.array_equal(images(valid, 0), images(valid, 5)), "validation is repeatable"
    other = ViewsDataset(films/"val.list", "valid", jitter_scales=(36, 44), seed=1, **TINY)
    assert not np.array_equal(images(valid, 0), images(other, 0))


def test_mirroring_only_where_it_may_be(films):
    "At full size there is one place for the crop, so a sample is the picture or its mirror image."
    (films/"square.list").write_text("a class/film 2.mp4 0\n")
    options = dict(video_length=6, sample_rate=1, crop_size=40, jitter_scales=(40, 40))

    def kinds(mode, **kw):
        data, found = ViewsDataset(films/"square.list", mode, **options, **kw), set()
        upright = crop_normalised(read_video(films/"a class"/"film 2.mp4"), 0, 0, 40, False, 114.75, 57.375)
        for epoch in range(20):
            data.set_epoch(epoch)
            image = data[0]["image"]
            assert np.array_equal(image, upright) or np.array_equal(image, upright[..., ::-1])
            found.add(bool(np.array_equal(image, upright)))
        return found
    assert kinds("train") == {True, False} and kinds("train", flip=False) == kinds("valid") == {True}


def test_short_side_is_drawn_below_the_upper_scale(films, monkeypatch):
    sides = set()

    def noted(frames, size):
        sides.add(size)
        return resize_short(frames, size)
    monkeypatch.setattr(module, "resize_short", noted)
    data = ViewsDataset(films/"val.list", "train", jitter_scales=(36, 39), **TINY)
    for epoch in range(20):
        data.set_epoch(epoch)
        for i in range(3):
            data[i]
    assert sides == {36, 37, 38}


@pytest.mark.parametrize("mode", ["train", "valid", "test"])
def test_same_samples_with_workers_and_cache(films, mode):
    def everything(workers=0, **kw):
        data = ViewsDataset(films/"val.list", mode, jitter_scales=(36, 44), num_test_clips=6, seed=3, **TINY, **kw)
        batches = list(make_loader(data, 4, shuffle=mode == "train", epoch=2, workers=workers))
        return [np.concatenate([b[k].numpy() for b in batches]) for k in ("image", "label", "video", "view")]
    here = everything()
    for other in (everything(workers=2), everything(cache=True)):
        assert all(np.array_equal(a, b) for a, b in zip(here, other, strict=True))


def test_lists(films, tmp_path):
    expected = [(f"a class/film {k}.mp4", 5 - k) for k in range(3)]
    assert read_view_list(films/"test.list", films/"val.list") == read_view_list(films/"val.list") == expected
    assert read_view_list(films/"test.list", labelled=False) == [(f, None) for f, _ in expected]
    plain = ViewsDataset(films/"val.list", "test", jitter_scales=(32, 32), **TINY)
    written_out = ViewsDataset(films/"test.list", "test", jitter_scales=(32, 32), filename_gt=films/"val.list", **TINY)
    assert len(plain) == len(written_out) == 90 and all(np.array_equal(plain[41][k], written_out[41][k]) for k in plain[41])
    (tmp_path/"numbers.list").write_text("run 1 2 3 4\n")  # a path with numbers is no view without a suffix
    assert read_view_list(tmp_path/"numbers.list") == [("run 1 2 3", 4)]


@pytest.mark.parametrize("text,words", [
    ("a.mp4 0 0 0\na.mp4 0 0\n", "line 2: expected 'path number"), ("a.mp4 0 0 0\nb.mp4 3\n", "line 2"), ("b.mp4 3\na.mp4 0 0 0\n", "line 1"),
    ("a.mp4 0 0 0\nb.mp4 0 0 1\n", "line 2: film number 0 is b.mp4"), ("a.mp4 9 0 0\n", "film number 9 has no label"), ("a.mp4 x\n", "line 1: expected 'path label'"),
    ("a.mp4\n", "line 1"), ("a.mp4 7\n", "label 7 is not in 0 .. 5"), ("", "lists no clip")])
def test_wrong_lists(films, tmp_path, text, words):
    (tmp_path/"l").write_text(text)
    with pytest.raises(PvnbError, match=words):
        ViewsDataset(tmp_path/"l", "test", filename_gt=films/"val.list", num_classes=6)


def test_views_without_labels_are_refused(films):
    for mode in ("train", "test"):
        with pytest.raises(PvnbError, match="filename_gt"):
            ViewsDataset(films/"test.list", mode)
    with pytest.raises(PvnbError, match="label 5 is not in"):
        ViewsDataset(films/"test.list", "test", filename_gt=films/"val.list", num_classes=5)


def test_unreadable_films(films, tmp_path):
    (tmp_path/"empty.mp4").write_bytes(b"")
    good = films/"a class"/"film 0.mp4"
    (tmp_path/"cut.mp4").write_bytes(good.read_bytes()[:-200])
    (tmp_path/"l").write_text(f"empty.mp4 0\ncut.mp4 1\ngone.mp4 2\n{good} 3\n")
    for cache in (False, True):
        data = ViewsDataset(tmp_path/"l", "test", jitter_scales=(32, 32), num_test_clips=3, cache=cache, **TINY)
        samples = [data[i] for i in range(12)]
        assert [isinstance(s, Skipped) for s in samples] == [True] * 9 + [False] * 3
        assert "empty.mp4" in samples[0].message and "cut.mp4" in samples[3].message and "gone.mp4" in samples[8].message
    batches = list(make_loader(data, 6))
    assert [len(b["skipped"]) for b in batches] == [6, 3] and batches[1]["video"].numpy().ravel().tolist() == [3, 3, 3]
    for mode in ("train", "valid"):
        assert isinstance(ViewsDataset(tmp_path/"l", mode, jitter_scales=(32, 32), **TINY)[0], Skipped)
    with pytest.raises(VideoError, match="empty.mp4"):
        ViewsDataset(mode="infer", video_path=tmp_path/"empty.mp4")[0]


def test_inference(films):
    path = films/"a class"/"film 1.mp4"
    one = ViewsDataset(mode="infer", video_path=path, jitter_scales=(32, 32), **TINY)
    assert len(one) == 30 and one[7].keys() == {"image", "name", "video", "view"} and one[7]["name"] == str(path)
    (films/"names.list").write_text("a class/film 0.mp4\na class/film 1.mp4\n")
    for name in ("names.list", "test.list"):
        many = ViewsDataset(films/name, "infer", jitter_scales=(32, 32), **TINY)
        assert np.array_equal(many[37]["image"], one[7]["image"]) and many[37]["name"] == "a class/film 1.mp4"


@pytest.mark.parametrize("options,words", [
    (dict(mode="tset"), "unknown mode 'tset'"), (dict(jitter_scales=(32, 32), crop_size=33), "expected crop_size <= least"), (dict(jitter_scales=(300, 256)), "jitter_scales"),
    (dict(video_length=0), "at least 1"), (dict(sample_rate=0), "at least 1"), (dict(filelist=None), "needs a list file"), (dict(filelist="gone.list"), "gone.list"),
    (dict(mode="test", video_path="a.mp4"), "mode infer"), (dict(mode="test", num_test_clips=10), "multiple of 3")])
def test_wrong_options(films, options, words):
    with pytest.raises(PvnbError, match=words):
        ViewsDataset(**{"filelist": films/"val.list", **options})


def test_golden_views():
    folder = golden_dir() and golden_dir()/"metrics"
    if not folder or not (folder/"nonlocal_test_views.npz").is_file():
        pytest.skip("the golden data is not here")
    for n, rate, length, view, *numbers in np.load(folder/"nonlocal_test_frame_indices.npz")["rows"].tolist():
        assert view_frames(n, view, 10, rate, length).tolist() == numbers[:length]
    a, whole = np.load(folder/"nonlocal_test_views.npz"), 0
    for i in range(4):
        side, size = a[f"side_crop_{i}"].tolist()
        frames = resize_short(a[f"frames_{i}"], side)
        assert np.array_equal(frames, a[f"resized_{i}"])
        for p in (0, 1, 2):
            theirs = a[f"view_{i}_pos{p}"]
            if theirs.ndim == 4:
                whole += 1
                ours = crop_normalised(frames, *spatial_offsets(*frames.shape[1:3], size, p), size, False, *a["mean_std"])
                assert np.array_equal(ours, theirs)
    assert whole == 6


# --- the lists of a Kinetics csv


@pytest.fixture
def kinetics(tmp_path):
    "Clips and two csv files: 3 rows of train, one missing; 3 of val, one missing."
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (tmp_path/"train.csv").write_text(head + "zumba,aaaaaaaaaaa,0,10,train,0\n\"ice skating\",bbbbbbbbbbb,1,11,train,0\nzumba,missing____,0,10,train,0\n")
    (tmp_path/"val.csv").write_text(head + "ice skating,ccccccccccc,0,10,val,0\nzumba,missing____,0,10,val,0\nzumba,ddddddddddd,5,15,val,0\n")
    for place, name, k in (("zumba", "aaaaaaaaaaa_000000_000010", 0), ("ice_skating", "bbbbbbbbbbb_000001_000011", 1),
                           ("ice skating", "ccccccccccc_000000_000010", 2), (".", "ddddddddddd_000005_000015", 3)):
        write_video(tmp_path/"clips"/place/f"{name}.mp4", film(k, n=9, h=40, w=56))
    kinetics_command(["labels", str(tmp_path/"train.csv"), str(tmp_path/"labels.txt")])
    return tmp_path


@pytest.mark.parametrize("spelling", ["list CSV CLIPS LABELS OUT --nonlocal", "--nonlocal CSV CLIPS LABELS OUT", "list --nonlocal CSV CLIPS LABELS OUT",
                                      "--nonlocal list CSV CLIPS LABELS OUT", "CSV CLIPS LABELS OUT --nonlocal"])
def test_lists_by_either_spelling(kinetics, capsys, spelling):
    out = kinetics/"lists"
    for part in ("train", "val"):
        words = {"CSV": kinetics/f"{part}.csv", "CLIPS": kinetics/"clips", "LABELS": kinetics/"labels.txt", "OUT": out}
        assert main(["data", "kinetics", *(str(words.get(w, w)) for w in spelling.split())]) == 0
    said = capsys.readouterr().out.replace(str(kinetics), "data").splitlines()
    assert said[-3:] == ["2 clips -> data/lists/trainlist.txt, 1 missing", "2 clips -> data/lists/vallist.txt, 1 missing", "60 views -> data/lists/testlist.txt"]
    assert [label for _, label in read_list(out/"trainlist.txt")] == [1, 0] and [label for _, label in read_list(out/"vallist.txt")] == [0, 1]
    lines = (out/"testlist.txt").read_text().splitlines()
    files = [path for path, _ in read_list(out/"vallist.txt")]
    assert lines == [f"{f} {n} {i} {j}" for n, f in enumerate(files) for i in range(10) for j in range(3)]
    data = ViewsDataset(out/"testlist.txt", "test", jitter_scales=(32, 32), filename_gt=out/"vallist.txt", num_classes=2, **TINY)
    assert len(data) == 60 and data[30]["label"].tolist() == [1] and data[0]["image"].shape == (3, 4, 32, 32)


def test_splits_of_a_csv(kinetics):
    both = (kinetics/"train.csv").read_text() + "".join((kinetics/"val.csv").read_text().splitlines(True)[1:])
    (kinetics/"both.csv").write_text(both.replace(",val,", ",validate,"))
    counts = write_nonlocal_lists(kinetics/"both.csv", kinetics/"clips", kinetics/"labels.txt", kinetics/"o")
    assert counts == {"train": {"clips": 2, "missing": 1}, "val": {"clips": 2, "missing": 1}} and len(list((kinetics/"o").iterdir())) == 3
    (kinetics/"odd.csv").write_text((kinetics/"val.csv").read_text().replace(",val,", ",holdout,"))
    arguments = [str(kinetics/"odd.csv"), str(kinetics/"clips"), str(kinetics/"labels.txt"), str(kinetics/"o2")]
    with pytest.raises(PvnbError, match=r"odd.csv line 2: split is 'holdout'.*--split"):
        kinetics_command(["--nonlocal", *arguments])
    assert not (kinetics/"o2").exists()
    assert kinetics_command(["--nonlocal", *arguments, "--split", "val"]) == 0
    assert (kinetics/"o2"/"testlist.txt").read_text() == (kinetics/"o"/"testlist.txt").read_text()


def test_faults_of_the_lists(kinetics, capsys):
    arguments = [str(kinetics/"val.csv"), str(kinetics/"clips"), str(kinetics/"labels.txt")]
    for change, words in ((["list", *arguments, str(kinetics/"val.csv"), "--nonlocal"], "is a file, expected a folder"),
                          (["list", *arguments, str(kinetics/"l.txt"), "--split", "val"], "--split goes with --nonlocal"),
                          (["--nonlocal", arguments[0], str(kinetics/"nowhere"), arguments[2], str(kinetics/"o")], "none of the 3 val clips")):
        with pytest.raises(PvnbError, match=words):
            kinetics_command(change)
    assert kinetics_command(["list", *arguments, str(kinetics/"plain.txt")]) == 0 and len(read_list(kinetics/"plain.txt")) == 2
    for wrong in (["--nonlocal"], [], ["--nonlocal", "labels", *arguments]):
        with pytest.raises(SystemExit):
            kinetics_command(wrong)
