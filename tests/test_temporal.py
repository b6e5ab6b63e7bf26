"""Segments in time: tIoU, suppression, anchors; against plain loops written here, and the golden cases."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir
from paddlevideo_nb.metrics.temporal import (BMN_SOFT_NMS, BSN_SOFT_NMS, anchor_boxes, best_first, boundary_candidates, boundary_pairs, class_detections, decode_boxes,
                                             encode_boxes, gaussian_soft_nms, hard_nms, overlap_over_anchor, paired_iou, result_rows, soft_nms, temporal_iou)


def iou(a, b):
    inter = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = a[1] - a[0] + b[1] - b[0] - inter
    return inter / union if union > 0 else 0.0


def segments(n, seed=0, length=1.0):
    rng = np.random.default_rng(seed)
    starts = rng.random(n) * length
    return np.stack([starts, starts + rng.random(n) * length / 2], 1)


def golden(name):
    path = golden_dir() and golden_dir() / f"{name}.npz"
    if not path or not path.is_file():
        pytest.skip(f"golden {name} is not here")
    return dict(np.load(path))


# --- tIoU


def test_iou_by_hand():
    assert temporal_iou([[10, 20]], [[12, 22], [10, 40], [20, 30], [10, 20]]).tolist() == [[8 / 12, 10 / 30, 0, 1]]
    assert overlap_over_anchor([[0, 2], [1, 2]], [[1, 5]]).tolist() == [[.5], [1]]
    assert paired_iou([[0, 2], [3, 4]], [[1, 3], [3, 4]]).tolist() == [1 / 3, 1]


def test_iou_matches_the_plain_form_and_is_symmetric():
    a, b = segments(30, 1), segments(20, 2)
    ours = temporal_iou(a, b)
    assert np.allclose(ours, [[iou(x, y) for y in b] for x in a]) and np.array_equal(ours, temporal_iou(b, a).T)
    assert ((ours >= 0) & (ours <= 1)).all()


def test_segments_without_length_agree_with_nothing_and_give_no_nan():
    odd = [[1, 1], [2, 1], [0, 3]]
    with np.errstate(all="raise"):
        assert temporal_iou([[1, 1]], odd).tolist() == [[0, 0, 0]]
        assert np.isfinite(temporal_iou(odd, odd)).all() and np.isfinite(overlap_over_anchor(odd, odd)).all()
    assert temporal_iou([], odd).shape == (0, 3) and temporal_iou(odd, []).shape == (3, 0)


@pytest.mark.parametrize("wrong, said", [([[1, 2, 3]], r"\[1, 3\]"), ([1, 2], r"\[2\]"), ([[0, np.nan]], "finite"), ([["a", "b"]], "numbers")])
def test_wrong_segments_are_named(wrong, said):
    with pytest.raises(PvnbError, match=said):
        temporal_iou([[0, 1]], wrong)


# --- order among equal scores


def test_best_first_sorts():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 16, 17, 40, 500):
        for values in (rng.random(n), rng.integers(0, 7, n) / 7, np.ones(n), -np.arange(n), np.arange(n) % 3):
            order = best_first(values)
            assert sorted(order.tolist()) == list(range(n)) and (np.diff(np.asarray(values, float)[order]) <= 0).all()
    assert best_first([1, 2, 1, 2]).tolist() == [3, 1, 2, 0]


def test_best_first_is_the_scalar_quicksort_of_numpy():
    "NumPy still has the old algorithm, for processors without vector instructions."
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only on x86 can NumPy's vectorised sort be switched off")
    code = ("import numpy as np; from paddlevideo_nb.metrics.temporal import best_first; r = np.random.default_rng(0)\n"
            "bad = [n for n in (17, 18, 33, 100, 271, 1000) for k in (3, 30, 300) for s in [r.integers(0, k, n) / k] if (np.argsort(s)[::-1] != best_first(s)).any()]\n"
            "print(bad)")
    names = "X86_V4 X86_V3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR AVX2 FMA3"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env={**os.environ, "NPY_DISABLE_CPU_FEATURES": names})
    if done.returncode:
        pytest.skip(f"NumPy did not start without vector instructions: {done.stderr.strip().splitlines()[-1]}")
    assert done.stdout.strip() == "[]"


# --- suppression


def test_hard_nms_by_hand():
    heap = [[10, 20], [11, 21], [9, 19], [10, 26], [30, 36], [31, 36]]
    assert hard_nms(heap, [.9, .8, .7, .6, .5, .4], .5).tolist() == [0, 4]
    assert hard_nms(heap, [.4, .5, .6, .7, .8, .9], .62).tolist() == [5, 3, 2]
    assert hard_nms([[0, 1], [0, 1]], [.5, .5], .5).tolist() == [0], "of equal scores the first stays"
    assert hard_nms([[0, 2], [1, 3]], [.9, .8], 1 / 3).tolist() == [0, 1], "an overlap of exactly the threshold stays"
    assert hard_nms([], [], .5).tolist() == []


@pytest.mark.parametrize("setting", [BMN_SOFT_NMS, BSN_SOFT_NMS])
@pytest.mark.parametrize("n", [2, 10, 250])
def test_soft_nms_matches_a_plain_loop(setting, n):
    s, p = segments(n, n), np.random.default_rng(n).integers(1, 40, n) / 40
    left, scores, picks, final = list(range(n)), p.tolist(), [], []
    while len(left) > 1 and len(picks) < 101:
        best = left[int(np.argmax([scores[i] for i in left]))]
        left.remove(best)
        for i in left:
            if iou(s[i], s[best]) > setting["low"] + (setting["high"] - setting["low"]) * (s[best, 1] - s[best, 0]):
                scores[i] *= np.exp(-iou(s[i], s[best]) ** 2 / setting["alpha"])
        picks.append(best)
        final.append(scores[best])
    ours, got = soft_nms(s, p, **setting)
    assert ours.tolist() == picks and np.allclose(got, final, rtol=1e-12) and len(ours) == min(n - 1, 101) and (np.diff(got) <= 1e-15).all()


def test_soft_nms_small_cases():
    assert [x.tolist() for x in soft_nms([[.1, .2]], [.7])] == [[0], [.7]]
    assert [x.tolist() for x in soft_nms([], [])] == [[], []]
    picks, scores = soft_nms([[0, .5], [0, .5], [.6, 1]], [.9, .8, .1])
    assert picks.tolist() == [0, 2] and scores.tolist() == [.9, .1], "the repetition falls below the third, and the last one left is lost"
    given = np.array([.9, .8, .1])
    soft_nms([[0, .5], [0, .5], [.6, 1]], given)
    assert given.tolist() == [.9, .8, .1], "the caller's scores are not touched"


def test_gaussian_matches_the_loop_in_place():
    "The swapping loop of the original, written down literally on a list of rows."
    for seed in range(12):
        n = 5 + 13 * seed
        s, p = segments(n, seed), np.random.default_rng(seed).integers(1, 25, n) / 25
        rows, i = [[k, float(v)] for k, v in enumerate(p)], 0
        while i < len(rows):
            best = max(range(i, len(rows)), key=lambda k: rows[k][1])
            rows[i], rows[best] = rows[best], rows[i]
            k = i + 1
            while k < len(rows):
                rows[k][1] *= np.exp(-iou(s[rows[k][0]], s[rows[i][0]]) ** 2 / .9)
                if rows[k][1] < .02:
                    rows[k] = rows[-1]
                    rows.pop()
                else:
                    k += 1
            i += 1
        picks, scores = gaussian_soft_nms(s, p, .9, .02)
        assert picks.tolist() == [k for k, _ in rows] and np.allclose(scores, [v for _, v in rows], rtol=1e-12)


@pytest.mark.parametrize("f", [lambda s, p: hard_nms(s, p, .5), soft_nms, lambda s, p: gaussian_soft_nms(s, p, .5, .01)])
def test_suppression_refuses_scores_that_do_not_fit(f):
    with pytest.raises(PvnbError, match="one score a segment"):
        f([[0, 1], [1, 2]], [.5])
    with pytest.raises(PvnbError, match="NaN"):
        f([[0, 1], [1, 2]], [.5, np.nan])


def test_class_detections():
    s = segments(40, 3)
    p = np.random.default_rng(0).random((40, 4)) * .5
    p[:, 2] = 0
    boxes, labels, scores = class_detections(s, p, .05, .8, .9, .01)
    assert set(labels.tolist()) == {0, 2} and (scores >= .01).all() and len(boxes) == len(labels)
    for c in (0, 2):
        kept = hard_nms(s, p[:, c + 1], .8)
        kept = [i for i in kept if p[i, c + 1] > .05]
        picks, final = gaussian_soft_nms(s[kept], p[kept, c + 1], .9, .01)
        assert np.array_equal(boxes[labels == c], s[kept][picks]) and np.allclose(scores[labels == c], final)
    assert [x.tolist() for x in class_detections(s, p, 2.0)] == [[[0, 1]], [1], [1]]
    assert len(class_detections(s, p, 2.0, dummy=False)[1]) == 0
    with pytest.raises(PvnbError, match="40, 1"):
        class_detections(s, p[:3])


def test_result_rows_are_cut_off_at_the_ends():
    rows = result_rows([[-.1, .5], [.5, 1.5]] * 80, [.5] * 160, 10)
    assert len(rows) == 100 and rows[0] == {"score": .5, "segment": [0, 5]} and rows[1]["segment"] == [5, 10]


# --- boundaries and anchors


def test_boundaries_by_hand():
    scores = np.array([.1, .9, .2, .3, .1, .46])
    assert boundary_candidates(scores).tolist() == [False, True, False, True, False, True]
    assert boundary_candidates(scores, .1).tolist() == [True, True, True, True, True, True]
    first, last = boundary_pairs(np.ones(4), np.ones(4))
    assert list(zip(last - first, first, strict=True)) == [(d, s) for d in range(4) for s in range(4 - d)]
    first, last = boundary_pairs(np.ones(4), np.ones(4), longest=2)
    assert (last - first).max() == 1 and len(first) == 7


def test_anchors_encode_and_decode():
    anchors = anchor_boxes()
    assert anchors.shape == (1785, 2) and len(np.unique(anchors, axis=0)) == 1785 and anchor_boxes(128).shape == (7 * 63, 2)
    truth = np.array([[10., 60], [100, 180], [200, 460]])
    offsets, classes = encode_boxes(truth, [3, 7, 1], anchors)
    spans = decode_boxes(offsets, anchors)
    for k, c in enumerate((3, 7, 1)):
        assert (classes == c).any() and np.allclose(spans[classes == c], truth[k])
    positive = temporal_iou(decode_boxes(np.zeros((1785, 2)), anchors), truth).max(1)
    assert (classes[positive >= .5] > 0).all() and (classes[positive < .2] == 0).all()
    empty = encode_boxes([], [], anchors)
    assert not empty[0].any() and not empty[1].any()
    with pytest.raises(PvnbError, match="one label"):
        encode_boxes(truth, [1], anchors)


# --- what the original computed


def test_golden_bmn():
    a = golden("bmn/proposals")
    picks, final = soft_nms(a["raw"][:, :2], a["raw"][:, 2], *a["snms"])
    assert a["snms"].tolist() == list(BMN_SOFT_NMS.values())
    rows = [[*r["segment"], r["score"]] for r in result_rows(a["raw"][picks, :2], final, float(a["duration"]))]
    assert np.allclose(rows, a["final"], rtol=1e-12)


def test_golden_bsn():
    a = golden("bsn_pem/soft_nms")
    assert a["snms"].tolist() == list(BSN_SOFT_NMS.values())
    picks, final = soft_nms(a["rows"][:, :2], a["rows"][:, 2:].prod(1), *a["snms"])
    rows = [[*r["segment"], r["score"]] for r in result_rows(a["rows"][picks, :2], final, float(a["duration"]))]
    assert np.allclose(rows, a["final"], rtol=1e-12)


def test_golden_ctcn():
    a = golden("ctcn/boxes")
    offsets, classes = encode_boxes(a["gt_boxes"], a["gt_labels"], anchor_boxes())
    assert np.allclose(offsets, a["loc_targets"], rtol=1e-12) and np.array_equal(classes, a["cls_targets"])
    boxes, labels, scores = class_detections(decode_boxes(a["loc_preds"], anchor_boxes()), a["cls_preds"], *a["thresholds"])
    assert np.allclose(boxes, a["boxes"]) and np.array_equal(labels, a["labels"]) and np.allclose(scores, a["scores"], rtol=1e-9)
