"""Detection mAP: hand-computed cases, an independent plain evaluation, the official program's figures, scale."""
import time

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir
from paddlevideo_nb.metrics.detection import detection_ap, evaluate_detections, interpolated_ap
from paddlevideo_nb.metrics.proposals import THRESHOLDS


def ground_truth(table):
    "{video: [(label, start, end)]} in the server's form."
    return {"database": {v: {"subset": "validation", "annotations": [{"label": c, "segment": [a, b]} for c, a, b in rows]} for v, rows in table.items()}}


def results(table):
    "{video: [(label, score, start, end)]} in the server's form."
    return {"results": {v: [{"label": c, "score": p, "segment": [a, b]} for c, p, a, b in rows] for v, rows in table.items()}}


def ap(truth, found, threshold=.5, **keys):
    report = evaluate_detections(ground_truth(truth), results(found), thresholds=[threshold], **keys)
    return dict(zip(report["classes"], report["ap"][0].tolist(), strict=True))


def oracle(truth, found, threshold):
    "Average precision by class, one detection after the other; a precision-recall curve made monotonous from the right."
    def iou(a, b):
        inter = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return inter / (a[1] - a[0] + b[1] - b[0] - inter)
    classes, answer = dict.fromkeys(c for rows in truth.values() for c, *_ in rows), {}
    for c in classes:
        rows = [(p, i, v, s) for i, (v, p, *s) in enumerate((v, p, a, b) for v, found_rows in found.items() for k, p, a, b in found_rows if k == c)]
        rows.sort(key=lambda r: r[:2], reverse=True)  # of equal scores the later first: right for up to 16, so the worlds below keep to that
        actions = [(v, s) for v, truth_rows in truth.items() for k, *s in truth_rows if k == c]
        free, curve, hits = set(range(len(actions))), [(0.0, 0.0)], 0
        for n, (_, _, video, segment) in enumerate(rows, 1):
            fits = sorted(((iou(segment, s), j) for j, (v, s) in enumerate(actions) if v == video and j in free), reverse=True)
            if fits and fits[0][0] >= threshold:
                free.remove(fits[0][1])
                hits += 1
            curve.append((hits / len(actions), hits / n))
        answer[c] = sum((r1 - r0) * max(p for r, p in curve[k + 1:]) for k, ((r0, _), (r1, _)) in enumerate(zip(curve, curve[1:], strict=False)))
    return answer


def world(seed, videos=6, classes=3, most=6):
    rng = np.random.default_rng(seed)
    truth = {f"v{i}": [(f"c{rng.integers(classes)}", a, a + 4 + rng.integers(0, 12)) for a in rng.integers(0, 30, rng.integers(1, 5)).tolist()] for i in range(videos)}
    found, known = {}, sorted({c for rows in truth.values() for c, *_ in rows})
    count = dict.fromkeys(known, 0)
    for v, rows in truth.items():
        found[v] = []
        for _ in range(int(rng.integers(0, most))):
            c, a, b = rows[rng.integers(len(rows))]
            c = known[rng.integers(len(known))] if rng.random() < .2 else c
            if count[c] < 16:
                count[c] += 1
                found[v].append((c, float(rng.integers(0, 5) / 5), float(a + rng.integers(-2, 3)), float(b + rng.integers(-1, 3))))
    return truth, found


# --- by hand


def test_one_class_by_hand():
    truth = {"a": [("x", 10, 20), ("x", 40, 60), ("x", 70, 80)]}
    found = {"a": [("x", .9, 11, 20), ("x", .8, 9, 20), ("x", .7, 30, 35), ("x", .6, 42, 60), ("x", .5, 85, 95), ("x", .4, 71, 82)]}
    assert ap(truth, found)["x"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)  # precisions 1/1, 2/4, 3/6
    assert ap(truth, found, .85)["x"] == pytest.approx((1 + 1 / 2) / 3)  # 9/12 is no longer enough for the third
    assert interpolated_ap([True, False, True], 4) == pytest.approx((1 + 2 / 3) / 4)
    assert interpolated_ap([False, True], 1) == .5 and interpolated_ap([], 3) == 0


def test_duplicates_and_neighbours():
    truth = {"a": [("x", 0, 10), ("x", 0, 8)]}
    assert ap(truth, {"a": [("x", .9, 0, 10)] * 3}, .75)["x"] == 1, "a second one claims the neighbour that is still free; wrong ones after full recall cost nothing"
    assert ap(truth, {"a": [("x", .9, 0, 10)] * 3}, .85)["x"] == .5
    assert ap({"a": [("x", 0, 10)]}, {"a": [("x", .9, 20, 30), ("x", .8, 0, 10)]})["x"] == .5


