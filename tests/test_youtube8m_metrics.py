"GAP, Hit@1, PERR and mAP against a per-example implementation, by hand, and against the original's figures."
import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.metrics.youtube8m import (YouTube8MMetrics, average_precision, average_precision_by_class, gap, hit_at_one, hit_at_one_release_1_8,
                                              precision_at_equal_recall, top_k)


def random_case(n, classes, seed=0, density=.1, digits=None):
    rng = np.random.default_rng(seed)
    scores = rng.random((n, classes), dtype="float32")
    return (scores if digits is None else scores.round(digits)), (rng.random((n, classes)) < density).astype("float32")


def walk(bets, positives):
    "Average precision of [(score, won)] without equal scores."
    total = found = 0
    for place, (_, won) in enumerate(sorted(bets, reverse=True), 1):
        found += won
        total += won*found/place
    return total/positives if positives else 0.0


def oracle(scores, labels, k=20):
    "(GAP, Hit@1, PERR, average precision per class), one example at a time."
    n, classes = scores.shape
    everything, by_class, hits, perr = [], [[] for _ in range(classes)], 0, 0.0
    for s, y in zip(scores.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(classes), key=lambda c: (-s[c], c))  # noqa: B023
        hits += y[ranked[0]] > 0
        wanted = sum(v > 0 for v in y)
        if wanted:
            perr += sum(y[c] > 0 and s[c] > 0 for c in ranked[:wanted])/wanted
        for c in ranked[:k]:
            everything.append((s[c], y[c] > 0))
            by_class[c].append((s[c], y[c] > 0))
    positives = (labels > 0).sum(0).tolist()
    return walk(everything, sum(positives)), hits/n, perr/n, [walk(b, p) for b, p in zip(by_class, positives, strict=True)]


def figures(scores, labels, size=None, **settings):
    metric = YouTube8MMetrics(**settings)
    for i in range(0, len(scores), size or len(scores)):
        metric.update({"probabilities": scores[i:i + (size or len(scores))]}, {"label": labels[i:i + (size or len(scores))]})
    return metric.compute(), metric


@pytest.mark.parametrize("n, classes, density", [(1, 1, 1), (40, 1, .5), (5, 2, .5), (60, 19, .2), (60, 20, .2), (50, 21, .6), (130, 300, .02), (300, 40, .9), (20, 700, .05)])
def test_against_one_example_at_a_time(n, classes, density):
    _, labels = random_case(n, classes, seed=n + classes, density=density)
    scores = ((np.random.default_rng(n).permutation(n*classes) + .5)/(n*classes)).reshape(n, classes).astype("float32")
    assert len(np.unique(scores)) == scores.size  # no ties: those have a test of their own
    found, metric = figures(scores, labels)
    theirs = oracle(scores, labels)
    assert np.allclose([found["gap"], found["hit1"], found["perr"]], theirs[:3], rtol=1e-12, atol=1e-15)
    assert np.allclose(metric.class_average_precisions(), theirs[3], rtol=1e-12)
    occurring = labels.any(0)
    assert np.isclose(found["mAP"], np.array(theirs[3])[occurring].mean() if occurring.any() else 0) and found["videos"] == n and "loss" not in found
    assert np.allclose([gap(scores, labels), hit_at_one(scores, labels), precision_at_equal_recall(scores, labels)], theirs[:3], rtol=1e-12, atol=1e-15)


def test_top_k_is_a_stable_sort():
    rng = np.random.default_rng(0)
    for n, classes, levels in itertools.product((1, 3, 130), (1, 2, 127, 128, 129, 257, 1000, 3862), (2, 50, 10**6)):
        scores = rng.integers(-levels, levels, (n, classes)).astype("float32")
        for k in {1, 20, classes}:
            best, which = top_k(scores, k)
            assert np.array_equal(which, np.argsort(-scores, axis=1, kind="stable")[:, :k]) and np.array_equal(best, np.take_along_axis(scores, which, 1))
    assert [a.shape for a in top_k(np.zeros((0, 500), "float32"), 20)] == [(0, 20), (0, 20)]
    assert top_k(np.array([[-np.inf, 1, np.inf, -np.inf]], "float32"), 3)[1].tolist() == [[2, 1, 0]]


