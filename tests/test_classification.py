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


# --- where it errs, over batches and over interruptions


def batches(n=57, classes=7, size=8, seed=0):
    rng = np.random.default_rng(seed)
    scores, labels = rng.random((n, classes)), rng.integers(-1, classes, (n, 1))  # -1: unknown
    return [({"probabilities": scores[i:i + size], "loss": rng.random()}, {"label": labels[i:i + size]}) for i in range(0, n, size)], scores, labels


def test_confusion_adds_up_over_batches():
    parts, scores, labels = batches()
    metric = ClipAccuracy()
    assert metric.confusion is None
    for part in parts:
        metric.update(*part)
    assert np.array_equal(metric.confusion, confusion_matrix(scores, labels, 7)) and metric.confusion.dtype.kind == "i"
    assert metric.confusion.sum() == (labels >= 0).sum() and np.trace(metric.confusion) == metric.hits1
    assert all(type(v) in (int, float) for v in metric.compute().values()) and list(metric.compute()) == ["loss", "top1", "top5", "videos"]
    metric.reset()
    assert metric.confusion is None


@pytest.mark.parametrize("stop", range(9))
def test_a_state_through_a_file_changes_no_figure(stop, tmp_path):
    parts, _, _ = batches()
    whole, first, second = ClipAccuracy(), ClipAccuracy(), ClipAccuracy()
    for part in parts:
        whole.update(*part)
    for part in parts[:stop]:
        first.update(*part)
    np.savez(tmp_path/"state.npz", **first.state())
    with np.load(tmp_path/"state.npz", allow_pickle=False) as state:
        second.restore(dict(state))
    assert (second.confusion is None) == (stop == 0)
    for part in parts[stop:]:
        second.update(*part)
    assert second.compute() == whole.compute() and np.array_equal(second.confusion, whole.confusion)
    assert first.videos == sum(len(b["label"]) for _, b in parts[:stop])  # the first is a metric of its own


def test_what_is_no_state_or_of_other_classes_is_refused():
    metric = ClipAccuracy()
    with pytest.raises(PvnbError, match="no state of a ClipAccuracy: it holds other"):
        metric.restore({"other": np.zeros(3)})
    metric.update({"probabilities": np.eye(3)}, {"label": np.arange(3)})
    with pytest.raises(PvnbError, match="of 2 classes, and of 3 before"):
        metric.update({"probabilities": np.eye(2)}, {"label": np.arange(2)})
    assert metric.compute()["videos"] == 3 and metric.confusion.tolist() == np.eye(3).tolist()


# --- and as a picture


@pytest.mark.parametrize("n", [2, 10, 400])
def test_confusions_can_be_read(n, tmp_path):
    from paddlevideo_nb.plots import confusion_figure, save_figure, worst_confusions
    table = np.diag(np.full(n, 5))
    table[1, 0], table[0, n - 1] = 4, table[0, n - 1] + (n > 2)
    names = [f"class {i}" for i in range(n)]
    assert worst_confusions(table, names, 2) == [("class 1", "class 0", 4)] + [("class 0", f"class {n - 1}", 1)] * (n > 2)
    fig = confusion_figure(table, names, "title")
    texts = [t.get_text() for ax in fig.axes for t in ax.texts]
    if n <= 10:
        assert sorted(texts) == sorted(str(v) for v in table.ravel() if v) and [t.get_text() for t in fig.axes[0].get_yticklabels()] == names
    else:
        assert "class 1 taken for class 0: 4" in texts[0] and "class 0 taken for class 399: 1" in texts[0]
    drawn = np.asarray(fig.axes[0].images[0].get_array())
    assert drawn.shape[0] <= 150 and drawn[0, -1] == pytest.approx(1/6 if n > 2 else 0) and drawn.max() == 1  # a lonely confusion is not lost
    assert fig.axes[0].get_xlim() == (-.5, n - .5) and save_figure(fig, tmp_path/"c.png").stat().st_size <= 150_000


@pytest.mark.parametrize("table, names", [(np.zeros((2, 3)), None), (np.zeros((0, 0)), None), (np.eye(3), ["a", "b"])])
def test_what_is_no_confusion_matrix_is_said(table, names):
    from paddlevideo_nb.plots import confusion_figure
    with pytest.raises(PvnbError, match="expected .C, C. and a name for each class"):
        confusion_figure(table, names)