def test_order_of_equal_scores_is_the_later_first():
    truth = {"a": [("x", 0, 10)]}
    assert ap(truth, {"a": [("x", .5, 0, 10), ("x", .5, 50, 60)]})["x"] == .5
    assert ap(truth, {"a": [("x", .5, 50, 60), ("x", .5, 0, 10)]})["x"] == 1


def test_other_videos_classes_and_subsets():
    truth = {"a": [("x", 0, 10)], "b": [("y", 0, 10)]}
    assert ap(truth, {"b": [("x", .9, 0, 10)], "a": [("x", .5, 0, 10)]}) == {"x": .5, "y": 0}, "right time, wrong video"
    assert ap(truth, {"nowhere": [("x", .9, 0, 10)], "a": [("x", .5, 0, 10)]})["x"] == .5
    assert ap(truth, {"b": [("x", .9, 0, 10)], "a": [("x", .5, 0, 10)]}, blocked=["b"]) == {"x": 1}, "a blocked video vanishes from both files"
    report = evaluate_detections(ground_truth(truth), results({"nowhere": [("x", .9, 0, 10)]}))
    assert (report["videos_without_detections"], report["classes_without_detections"], report["detections_elsewhere"], report["average_map"]) == (2, 1, 1, 0)
    assert evaluate_detections(ground_truth(truth), results({}))["ap"].tolist() == [[0, 0]] * 10


def test_unknown_labels():
    truth, found = {"a": [("jump", 0, 10)]}, {"a": [("jmup", .9, 0, 10), ("jump", .5, 0, 10)]}
    with pytest.raises(PvnbError, match="jmup.*did you mean 'jump'"):
        ap(truth, found)
    assert ap(truth, found, unknown="ignore") == {"jump": 1}


# --- against the plain evaluation


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_plain_evaluation(seed):
    truth, found = world(seed)
    report = evaluate_detections(ground_truth(truth), results(found))
    for k, threshold in enumerate(THRESHOLDS):
        expected = oracle(truth, found, threshold)
        assert report["classes"] == list(expected)
        assert np.allclose(report["ap"][k], list(expected.values()), rtol=1e-12, atol=1e-15)
    assert report["average_map"] == pytest.approx(report["mean_ap"].mean()) and len(report["mean_ap"]) == 10


def test_equals_the_official_program():
    folder = golden_dir() and golden_dir() / "metrics"
    if not folder or not (folder / "activitynet.npz").is_file():
        pytest.skip("golden metrics/activitynet is not here")
    a = np.load(folder / "activitynet.npz")
    report = evaluate_detections(folder / "activitynet_ground_truth.json", folder / "activitynet_detections.json")
    assert report["classes"] == a["classes"].tolist()
    for name in ("ap", "mean_ap"):
        assert np.abs(report[name] - a[name]).max() < 1e-12
    assert report["average_map"] == pytest.approx(float(a["average_map"]), rel=1e-12)


# --- arrays, faults, scale


def test_arrays():
    found = detection_ap([0], [[0, 10]], [1], [0, -1], [[0, 10], [0, 10]], [1, 1], [.9, .8], classes=3)
    assert found.shape == (10, 3) and np.isnan(found[:, [0, 2]]).all() and (found[:, 1] == 1).all(), "a class without annotation has no average precision"
    for wrong in (dict(scores=[np.nan]), dict(segments=[[0, 1, 2]]), dict(gt_videos=[], gt_segments=[], gt_labels=[]), dict(thresholds=[0])):
        keys = {**dict(gt_videos=[0], gt_segments=[[0, 10]], gt_labels=[0], videos=[0], segments=[[0, 1]], labels=[0], scores=[1]), **wrong}
        with pytest.raises(PvnbError):
            detection_ap(**keys)


def test_scale():
    rng, n, found = np.random.default_rng(0), 4728, 100
    gt = np.repeat(np.arange(n), 2)
    starts = rng.random(2 * n) * 80
    spans = np.sort(starts[2 * np.repeat(np.arange(n), found)][:, None] + [0, 20] + rng.normal(0, 5, (n * found, 2)), axis=1)
    labels = rng.integers(0, 200, n)
    begin = time.process_time()
    figures = detection_ap(gt, np.stack([starts, starts + 20], 1), labels[gt], np.repeat(np.arange(n), found), spans, np.repeat(labels, found), rng.random(n * found).round(3))
    assert time.process_time() - begin < 10 and figures.shape == (10, 200) and (np.diff(figures.mean(1)) < 0).all() and figures[0].mean() > .01