def test_ties_give_the_mean_over_all_orders():
    rng = np.random.default_rng(1)
    for _ in range(30):
        scores, hits = rng.integers(0, 3, 7).astype(float), rng.random(7) < .4
        orders = [o for o in itertools.permutations(range(7)) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]
        mean = np.mean([sum(hits[o[i]]*sum(hits[j] for j in o[:i + 1])/(i + 1) for i in range(7))/9 for o in orders])
        assert np.isclose(average_precision(scores, hits, 9), mean, rtol=1e-12)


def test_ties_do_not_depend_on_the_order_of_videos():
    scores, labels = random_case(200, 60, digits=2, density=.05)  # a hundred values only
    found, _ = figures(scores, labels)
    order = np.random.default_rng(2).permutation(200)
    for size in (1, 33, None):
        again, _ = figures(scores[order], labels[order], size)
        assert all(np.isclose(again[k], v, rtol=1e-12) for k, v in found.items())
    same = np.full((50, 30), .25, "float32")  # nothing but ties: as good as its prior
    found, _ = figures(same, np.tile([1.0] + [0]*29, (50, 1)))
    assert found["hit1"] == 1 and found["perr"] == 1 and .05 < found["gap"] < .06  # 50 winners among 50 * 20 equal bets: a little over 1/20


def test_no_positives_all_positives_and_single_videos():
    scores, labels = random_case(30, 25)
    found, metric = figures(scores, np.zeros_like(labels))
    assert found == {"gap": 0, "hit1": 0, "perr": 0, "mAP": 0, "videos": 30} and not metric.class_average_precisions().any()
    found, metric = figures(scores, np.ones_like(labels))
    assert np.isclose(found["gap"], 20/25) and found["hit1"] == found["perr"] == 1  # five labels of each video are never bet on
    assert np.isclose(figures(scores, np.ones_like(labels), top_k=25)[0]["gap"], 1)
    found, _ = figures(np.array([[.2, .9]], "float32"), np.array([[1, 0]]))
    assert found == {"gap": .5, "hit1": 0, "perr": 0, "mAP": 1.0, "videos": 1}


def test_a_score_of_zero_is_no_answer_for_perr():
    scores, labels = np.array([[.5, 0, 0, 0]], "float32"), np.array([[0, 1, 1, 1]])
    assert precision_at_equal_recall(scores, labels) == 0 and precision_at_equal_recall(scores + 1, labels) == 2/3


def test_full_rankings_are_scikit_learns_average_precision():
    scores, labels = random_case(150, 12, digits=None, density=.3)
    metric = figures(scores, labels, top_k=12)[1]
    theirs = [average_precision_score(labels[:, c], scores[:, c]) for c in range(12)]
    assert np.allclose(metric.class_average_precisions(), theirs) and np.isclose(metric.compute()["gap"], average_precision_score(labels.ravel(), scores.ravel()))
    bets = np.arange(12).repeat(150)
    assert np.allclose(average_precision_by_class(scores.T.ravel(), bets, labels.T.ravel() > 0, labels.sum(0)), theirs)


@pytest.mark.parametrize("size", [1, 7, 128, 129, 500])
def test_batches_do_not_matter_and_a_state_goes_on(size):
    scores, labels = random_case(500, 90, digits=3, density=.04)
    whole, _ = figures(scores, labels)
    metric = YouTube8MMetrics()
    for i in range(0, 500, size):
        saved, metric = metric.state(), YouTube8MMetrics()
        metric.restore(saved)
        metric.update({"predictions": scores[i:i + size], "loss": np.float32(i)}, {"label": labels[i:i + size]})
    found = metric.compute()
    loss = found.pop("loss")
    assert all(np.isclose(found[k], v, rtol=1e-12) for k, v in whole.items())
    assert np.isclose(loss, np.average(range(0, 500, size), weights=[min(size, 500 - i) for i in range(0, 500, size)]))
    assert metric.compute() == {"loss": loss, **found}  # computing changes nothing
    metric.reset()
    with pytest.raises(PvnbError, match="no video"):
        metric.compute()


