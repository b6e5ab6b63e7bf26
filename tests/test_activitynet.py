"""ActivityNet: annotations, features, labels, data sets, and the faults that real files have."""
import json
import pickle

import h5py
import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir, repo_dir
from paddlevideo_nb.datasets.activitynet import (ActivityNetDataset, CTCNDataset, bmn_labels, bsn_labels, clean_segments, ctcn_sample, find_feature, random_crop, random_move, read_ctcn_list,
                                                 read_entries, read_feature, read_scores, read_videos, rescale, resize_rows, server_form)
from paddlevideo_nb.datasets.loader import Skipped, make_loader

FLAT = {"v_a": {"duration_second": 60, "duration_frame": 1500, "subset": "training", "annotations": [{"segment": [6, 18], "label": "yoga"}, {"segment": [30, 66], "label": "sailing"}]},
        "v_b": {"duration_second": 30.0, "subset": "validation", "annotations": [{"segment": [12, 12], "label": "yoga"}, {"segment": [9, 3], "label": "yoga"}, {"segment": [40, 50], "label": "x"}]},
        "v_c": {"duration_second": 0, "subset": "training", "annotations": []},
        "v_d": {"duration_second": -5, "subset": "training", "annotations": [{"segment": [0, 1], "label": "x"}]},
        "v_e": {"duration_second": 20, "subset": "training", "annotations": []},
        "v_f": {"duration_second": 10, "subset": "testing"}}


def golden(name):
    path = golden_dir() and golden_dir() / f"{name}.npz"
    if not path or not path.is_file():
        pytest.skip(f"golden {name} is not here")
    return dict(np.load(path))


@pytest.fixture()
def features(tmp_path):
    "A folder with features of v_a (npy), b (csv) and v_e (h5), 8 wide."
    rng = np.random.default_rng(0)
    arrays = {n: rng.random((t, 8), dtype="float32") for n, t in (("a", 100), ("b", 37), ("e", 250))}
    np.save(tmp_path / "v_a.npy", arrays["a"])
    np.savetxt(tmp_path / "b.csv", arrays["b"], delimiter=",")
    with h5py.File(tmp_path / "v_e.h5", "w") as f:
        f["features"] = arrays["e"]
    return tmp_path, arrays


# --- annotations


def test_both_forms_and_the_way_back():
    entries = read_entries(FLAT)
    assert entries["v_a"]["duration"] == 60 and entries["v_a"]["frames"] == 1500 and entries["v_f"]["annotations"] == []
    server = server_form(FLAT)
    assert server["database"]["a"]["annotations"] == FLAT["v_a"]["annotations"], "the evaluation gets segments as annotated"
    assert read_entries(server)["b"]["subset"] == "validation" and server_form(FLAT, videos=["v_b"])["database"].keys() == {"b"}


def test_what_is_mended_is_counted():
    videos, counts = read_videos(FLAT)
    assert [v["name"] for v in videos] == ["v_a", "v_b", "v_e", "v_f"]
    assert dict(counts) == {"videos": 6, "segments": 5, "cut off": 1, "without length": 1, "backwards": 1, "outside of the video": 1, "videos without duration": 2, "videos without segment": 3}
    assert videos[0]["segments"].tolist() == [[.1, .3], [.5, 1]] and videos[0]["labels"] == ["yoga", "sailing"]


@pytest.mark.parametrize("subset, names", [("training", ["v_a", "v_e"]), ("train", ["v_a", "v_e"]), ("validation", ["v_b"]), ("train_val", ["v_a", "v_b", "v_e"]), ("testing", ["v_f"])])
def test_subsets(subset, names):
    assert [v["name"] for v in read_videos(FLAT, subset)[0]] == names


def test_join_with_a_list(tmp_path):
    bare = {k: {x: y for x, y in v.items() if x != "subset"} for k, v in FLAT.items()}
    (tmp_path / "a.json").write_text(json.dumps(bare))
    (tmp_path / "info.csv").write_text("video,numFrame,seconds,subset\nv_a,1500,60,training\nb,1,30,validation\nv_c,700,28,training\n")
    videos, counts = read_videos(tmp_path / "a.json", "training", tmp_path / "info.csv")
    assert [v["name"] for v in videos] == ["v_a", "v_c"] and videos[1]["duration"] == 28, "a duration that the JSON lacks comes from the list"
    with pytest.raises(PvnbError, match="info"):
        read_videos(tmp_path / "a.json", "training")
    (tmp_path / "info.csv").write_text("name,subset\na,training\n")
    with pytest.raises(PvnbError, match="'video'"):
        read_videos(tmp_path / "a.json", "training", tmp_path / "info.csv")


