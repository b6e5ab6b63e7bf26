"""AR@AN and AUC: hand-computed cases, an independent plain evaluation, the official program's figures, scale."""
import json
import time

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir, repo_dir
from paddlevideo_nb.metrics.proposals import THRESHOLDS, evaluate_proposals, proposal_curve, read_ground_truth, read_results


def ground_truth(table, subset="validation"):
    "{video: segments} in the server's form."
    return {"database": {v: {"subset": subset, "duration": 100, "annotations": [{"segment": s, "label": "x"} for s in found]} for v, found in table.items()}}


def results(table):
    "{video: [(score, start, end)]} in the server's form."
    return {"version": "VERSION 1.3", "external_data": {}, "results": {v: [{"score": p, "segment": [a, b]} for p, a, b in rows] for v, rows in table.items()}}


def oracle(truth, found, most):
    "The rules, step by step, with a stable order (so: no ties in lists of more than 16). Recall [10, 100], number [100]."
    def agrees(a, b, t):
        inter = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return inter / (a[1] - a[0] + b[1] - b[0] - inter) >= t
    total = sum(len(rows) for rows in found.values())
    lists = {}
    for video in truth:
        rows = found.get(video, [])
        rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (rows[i][0], i), reverse=True)]
        lists[video] = rows[:min(int(len(rows) * (most * float(len(truth)) / total)), len(rows))]
    remaining = sum(map(len, lists.values()))
    recall, number = np.zeros((10, 100)), []
    for j in range(100):
        share = (j + 1) / 100.0 * (most * float(len(truth)) / remaining)
        number.append(share * (float(remaining) / len(truth)))
        for k, t in enumerate(THRESHOLDS):
            hits = 0
            for video, actions in truth.items():
                taken = lists[video][:min(int(len(lists[video]) * share), len(lists[video]))]
                hits += sum(any(agrees(action, row[1:], t) for row in taken) for action in actions)
            recall[k, j] = hits / sum(map(len, truth.values()))
    return recall, np.array(number)


def world(seed, videos=7, per_video=25, ties=False):
    rng = np.random.default_rng(seed)
    truth = {f"v{i}": [[a, a + 5 + 30 * rng.random()] for a in rng.random(rng.integers(1, 4)) * 60] for i in range(videos)}
    found = {}
    for v, actions in list(truth.items())[:-1]:  # the last has no entry at all
        n = int(rng.integers(0, 15 if ties else per_video))
        near = [np.array(actions[rng.integers(len(actions))]) + rng.normal(0, 3, 2) for _ in range(n)]
        found[v] = [(float(rng.integers(0, 4) / 4 if ties else rng.random()), float(min(s)), float(max(s))) for s in near]
    found["elsewhere"] = [(.9, 1., 2.)] * 5
    return truth, found


# --- by hand


def test_one_video_by_hand():
    truth = ground_truth({"a": [[10, 20], [40, 60]]})
    found = results({"a": [(.9, 12, 21), (.8, 11, 20), (.7, 70, 80), (.6, 45, 70), (.5, 41, 59)]})
    report = evaluate_proposals(truth, found, max_average=5)
    assert report["recall"][0, [19, 39, 59, 79, 99]].tolist() == [.5, .5, .5, 1, 1]  # tIoU 0.5: 8/11 and then 15/30
    assert report["recall"][8, [19, 39, 59, 79, 99]].tolist() == [0, .5, .5, .5, 1]  # 0.9: 9/10 and 18/20
    assert not report["recall"][:, 18].any() and np.isclose(report["average_number"][-1], 5)


def test_area_by_hand():
    "A perfect proposal alone, at most 100: it is taken from the first step on."
    report = evaluate_proposals(ground_truth({"a": [[0, 10]]}), results({"a": [(1., 0, 10)]}))
    assert (report["recall"] == 1).all() and report["average_number"].tolist() == pytest.approx(range(1, 101)) and report["auc"] == pytest.approx(.99)
    assert report["ar1"] == report["ar100"] == 1


def test_shares_not_numbers():
    "Two videos, 3 and 1 proposals, two a video: at step 50 the first gives a share of one half, rounded down to 1, the other none."
    truth = ground_truth({"a": [[0, 10]], "b": [[0, 10]]})
    found = results({"a": [(.9, 0, 10), (.8, 50, 60), (.7, 70, 80)], "b": [(1., 0, 10)]})
    report = evaluate_proposals(truth, found, max_average=2)
    assert report["average_recall"][[32, 33, 98, 99]].tolist() == [0, .5, .5, 1]


def test_cutting_to_the_average():
    "Four proposals, one a video on average: the share is a quarter, and the best of each list stays."
    found = {"a": [(.1, 0, 10), (.9, 50, 60), (.2, 50, 60), (.3, 50, 60)]}
    report = evaluate_proposals(ground_truth({"a": [[0, 10]]}), results(found), max_average=1)
    assert report["ar100"] == 0 and np.isclose(report["average_number"][-1], 1)
    found["a"][0] = (.95, 0, 10)
    assert evaluate_proposals(ground_truth({"a": [[0, 10]]}), results(found), max_average=1)["ar100"] == 1


