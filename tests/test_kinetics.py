"The Kinetics reader and its preparation: legacy pickles, faults, reproducibility, resuming."
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from paddlevideo_nb.core import PvnbError, golden_dir
from paddlevideo_nb.datasets.kinetics import (KineticsDataset, decode_jpegs, kinetics_command, prepare_pickles, read_label_list, read_list, read_pickle,
                                              write_file_list, write_label_list)
from paddlevideo_nb.datasets.loader import Skipped, make_loader
from paddlevideo_nb.transforms import ClipTransform, sample_frames
from paddlevideo_nb.video import VideoError, read_video, write_video

SMALL = dict(short_size=40, target_size=32, seg_num=3, seglen=2)


def film(k=0, n=20, h=48, w=64):
    y, x = np.mgrid[:h, :w]
    return [np.stack([(2 * x + 3 * i + 40 * k) % 256, (3 * y + i) % 256, np.full_like(x, (5 * i + 60 * k) % 256)], -1).astype(np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Seven good clips and a list of them, paths relative to the list's folder and with blanks."
    folder = tmp_path_factory.mktemp("clips")
    for k in range(7):
        write_video(folder/"some class"/f"clip {k}.mp4", film(k))
    (folder/"all.list").write_text("".join(f"some class/clip {k}.mp4 {k % 3}\n" for k in range(7)))
    return folder


def jpeg(frame):
    with io.BytesIO() as f:
        Image.fromarray(frame).save(f, "JPEG", quality=95)
        return f.getvalue()


def python2_pickle(name, label, frames):
    "What cPickle of Python 2.7 wrote for (str, int, [str]) with protocol 2: short strings U, long ones T, memo entries q."
    def string(b, memo):
        return (b"U" + bytes([len(b)]) if len(b) < 256 else b"T" + struct.pack("<i", len(b))) + b + b"q" + bytes([memo])
    out = b"\x80\x02" + string(name, 1) + b"K" + bytes([label]) + b"]q\x02("
    return out + b"".join(string(f, 3 + i) for i, f in enumerate(frames)) + b"e\x87q\x7f."


def test_pickles_of_both_pythons(tmp_path):
    frames = [jpeg(f) for f in film(n=5)]
    (tmp_path/"2.pkl").write_bytes(python2_pickle(b"./abc_000001_000011", 7, frames))
    for protocol in range(2, 5):
        (tmp_path/"3.pkl").write_bytes(pickle.dumps(("./abc_000001_000011", 7, frames), protocol=protocol))
        assert read_pickle(tmp_path/"2.pkl") == read_pickle(tmp_path/"3.pkl") == ("./abc_000001_000011", 7, frames)
    assert pickle.loads((tmp_path/"2.pkl").read_bytes(), encoding="latin1")[0] == "./abc_000001_000011"
    (tmp_path/"p.list").write_text("2.pkl\n3.pkl\n")
    a, b = (KineticsDataset(tmp_path/"p.list", "test", "pkl", **SMALL)[i] for i in range(2))
    assert np.array_equal(a["image"], b["image"]) and a["label"].tolist() == [7] and a["label"].dtype == np.int64
    wanted = np.stack([np.asarray(Image.open(io.BytesIO(frames[n]))) for n in sample_frames(5, 3, 2, "test", source="pkl")])
    about = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert np.array_equal(a["image"], ClipTransform("test", 3, 2, 40, 32, **about)(wanted))
    assert KineticsDataset(tmp_path/"p.list", "infer", "pkl", **SMALL)[0]["name"] == "./abc_000001_000011"


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'ran'}",)
    (tmp_path/"evil.pkl").write_bytes(pickle.dumps(("x", 0, [Harmful()]), protocol=2))
    with pytest.raises(VideoError, match=r"evil\.pkl.*posix\.system"):
        read_pickle(tmp_path/"evil.pkl")
    (tmp_path/"l").write_text("evil.pkl\n")
    assert isinstance(KineticsDataset(tmp_path/"l", "train", "pkl")[0], Skipped)
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("value", [("x", 0, []), ("x", 0), {"x": 1}, ("x", 0, ["text"]), 3, ("x", 0, None)])
def test_pickles_of_something_else(tmp_path, value):
    (tmp_path/"a.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(VideoError, match="a.pkl"):
        read_pickle(tmp_path/"a.pkl")


def test_damaged_jpegs():
    whole = jpeg(film()[0])
    for bad in (b"", b"junk", whole[:len(whole) // 2]):
        with pytest.raises(VideoError, match="clip.pkl"):
            decode_jpegs([whole, bad], "clip.pkl")
    assert decode_jpegs([whole, whole], "clip.pkl").shape == (2, 48, 64, 3)


def test_lists(tmp_path):
    (tmp_path/"a.list").write_bytes("\ufeffa b.mp4 3\r\nc.mp4\t4\r\n\r\n".encode())
    assert read_list(tmp_path/"a.list") == [("a b.mp4", 3), ("c.mp4", 4)]
    for text, words in (("a.mp4\n", "line 1: expected 'path label'"), ("a.mp4 1\nb.mp4 x\n", "line 2"), ("a.mp4 -1\n", "label -1"), ("a.mp4 5\n", "label 5"), (" \n", "no clip")):
        (tmp_path/"b.list").write_text(text)
        with pytest.raises(PvnbError, match=words):
            read_list(tmp_path/"b.list", num_classes=5)
    (tmp_path/"c.list").write_bytes(b"\xff\xfe\x00")
    for call in (lambda: read_list(tmp_path/"c.list"), lambda: read_list(tmp_path/"gone.list"), lambda: KineticsDataset(tmp_path/"a.list", "tset"),
                 lambda: KineticsDataset(tmp_path/"a.list", format="avi"), lambda: KineticsDataset()):
        with pytest.raises(PvnbError):
            call()


def everything(clips, workers=0, epoch=0, **kw):
    data = KineticsDataset(clips/"all.list", "train", multi_scale=True, seed=4, **SMALL, **{k: kw.pop(k) for k in ("cache",) if k in kw})
    return [(b["image"].numpy(), b["label"].numpy().ravel().tolist()) for b in make_loader(data, 2, shuffle=True, seed=4, epoch=epoch, workers=workers, **kw)]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) and k == j for (x, k), (y, j) in zip(a, b, strict=True))


def test_same_epoch_for_any_number_of_workers(clips):
    here = everything(clips)
    assert [len(labels) for _, labels in here] == [2, 2, 2, 1]
    for workers in (1, 2, 3):
        assert same(here, everything(clips, workers))
    assert same(here, everything(clips, cache=True)) and same(here[2:], everything(clips, 2, skip_batches=2))
    assert not same(here, everything(clips, epoch=1)) and same(everything(clips, epoch=1), everything(clips, 2, epoch=1))


def test_cache_reads_each_file_once(tmp_path):
    write_video(tmp_path/"a.mp4", film())
    (tmp_path/"l").write_text("a.mp4 0\n")
    data = KineticsDataset(tmp_path/"l", "train", cache=True, **SMALL)
    first = data[0]["image"]
    (tmp_path/"a.mp4").unlink()
    assert np.array_equal(data[0]["image"], first)
    data.set_epoch(1)
    assert not np.array_equal(data[0]["image"], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_by_name(clips, tmp_path, workers):
    (tmp_path/"empty.mp4").write_bytes(b"")
    data = (clips/"some class"/"clip 0.mp4").read_bytes()
    (tmp_path/"cut.mp4").write_bytes(data[:len(data) // 2])
    bad = ["empty.mp4 0", "cut.mp4 1", "gone.mp4 2"]
    (tmp_path/"l").write_text("\n".join([bad[0], f"{clips}/some class/clip 1.mp4 1", bad[1], bad[2]]) + "\n")
    for mode in ("train", "valid", "test"):
        batches = list(make_loader(KineticsDataset(tmp_path/"l", mode, **SMALL), 2, workers=workers))
        assert batches[0]["label"].numpy().tolist() == [[1]] and "empty.mp4" in batches[0]["skipped"][0]
        assert set(batches[1]) == {"skipped"} and "cut.mp4" in batches[1]["skipped"][0] and "gone.mp4" in batches[1]["skipped"][1]
    with pytest.raises(PvnbError, match="empty.mp4") as e:
        list(make_loader(KineticsDataset(tmp_path/"l", "infer", **SMALL), 2, workers=workers))
    assert "\n" not in str(e.value)


def test_one_file_for_prediction(clips):
    path = clips/"some class"/"clip 2.mp4"
    sample = KineticsDataset(mode="infer", video_path=path, **SMALL)[0]
    listed = KineticsDataset(clips/"all.list", "infer", **SMALL)[2]
    assert sample["name"] == str(path) and listed["name"] == "some class/clip 2.mp4" and set(sample) == {"image", "name"}
    assert np.array_equal(sample["image"], listed["image"])


def test_label_outside_of_the_classes_in_a_pickle_stops(tmp_path):
    (tmp_path/"a.pkl").write_bytes(pickle.dumps(("x", 9, [jpeg(film()[0])]), protocol=2))
    (tmp_path/"l").write_text("a.pkl\n")
    with pytest.raises(PvnbError, match="label 9 is not in 0 .. 4"):
        list(make_loader(KineticsDataset(tmp_path/"l", "train", "pkl", num_classes=5, **SMALL), 1))


@pytest.fixture
def kinetics(tmp_path):
    "A csv of six clips: four there, one missing, one unreadable."
    rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
    for k in range(6):
        label = ("air drumming", "zumba")[k % 2]
        rows.append(f'"{label}",id{k:09d},{k},{k + 10},train,0')
        if k < 4:
            write_video(tmp_path/"v"/label/f"id{k:09d}_{k:06d}_{k + 10:06d}.mp4", film(k, n=8))
    (tmp_path/"v"/"air drumming"/"id000000004_000004_000014.mp4").write_bytes(b"no video")
    (tmp_path/"k.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_preparation(kinetics, capsys):
    d = kinetics
    for args in (["labels", d/"k.csv", d/"labels.txt"], ["list", d/"k.csv", d/"v", d/"labels.txt", d/"v.list"],
                 ["pkl", d/"k.csv", d/"v", d/"p", "--labels", d/"labels.txt", "--workers", "2"]):
        assert kinetics_command([str(a) for a in args]) == 0
    assert "4 pickles made, 0 kept, 2 failed" in capsys.readouterr().out
    assert (d/"labels.txt").read_text() == "air drumming 0\nzumba 1\n" and read_label_list(d/"labels.txt") == {"air drumming": 0, "zumba": 1}
    assert [label for _, label in read_list(d/"v.list")] == [0, 1, 0, 1, 0]
    failures = (d/"p"/"failures.txt").read_text().splitlines()
    assert "id000000004" in failures[0] and "id000000005" in failures[1] and len(failures) == 2
    data = KineticsDataset(d/"p"/"pickles.list", "test", "pkl", **SMALL)
    assert [data[i]["label"].item() for i in range(len(data))] == [0, 1, 0, 1]
    name, label, frames = read_pickle(d/"p"/"id000000001_000001_000011.pkl")
    film1 = read_video(d/"v"/"zumba"/f"{name}.mp4")
    assert (name, label, len(frames)) == ("id000000001_000001_000011", 1, 8)
    assert np.abs(decode_jpegs(frames, "p").astype(int) - film1).mean() < 6


def test_preparation_goes_on_where_it_stopped(kinetics):
    d = kinetics
    write_label_list(d/"k.csv", d/"labels.txt")
    run = dict(workers=1, labels=d/"labels.txt", progress=False)
    assert prepare_pickles(d/"k.csv", d/"v", d/"p", **run) == {"made": 4, "kept": 0, "failed": 2}
    done = {p.name: p.read_bytes() for p in (d/"p").iterdir()}
    a, b, c, _ = sorted((d/"p").glob("*.pkl"))
    a.unlink()                                                             # not made yet
    b.rename(b.with_name(f".{b.stem}.zz.part.pkl"))                         # begun
    os.utime(c, (1, 1))
    assert prepare_pickles(d/"k.csv", d/"v", d/"p", **run) == {"made": 2, "kept": 2, "failed": 2}
    assert {p.name: p.read_bytes() for p in (d/"p").iterdir()} == done and c.stat().st_mtime == 1
    (d/"labels.txt").write_text("zumba 0\nair drumming 1\n")                # a corrected label list
    assert prepare_pickles(d/"k.csv", d/"v", d/"p", **run) == {"made": 4, "kept": 0, "failed": 2}
    assert read_pickle(a)[1] == 1


def test_preparation_survives_a_kill(tmp_path):
    for k in range(12):
        write_video(tmp_path/"v"/f"{k}.mp4", film(k, n=60, h=240, w=320), options={"preset": "ultrafast"})
    (tmp_path/"l").write_text("".join(f"{k}.mp4 {k}\n" for k in range(12)))
    code = f"from paddlevideo_nb.datasets.kinetics import *; prepare_pickles({str(tmp_path/'l')!r}, {str(tmp_path/'v')!r}, {str(tmp_path/'p')!r}, 1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    until = time.time() + 60
    while len(list((tmp_path/"p").glob("[!.]*.pkl"))) < 3 and time.time() < until:
        time.sleep(.005)
    os.killpg(process.pid, signal.SIGKILL)                                  # its workers too
    process.wait()
    ready = list((tmp_path/"p").glob("[!.]*.pkl"))
    assert 3 <= len(ready) < 12 and all(len(read_pickle(p)[2]) == 60 for p in ready)
    counts = prepare_pickles(tmp_path/"l", tmp_path/"v", tmp_path/"p", 2, progress=False)
    assert counts == {"made": 12 - len(ready), "kept": len(ready), "failed": 0}
    assert len(list((tmp_path/"p").iterdir())) == 14                        # 12 pickles, the list, the failures: no litter


def test_preparation_says_what_is_wrong(kinetics):
    d = kinetics
    write_label_list(d/"k.csv", d/"labels.txt")
    (d/"x.csv").write_text("youtube_id,time_start\nabc,1\n")
    (d/"time.csv").write_text("label,youtube_id,time_start,time_end,split,is_cc\nzumba,abc,one,2,train,0\n")
    (d/"other.csv").write_text("label,youtube_id,time_start,time_end,split,is_cc\nyoga,abc,1,2,train,0\n")
    (d/"twice.list").write_text("/a/1.mp4 0\n/b/1.mp4 1\n")
    for call, words in ((lambda: write_label_list(d/"x.csv", d/"o"), "no column label"),
                        (lambda: write_file_list(d/"time.csv", d/"v", d/"labels.txt", d/"o"), "time.csv line 2"),
                        (lambda: write_file_list(d/"other.csv", d/"v", d/"labels.txt", d/"o"), "'yoga' is not in the label list"),
                        (lambda: write_file_list(d/"k.csv", d/"nowhere", d/"labels.txt", d/"o"), "none of the 6 clips"),
                        (lambda: prepare_pickles(d/"k.csv", d/"v", d/"p"), "label list is needed"),
                        (lambda: prepare_pickles(d/"twice.list", None, d/"p"), "written twice"),
                        (lambda: prepare_pickles(d/"k.csv", d/"nowhere", d/"p", 1, d/"labels.txt", progress=False), "none of the 6 clips")):
        with pytest.raises(PvnbError, match=words) as e:
            call()
        assert "\n" not in str(e.value)
    assert not (d/"o").exists()


@pytest.mark.skipif(not golden_dir() or not (golden_dir()/"metrics"/"kinetics_test_transform.npz").is_file(), reason="the golden cases are not on this machine")
def test_golden_processing():
    for name, source in (("kinetics_test_frame_indices", "pkl"), ("kinetics_mp4_test_frame_indices", "mp4")):
        for n, seg_num, seglen, count, *numbers in np.load(golden_dir()/"metrics"/f"{name}.npz")["rows"]:
            assert sample_frames(n, seg_num, seglen, "test", source=source).tolist() == numbers[:count]
    about = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    case = np.load(golden_dir()/"metrics"/"kinetics_test_transform.npz")
    assert np.array_equal(ClipTransform("test", *case["seg_num_seglen_short_target"].tolist(), **about)(case["images"]), case["out"])
    case = np.load(golden_dir()/"metrics"/"kinetics_test_resize.npz")
    for i in range(5):
        assert np.array_equal(ClipTransform("test", 1, 1, *case["short_size_target_size"].tolist(), **about)(case[f"image_{i}"][None]), case[f"out_{i}"])