@pytest.mark.parametrize("wrong", [[1, 2], {"v": 3}, {"v": {"duration_second": "long"}}, {"v": {"duration_second": 5, "annotations": {}}}, {"v": {"duration_second": 5, "annotations": [{"segment": [1]}]}},
                                   {"v": {"duration_second": 5, "annotations": [{"segment": [1, float("nan")]}]}}, {"v": {"duration_second": 5, "annotations": ["x"]}}])
def test_wrong_annotations_are_named(wrong):
    with pytest.raises(PvnbError) as e:
        read_videos(wrong)
    assert "\n" not in str(e.value)


# --- labels


def plain_share(piece, window):
    return max(0, min(piece[1], window[1]) - max(piece[0], window[0])) / (piece[1] - piece[0])


def test_labels_equal_plain_loops():
    segments, T, D = [[.12, .31], [.33, .9]], 16, 10
    iou, start, end = bmn_labels(segments, T, D)
    assert iou.shape == (D, T)
    for d in range(D):
        for t in range(T):
            a, b = t / T, (t + d + 1) / T
            best = max(max(0, min(b, e) - max(a, s)) / (max(b, e) - min(a, s) if min(b, e) > max(a, s) else 1) for s, e in segments)
            assert iou[d, t] == pytest.approx(best, abs=1e-12)
    for t in range(T):
        piece, w = (t / T, (t + 1) / T), 1.5 / T
        assert start[t] == pytest.approx(max(plain_share(piece, (s - w, s + w)) for s, _ in segments), abs=1e-12)
        assert end[t] == pytest.approx(max(plain_share(piece, (e - w, e + w)) for _, e in segments), abs=1e-12)
    start, end, action = bsn_labels(segments, T, .2)
    for t in range(T):
        piece = (t / T, (t + 1) / T)
        assert action[t] == pytest.approx(max(plain_share(piece, s) for s in segments), abs=1e-12)
        assert start[t] == pytest.approx(max(plain_share(piece, (s - w, s + w)) for s, e in segments for w in [max(1 / T, .2 * (e - s)) / 2]), abs=1e-12)


def test_labels_are_finite_whatever_comes():
    for segments in ([], [[0, 1]], [[0, 1e-9]], [[.5, .5]], [[1, 1]]):
        for found in (*bmn_labels(segments), *bsn_labels(segments)):
            assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1 + 1e-12).all()
    assert not any(x.any() for x in (*bmn_labels([]), *bsn_labels([])))


@pytest.mark.parametrize("name, encode, keys", [("bmn/labels", bmn_labels, ("gt_iou_map", "gt_start", "gt_end")), ("bsn_tem/labels", bsn_labels, ("gt_start", "gt_end", "gt_action"))])
def test_golden_labels(name, encode, keys):
    a = golden(name)
    segments, _ = clean_segments([{"segment": s} for s in a["segments"]], float(a["duration"]))
    for ours, key in zip(encode(segments, int(a["tscale"])), keys, strict=True):
        assert np.abs(ours - a[key]).max() < 1e-12


# --- features


def test_rescale():
    line = np.arange(37.)[:, None] * [1, -2]
    assert np.allclose(rescale(line), np.linspace(0, 36, 100)[:, None] * [1, -2], atol=1e-5) and rescale(line).dtype == np.float32
    assert np.array_equal(rescale(line, 37), line.astype("float32"))
    assert np.array_equal(rescale(line[:1]), np.repeat(line[:1], 100, 0)) and rescale(line, 1).tolist() == [[18, -36]]
    x = np.random.default_rng(0).random((53, 2))
    ours, n = rescale(x, 10, "mean"), 53
    for i in range(10):
        places = np.clip(np.array([i, i + .5, i + 1]) * n / 10, .5, n - .5)
        assert np.allclose(ours[i], np.mean([[np.interp(p, np.arange(n) + .5, x[:, c]) for c in range(2)] for p in places], 0), atol=1e-6)
    for n in (1, 2, 3, 99, 100, 101, 1000):
        assert rescale(np.ones((n, 2)), 100, "mean").tolist() == [[1, 1]] * 100
    for wrong in (np.zeros((0, 4)), np.zeros(4)):
        with pytest.raises(PvnbError, match="expected"):
            rescale(wrong)
    with pytest.raises(PvnbError, match="cubic"):
        rescale(line, 100, "cubic")


