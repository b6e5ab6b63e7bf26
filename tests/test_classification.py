"Accuracy of clips: exact on the original's recordings, and on the cases that crashed elsewhere."
import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.metrics.classification import (ClipAccuracy, confusion_matrix, per_class_accuracy, topk_accuracy, topk_hits,
                                                   within_pair_accuracy)


def by_loop(scores, labels, k):
    "Top-k, spelt out: count the classes that rank before the true one."
    hits = []
    for row, label in zip(scores, np.ravel(labels), strict=True):
        before = sum(s > row[label] or (s == row[label] and c < label) for c, s in enumerate(row))
        hits.append(before < k)
    return hits


def test_recorded_figures_exactly(repo):
    case = np.load(repo/"tests"/"golden"/"metrics"/"kinetics.npz")
    for k in (1, 5):
        assert topk_accuracy(case["scores"], case["labels"], k) == float(case[f"top{k}"])
    metric = ClipAccuracy()
    for i in range(0, len(case["scores"]), 7):  # the last batch is incomplete
        metric.update({"probabilities": case["scores"][i:i + 7]}, {"label": case["labels"][i:i + 7]})
    found = metric.compute()
    assert (found["top1"], found["top5"], found["videos"]) == (float(case["top1"]), float(case["top5"]), len(case["scores"]))


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 9))
    scores, labels = rng.integers(0, 3, (30, classes)).astype("float32"), rng.integers(0, classes, (30, 1))
    for k in (1, 2, 5):
        assert topk_hits(scores, labels, k).tolist() == by_loop(scores, labels, k)


def test_two_classes_at_top_5():
    metric = ClipAccuracy()
    metric.update({"probabilities": np.array([[.9, .1], [.2, .8]])}, {"label": np.array([[1], [1]])})
    assert metric.compute() == {"loss": 0.0, "top1": .5, "top5": 1.0, "videos": 2}


def test_a_constant_answer_is_not_right_everywhere():
    assert topk_accuracy(np.zeros((6, 6)), np.arange(6), 1) == 1/6


def test_diverged_networks_and_unknown_labels_are_wrong():
    scores = np.array([[np.nan, 1, 0], [np.nan] * 3, [1, 0, 0], [1, 0, 0]])
    labels = np.array([1, 0, -1, 0])
    assert topk_hits(scores, labels, 3).tolist() == [False, False, False, True]
    table = confusion_matrix(scores, labels, 3)
    assert table.sum() == 1 and table[0, 0] == 1


def test_infinite_scores_rank():
    assert topk_hits(np.array([[-np.inf, 0., np.inf]]), [2], 1).all()


@pytest.mark.parametrize("scores, labels, text", [
    (np.zeros((3, 4)), [0, 1], r"labels have shape \[2\]"), (np.zeros((3, 4)), [0, 1, 4], "from 0 to 4, expected -1"),
    (np.zeros((3, 4)), [-2, 1, 1], "from -2 to 1"), (np.zeros(4), [0], r"scores have shape \[4\]"), (np.zeros((2, 0)), [0, 0], r"\[2, 0\]"),
    (np.zeros((2, 3)), [0., 1.], "float64, expected integers"), (np.zeros((2, 3)), np.zeros((2, 2), int), r"\[2, 2\]")])
def test_faults_are_named(scores, labels, text):
    with pytest.raises(PvnbError, match=text):
        topk_accuracy(scores, labels, 1)


def test_nothing_to_count():
    with pytest.raises(PvnbError, match="no video"):
        ClipAccuracy().compute()
    with pytest.raises(PvnbError, match="no sample"):
        topk_accuracy(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(PvnbError, match="k is 0"):
        topk_accuracy(np.zeros((1, 3)), [0], 0)


def test_a_bad_batch_counts_nothing():
    metric = ClipAccuracy()
    with pytest.raises(PvnbError):
        metric.update({"probabilities": np.zeros((2, 3))}, {"label": np.array([0, 3])})
    assert metric.videos == 0


def test_loss_is_weighted_by_batch_size_and_reset_forgets():
    metric = ClipAccuracy()
    for n, loss in ((3, 1.0), (1, 5.0)):
        metric.update({"probabilities": np.eye(4)[:n], "loss": np.array([loss])}, {"label": np.arange(n)})
    assert metric.compute() == {"loss": 2.0, "top1": 1.0, "top5": 1.0, "videos": 4}
    metric.reset()
    metric.update({"probabilities": np.eye(4), "loss": None}, {"label": (np.arange(4) + 1) % 4})
    assert metric.compute() == {"loss": 0.0, "top1": 0.0, "top5": 1.0, "videos": 4}


def test_tensors_are_taken():
    from paddlevideo_nb.core import import_paddle
    paddle = import_paddle()
    metric = ClipAccuracy()
    outputs = {"probabilities": paddle.to_tensor(np.eye(3, dtype="float32")), "loss": paddle.to_tensor(.25)}
    metric.update(outputs, {"label": paddle.to_tensor([[0], [1], [0]])})
    assert metric.compute() == {"loss": .25, "top1": 2/3, "top5": 1.0, "videos": 3}


def test_confusion_and_classes():
    scores, labels = np.eye(4)[[0, 1, 1, 3, 3, 3]], np.array([0, 0, 1, 3, 3, 1])
    table = confusion_matrix(scores, labels, 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 2]]
    found = per_class_accuracy(table)
    assert found[[0, 1, 3]].tolist() == [.5, .5, 1] and np.isnan(found[2])
    assert np.trace(table)/table.sum() == topk_accuracy(scores, labels, 1)
    assert confusion_matrix(scores, labels, 6).shape == (6, 6)
    with pytest.raises(PvnbError, match="4 classes, expected 3"):
        confusion_matrix(scores, np.zeros(6, int), 3)


def test_pairs():
    scores = np.array([[.6, .4, 9, 0], [.6, .4, 9, 0], [0, 0, .5, .5]])
    assert within_pair_accuracy(scores, [0, 1, 2]) == .5
    assert within_pair_accuracy(scores, [0, 0, 3]) == 2.5/3
    with pytest.raises(PvnbError, match="pair up"):
        within_pair_accuracy(scores[:, :3], [0, 1, 2])