def test_memory_is_seven_bytes_a_bet():
    for classes in (50, 3862):
        scores, labels = random_case(64, classes)
        state = figures(scores, labels, 16)[1].state()
        assert sum(state[k].nbytes for k in ("scores", "classes", "hits")) == 64*20*7


def test_many_labels_and_classes_beyond_16_bits():
    scores, labels = random_case(3, 70_000, density=.01)
    found, metric = figures(scores, labels)
    assert labels.sum(1).min() > 500 and np.allclose([found["perr"], found["gap"]], [oracle(scores, labels)[i] for i in (2, 0)], rtol=1e-3, atol=1e-9)
    assert metric.state()["classes"].max() > 65535


def test_a_diverged_row_wins_nothing():
    scores, labels = random_case(20, 40, density=.2)
    labels[3] = 1
    scores[3, 39] = np.nan
    found, _ = figures(scores, labels)
    without = figures(np.delete(scores, 3, 0), np.delete(labels, 3, 0))[0]
    assert np.isclose(found["hit1"]*20, without["hit1"]*19) and np.isclose(found["perr"]*20, without["perr"]*19)
    assert np.isclose(found["gap"]*labels.sum(), without["gap"]*(labels.sum() - 40))
    assert figures(np.full((4, 6), np.nan), np.ones((4, 6)))[0]["gap"] == 0