def test_feature_files(features):
    folder, arrays = features
    for name, key in (("v_a", "a"), ("a", "a"), ("v_b", "b"), ("e", "e")):
        assert np.allclose(read_feature(find_feature(folder, name), name), arrays[key], atol=1e-6)
    with h5py.File(folder / "all.h5", "w") as f:
        f["v_a/c3d_features"], f["b"] = arrays["a"], arrays["b"]
    assert np.array_equal(read_feature(folder / "all.h5", "a"), arrays["a"]) and np.array_equal(read_feature(folder / "all.h5", "v_b"), arrays["b"])
    with pytest.raises(PvnbError, match="all.h5 holds no features of zz"):
        read_feature(folder / "all.h5", "zz")
    (folder / "named.csv").write_text("f0,f1\n1,2\n3,4\n")
    (folder / "single.csv").write_text("1,2\n")
    assert read_feature(folder / "named.csv").tolist() == [[1, 2], [3, 4]] and read_feature(folder / "single.csv").tolist() == [[1, 2]]


@pytest.mark.parametrize("name, content, said", [("x.npy", b"nothing", "x.npy"), ("x.npy", b"", "x.npy"), ("x.csv", b"1,2\n3,oops\n", "x.csv"), ("x.h5", b"no", "x.h5"), ("x.mat", b"1", "unknown kind"),
                                                 ("x.csv", b"1,nan\n", "finite"), ("x.csv", b"1,2\n3\n", "x.csv")])
def test_damaged_features_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PvnbError, match=said) as e:
        read_feature(tmp_path / name)
    assert "\n" not in str(e.value)


def test_features_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(PvnbError, match="x.npy"):
        read_feature(tmp_path / "x.npy")


# --- the data set


def test_dataset(features):
    folder, arrays = features
    data = ActivityNetDataset(FLAT, folder, feature_dim=8)
    assert len(data) == 2 and data.counts["videos without duration"] == 2
    sample = data[0]
    assert {k: (v.dtype.name, v.shape) for k, v in sample.items() if k != "name"} == {"feature": ("float32", (8, 100)), "gt_iou_map": ("float32", (100, 100)), "gt_start": ("float32", (100,)),
                                                                                     "gt_end": ("float32", (100,)), "index": ("int64", ())}
    assert np.array_equal(sample["feature"], arrays["a"].T) and sample["name"] == "v_a"
    empty = data[1]
    assert empty["name"] == "v_e" and not empty["gt_iou_map"].any() and not empty["gt_start"].any()
    batch = next(iter(make_loader(data, 2)))
    assert batch["gt_iou_map"].shape == [2, 100, 100] and batch["name"] == ["v_a", "v_e"]


def test_dataset_settings(features):
    folder, _ = features
    sample = ActivityNetDataset(FLAT, folder, mode="valid", labels="bsn", tscale=20, method="mean")[0]
    assert set(sample) == {"feature", "gt_start", "gt_end", "gt_action", "name", "index"} and sample["feature"].shape == (8, 20)
    assert set(ActivityNetDataset(FLAT, folder, mode="infer")[0]) == {"feature", "name", "index"}
    assert [v["name"] for v in ActivityNetDataset(None, folder, mode="infer").videos] == ["b", "v_a", "v_e"]
    assert ActivityNetDataset(FLAT, folder, dscale=40)[0]["gt_iou_map"].shape == (40, 100)


def test_dataset_faults(features):
    folder, _ = features
    for keys, said in ((dict(mode="trian"), "trian"), (dict(labels="tall"), "tall"), (dict(tscale=1), "tscale"), (dict(subset="nothing"), "nothing")):
        with pytest.raises(PvnbError, match=said):
            ActivityNetDataset(FLAT, folder, **keys)
    assert "400" in ActivityNetDataset(FLAT, folder, feature_dim=400)[0].message
    (folder / "v_a.npy").unlink()
    lost = ActivityNetDataset(FLAT, folder)[0]
    assert isinstance(lost, Skipped) and "v_a" in lost.message
    with pytest.raises(PvnbError, match="v_a"):
        ActivityNetDataset(FLAT, folder, mode="infer")[0]
    with pytest.raises(PvnbError, match="no feature file"):
        ActivityNetDataset(None, folder / "nowhere", mode="infer")


# --- C-TCN


@pytest.fixture()
def ctcn(tmp_path):
    "Score pickles of three videos (the last without a segment) and their list."
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        for kind, n in (("rgb", 300), ("flow", 310)):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{name}.pkl").write_bytes(pickle.dumps({"scores": rng.random((n, 3), dtype="float32")}, protocol=2))
    (tmp_path / "list.txt").write_text("one 300 2 1 15 60 2 90 126\ntwo 300 1 3 150 291\nthree 300 0\n")
    return tmp_path