def test_ties_duplicates_blocked_and_missing():
    truth = {"a": [[0, 10]], "b": [[20, 30]]}
    tie = {"a": [(.5, 50, 60), (.5, 0, 10)], "b": []}
    report = evaluate_proposals(ground_truth(truth), results(tie), max_average=1)
    assert report["ar100"] == .5 and report["videos_without_proposals"] == 1, "of equal scores the later comes first: at the end both are taken"
    assert evaluate_proposals(ground_truth(truth), results(tie), max_average=.5)["ar100"] == .5
    assert evaluate_proposals(ground_truth(truth), results({"a": tie["a"][::-1]}), max_average=.5)["ar100"] == 0
    copies = evaluate_proposals(ground_truth(truth), results({"a": [(.5, 0, 10)] * 4, "b": [(.4, 20, 30)]}))
    assert copies["ar100"] == 1
    blocked = evaluate_proposals(ground_truth(truth), results(tie), blocked=["b"])
    assert blocked["videos"] == 1 and blocked["ar100"] == 1 and blocked["proposals"] == 2
    with pytest.raises(PvnbError, match="no segment"):
        evaluate_proposals(ground_truth(truth), results(tie), blocked=["a", "b"])


def test_only_the_subset_counts():
    truth = ground_truth({"a": [[0, 10]]})
    truth["database"]["t"] = {"subset": "training", "annotations": [{"segment": [0, 10], "label": "x"}]}
    truth["database"]["e"] = {"subset": "validation", "annotations": []}
    report = evaluate_proposals(truth, results({"a": [(1., 0, 10)], "t": [(1., 0, 10)] * 3}))
    assert (report["videos"], report["segments"], report["proposals"], report["proposals_elsewhere"]) == (1, 1, 4, 3)
    assert evaluate_proposals(truth, results({"t": [(1., 0, 10)]}), subset="training")["ar100"] == 1


def test_nothing_proposed():
    with np.errstate(all="raise"):
        report = evaluate_proposals(ground_truth({"a": [[0, 10]]}), results({}))
    assert report["auc"] == 0 and report["average_number"][-1] == 100 and not report["recall"].any()


# --- against the plain evaluation


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [100, 10, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_plain_evaluation(seed, most, ties):
    truth, found = world(seed, ties=ties)
    report = evaluate_proposals(ground_truth(truth), results(found), max_average=most)
    recall, number = oracle(truth, found, most)
    assert np.abs(report["recall"] - recall).max() < 1e-12 and np.allclose(report["average_number"], number, rtol=1e-12)
    area = np.sum(np.diff(number) * (recall.mean(0)[1:] + recall.mean(0)[:-1]) / 2) / number[-1]
    assert report["auc"] == pytest.approx(area, rel=1e-12)


def test_equals_the_official_program():
    folder = golden_dir() and golden_dir() / "metrics"
    if not folder or not (folder / "activitynet.npz").is_file():
        pytest.skip("golden metrics/activitynet is not here")
    a = np.load(folder / "activitynet.npz")
    report = evaluate_proposals(folder / "activitynet_ground_truth.json", folder / "activitynet_proposals.json")
    for name in ("recall", "average_recall", "average_number"):
        assert np.abs(report[name] - a[name]).max() < 1e-12
    assert 100 * report["auc"] == pytest.approx(float(a["auc"]), rel=1e-12)


# --- faults


@pytest.mark.parametrize("wrong, said", [({"resluts": {}}, "results"), ({"results": []}, "results"), ({"results": {"a": [{"score": 1}]}}, "video a"),
                                         ({"results": {"a": [{"segment": [1, 2]}]}}, "video a"), ({"results": {"a": [{"segment": [1], "score": 1}]}}, "video a"),
                                         ({"results": {"a": [{"segment": [0, 1], "score": float("nan")}]}}, "finite")])
def test_wrong_results_are_named(wrong, said):
    with pytest.raises(PvnbError, match=said):
        evaluate_proposals(ground_truth({"a": [[0, 10]]}), wrong)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(PvnbError, match="nowhere.json"):
        evaluate_proposals(tmp_path / "nowhere.json", results({}))
    (tmp_path / "half.json").write_text('{"database": {')
    with pytest.raises(PvnbError, match="half.json"):
        read_ground_truth(tmp_path / "half.json")
    (tmp_path / "other.json").write_text(json.dumps({"data": {}}))
    with pytest.raises(PvnbError, match="database"):
        read_ground_truth(str(tmp_path / "other.json"))
    with pytest.raises(PvnbError, match="subset 'testing'"):
        read_ground_truth(ground_truth({"a": [[0, 1]]}), "testing")
    with pytest.raises(PvnbError, match="threshold"):
        proposal_curve([0], [[0, 1]], [0], [[0, 1]], [1], thresholds=[0])


def test_read_results_unknown_labels():
    source = {"results": {"a": [{"segment": [0, 1], "score": 1, "label": "jmup"}, {"segment": [0, 1], "score": 1, "label": "jump"}]}}
    with pytest.raises(PvnbError, match="jmup.*did you mean 'jump'"):
        read_results(source, ["a"], classes=["jump"])
    assert read_results(source, ["a"], classes=["jump"], unknown="ignore")["labels"].tolist() == [0]


# --- scale


def test_validation_set_of_activitynet_in_time():
    real = repo_dir() and repo_dir().parent / "shared" / "data"
    if not real or not (real / "activitynet13_actions.json").is_file():
        pytest.skip("the annotations of ActivityNet-1.3 are not here")
    from paddlevideo_nb.datasets.activitynet import server_form
    truth = server_form(real / "activitynet13_actions.json", real / "activitynet13_video_info.csv")
    rng, found = np.random.default_rng(0), {}
    for name, entry in truth["database"].items():
        if entry["subset"] == "validation":
            spans = np.sort(rng.random((100, 2)) * entry["duration"], axis=1)
            found[name] = [{"score": p, "segment": s} for p, s in zip(rng.random(100).tolist(), spans.tolist(), strict=True)]
    begin = time.process_time()
    report = evaluate_proposals(truth, {"results": found})
    assert time.process_time() - begin < 10 and report["videos"] + report["proposals_elsewhere"] // 100 == len(found) == 4728
    assert 0 < report["ar1"] < report["ar10"] < report["ar100"] < 1