def test_bad_input_is_named():
    metric = YouTube8MMetrics()
    for scores, labels, words in ((np.zeros(3), np.zeros(3), r"\[3\].*\[N, C\]"), (np.zeros((2, 3)), np.zeros((2, 1)), r"\[2, 1\].*\[2, 3\]"), (np.zeros((2, 0)), np.zeros((2, 0)), r"\[2, 0\]")):
        with pytest.raises(PvnbError, match=words):
            metric.update({"probabilities": scores}, {"label": labels})
    metric.update({"probabilities": np.zeros((2, 3))}, {"label": np.zeros((2, 3))})
    with pytest.raises(PvnbError, match="4 classes after some of 3"):
        metric.update({"probabilities": np.zeros((2, 4))}, {"label": np.zeros((2, 4))})
    assert metric.compute()["videos"] == 2
    for f in (hit_at_one, precision_at_equal_recall):
        with pytest.raises(PvnbError, match="no video"):
            f(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(PvnbError, match="top_k is 0"):
        YouTube8MMetrics(0)


def test_why_hit_at_one_contradicted_gap():
    "What users reported of release/1.8: a perfect network, and a Hit@1 near nothing that falls with the batch size."
    labels = np.eye(40, dtype="float32")[np.arange(400) % 40]
    assert np.isclose(gap(labels, labels), 1) and hit_at_one(labels, labels) == 1
    assert np.isclose(hit_at_one_release_1_8(labels, labels), 1/40)  # how common a label is
    assert [hit_at_one_release_1_8(labels[:n], labels[:n]) for n in (1, 2, 4)] == [1, .5, .25]
    scores, labels = random_case(37, 11, density=.3)
    literal = np.mean([[labels[j, scores[i].argmax()] for j in range(37)] for i in range(37)])
    assert np.isclose(hit_at_one_release_1_8(scores, labels), literal)


def test_confidence_across_videos_moves_gap_alone():
    scores, labels = random_case(80, 30)
    scaled = scores*np.random.default_rng(0).uniform(.01, 1, (80, 1)).astype("float32")
    assert hit_at_one(scores, labels) == hit_at_one(scaled, labels) and precision_at_equal_recall(scores, labels) == precision_at_equal_recall(scaled, labels)
    assert abs(gap(scores, labels) - gap(scaled, labels)) > 1e-3


def test_golden(golden):
    case = dict(np.load(golden/"metrics"/"youtube8m.npz"))
    scores, labels = case["predictions"], case["labels"]
    assert np.isclose(gap(scores, labels), case["gap"], rtol=1e-12) and np.isclose(precision_at_equal_recall(scores, labels), case["perr"], rtol=1e-12)
    assert hit_at_one_release_1_8(scores, labels) == case["hit_at_one"] and hit_at_one(scores, labels) == case["hit_at_one_before_release_1_8"]
    halves = [slice(0, 32), slice(32, None)]
    assert np.mean([hit_at_one_release_1_8(scores[h], labels[h]) for h in halves]) == case["accumulated_hit_at_one"]
    found, metric = figures(scores, labels, 32)
    assert np.isclose(found["gap"], case["accumulated_gap"], rtol=1e-12) and np.isclose(found["perr"], case["accumulated_perr"], rtol=1e-12)
    assert found["hit1"] == case["accumulated_hit_at_one_before_release_1_8"] and np.allclose(metric.class_average_precisions(), case["accumulated_aps"], rtol=1e-12)


def test_several_networks_together(tmp_path, capsys):
    "`pvnb eval A + B`: the metrics of the mean, on the feature sets of the digit theatre; other lists are refused."
    import json

    from paddlevideo_nb.cli import main
    from paddlevideo_nb.config import load_config
    from paddlevideo_nb.datasets.features import make_features
    from paddlevideo_nb.evaluate import evaluate_together
    from paddlevideo_nb.tasks import get_task
    from paddlevideo_nb.zoo import save_weights
    world = make_features(tmp_path, sizes={"flash": (10, 24), "orders": (2, 2), "topics": (4, 4)}, progress=False)
    small = dict(num_classes=10, feature_dims=[64, 16])
    makers = {"AttentionCluster": load_config("attention_cluster", hidden_sizes=[8, 8], cluster_nums=[2, 2], **small),
              "AttentionLSTM": load_config("attention_lstm", hidden_sizes=[8, 8], embedding_size=8, lstm_size=4, **small)}
    words, members = [], []
    for name, config in makers.items():
        for mode in ("TEST", "VALID"): config[mode].update(filelist=str(world/"flash"/"val.list"), batch_size=7)
        task = get_task(config)
        network = task.network()
        members.append((task, network))
        save_weights(tmp_path/f"{name}.safetensors", {k: v.numpy() for k, v in network.state_dict().items()})
        settings = {k: v for k, v in config.MODEL.items() if k in ("num_classes", "feature_dims", "hidden_sizes", "cluster_nums", "embedding_size", "lstm_size")}
        words += [name, "--weights", str(tmp_path/f"{name}.safetensors"), f"--filelist={world/'flash'/'val.list'}", "--batch_size=7", f"--save_dir={tmp_path}",
                  *(f"{k}={v}".replace(" ", "") for k, v in settings.items()), "+"]
    assert main(["eval", *words[:-1]]) == 0
    written = json.loads((tmp_path/"AttentionCluster+AttentionLSTM_metrics.json").read_text())
    mean, labels = [], []
    from paddlevideo_nb.datasets.loader import make_loader
    for task, network in members:
        network.eval()
        batches = list(make_loader(task.dataset("test"), 24))
        mean.append(task.forward(network, batches[0])["probabilities"].numpy())
        labels.append(batches[0]["label"].numpy())
    assert written["gap"] == pytest.approx(gap(np.mean(mean, 0), labels[0]), abs=1e-6) and written["videos"] == 24 and "loss" not in written
    members[1][0].config.TEST["filelist"] = str(world/"flash"/"train.list")
    with pytest.raises(PvnbError, match="10 samples"): evaluate_together(members, progress=False)