def test_ctcn_dataset(ctcn):
    data = CTCNDataset(ctcn / "list.txt", ctcn, mode="test")
    sample = data[0]
    assert sample["image"].shape == (1, 512, 6) and sample["image"].dtype == np.float32 and sample["loc_targets"].shape == (1785, 2) and set(sample["cls_targets"].tolist()) == {0, 1, 2}
    assert not data[2]["cls_targets"].any() and isinstance(CTCNDataset(ctcn / "list.txt", ctcn, mode="valid")[2], Skipped)
    train = CTCNDataset(ctcn / "list.txt", ctcn, mode="train")
    assert np.array_equal(train[0]["image"], train[0]["image"]) and (train[0]["cls_targets"] > 0).any()
    first = train[0]["image"]
    train.set_epoch(1)
    assert not np.array_equal(first, train[0]["image"]), "another epoch, another crop"
    (ctcn / "names.txt").write_text("one\n")
    assert set(CTCNDataset(ctcn / "names.txt", ctcn, mode="infer")[0]) == {"image", "name", "index"}


def test_ctcn_faults(ctcn, tmp_path):
    (tmp_path / "wrong.txt").write_text("one 300 2 1 15 60\n")
    with pytest.raises(PvnbError, match="wrong.txt, line 1"):
        read_ctcn_list(tmp_path / "wrong.txt")

    class Evil:
        def __reduce__(self):
            return print, ("run",)
    (ctcn / "rgb" / "one.pkl").write_bytes(pickle.dumps({"scores": Evil()}))
    with pytest.raises(PvnbError, match="one.pkl refused"):
        read_scores(ctcn / "rgb" / "one.pkl", ctcn / "flow" / "one.pkl")
    (ctcn / "rgb" / "two.pkl").write_bytes(pickle.dumps({"scores": np.zeros((0, 3))}))
    data = CTCNDataset(ctcn / "list.txt", ctcn, mode="train")
    assert "one.pkl" in data[0].message and "two.pkl" in data[1].message
    with pytest.raises(PvnbError, match="three.pkl"):
        (ctcn / "flow" / "three.pkl").unlink()
        CTCNDataset(ctcn / "list.txt", ctcn, mode="infer")[2]


def test_move_and_crop_keep_rows_and_actions_together():
    rows, segments, labels = np.arange(400, dtype="float32")[:, None] * [1, 1], np.array([[50., 100.], [200., 220.], [300., 399.]]), np.array([1, 2, 3])
    orders = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        moved, places, order = random_move(rows, segments, labels, rng)
        assert sorted(moved[:, 0]) == rows[:, 0].tolist() and sorted(order) == [1, 2, 3]
        orders.add(tuple(order))
        for (a, b), c in zip(places, order, strict=True):
            assert np.array_equal(moved[int(a):int(b), 0], np.arange(*segments[c - 1]))
        image, cut, kept = random_crop(moved, places, order, rng)
        assert 0 < len(kept) <= 3 and (cut[:, 0] < cut[:, 1]).all() and cut.min() >= 0 and cut.max() <= len(image) <= 400
        for (a, b), c in zip(cut, kept, strict=True):
            assert segments[c - 1, 0] <= image[int(a), 0] and image[int(b) - 1, 0] < segments[c - 1, 1]
    assert len(orders) > 1
    image, places, _ = random_move(rows, np.array([[0., 400.]]), labels[:1], np.random.default_rng(0))
    assert np.array_equal(image, rows), "without background nothing moves"


def test_resize_rows():
    x = np.arange(5.)[:, None].astype("float32")
    assert resize_rows(x, 10)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and resize_rows(x, 5) is x
    assert resize_rows(x, 10, "linear").shape == (10, 1)


def test_golden_ctcn_reader():
    a = golden("ctcn/reader")
    for i in range(3):
        n = min(len(a[f"rgb_{i}"]), len(a[f"flow_{i}"]))
        ours = ctcn_sample(np.concatenate([a[f"rgb_{i}"][:n], a[f"flow_{i}"][:n]], 1), a[f"boxes_{i}"], a[f"labels_{i}"])
        assert np.array_equal(ours["image"], a[f"image_{i}"]) and np.array_equal(ours["cls_targets"], a[f"cls_targets_{i}"])
        assert np.allclose(ours["loc_targets"], a[f"loc_targets_{i}"], rtol=1e-5, atol=1e-5)


# --- the real annotations


def test_all_training_videos_of_activitynet():
    real = repo_dir() and repo_dir().parent / "shared" / "data"
    if not real or not (real / "activitynet13_actions.json").is_file():
        pytest.skip("the annotations of ActivityNet-1.3 are not here")
    videos, counts = read_videos(real / "activitynet13_actions.json", "train", real / "activitynet13_video_info.csv")
    assert len(videos) == counts["videos"] == 9649 and counts["segments"] == 14859 and counts["without length"] == 9
    for v in videos[::20]:
        found = bmn_labels(v["segments"])
        assert all(np.isfinite(x).all() for x in found) and (found[0].max() > .3 or not len(v["segments"]) or np.diff(v["segments"]).max() < .01)
