"The metric over many views: against a plain transcription, in any order, interrupted, with faults."
import io
import math

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir, import_paddle
from paddlevideo_nb.metrics.classification import topk_accuracy
from paddlevideo_nb.metrics.multiview import MultiViewAccuracy, multiview_report

paddle = import_paddle()


def case(films=30, views=7, classes=9, seed=0):
    "(probabilities [V, C] float32, video [V], label [V]) of all views, film after film."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, films)
    p = rng.dirichlet(np.ones(classes), size=films * views)
    p[np.arange(films * views), np.repeat(labels, views)] += .05
    p /= p.sum(axis=1, keepdims=True)
    return p.astype(np.float32), np.repeat(np.arange(films), views), np.repeat(labels, views)


def fed(metric, data, order, batch=5):
    p, video, label = data
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        metric.update({"probabilities": p[part]}, {"video": video[part][:, None], "label": label[part][:, None]})
    return metric


@pytest.mark.parametrize("mixed", [False, True])
def test_equals_the_mean_of_all_views(mixed):
    p, video, label = data = case()
    order = np.random.default_rng(1).permutation(len(p)) if mixed else np.arange(len(p))
    metric = fed(MultiViewAccuracy(7), data, order)
    mean, truth = p.astype(np.float64).reshape(30, 7, 9).mean(axis=1), label[::7]
    found = metric.compute()
    assert found["top1"] == topk_accuracy(mean, truth, 1) and found["top5"] == topk_accuracy(mean, truth, 5) and 0 < found["top1"] < found["top5"] <= 1
    assert found["clip_top1"] == topk_accuracy(p, label, 1) and found["first_top1"] == np.mean(
        [p[i].argmax() == label[i] for i in [next(o for o in order if video[o] == v) for v in range(30)]])
    assert (found["videos"], found["views"], found["incomplete"], found["surplus"], found["least_views"], found["most_views"]) == (30, 210, 0, 0, 7, 7)
    for row in metric.rows(4):
        best = np.argsort(-mean[row["video"]])[:4]
        assert row["classes"] == best.tolist() and np.allclose(row["scores"], mean[row["video"]][best], atol=1e-12) and row["views"] == 7
    labels, answers = metric.answers()
    assert sorted(zip(labels.tolist(), answers.tolist(), strict=True)) == sorted(zip(truth.tolist(), mean.argmax(axis=1).tolist(), strict=True))


def test_surplus_views_change_nothing():
    data = case()
    once = fed(MultiViewAccuracy(7), data, np.arange(210))
    again = fed(MultiViewAccuracy(7), data, np.concatenate([np.arange(210), np.arange(40)]))
    assert again.compute() == {**once.compute(), "surplus": 40} and again.rows(9) == once.rows(9)


def test_incomplete_films_are_counted_and_judged_by_what_there_is():
    p, video, label = data = case()
    order = np.array([i for i in range(210) if i not in (0, 8, 9)])
    found = fed(MultiViewAccuracy(7), data, order).compute()
    assert found["incomplete"] == 2 and found["least_views"] == 5 and found["views"] == 207
    means = [p[order][video[order] == v].astype(np.float64).mean(axis=0) for v in range(30)]
    assert found["top1"] == topk_accuracy(np.stack(means), label[::7], 1)


@pytest.mark.parametrize("stop", [0, 3, 7, 52, 209, 210])
@pytest.mark.parametrize("mixed", [False, True])
def test_interrupted_anywhere(stop, mixed):
    data = case()
    order = np.random.default_rng(1).permutation(210) if mixed else np.arange(210)
    first = fed(MultiViewAccuracy(7), data, order[:stop])
    with io.BytesIO() as file:
        np.savez(file, **first.state())
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            state = dict(arrays)
    second = MultiViewAccuracy(7)
    second.restore(state)
    assert second.rows(5) == first.rows(5)
    whole = fed(MultiViewAccuracy(7), data, order)
    fed(second, data, order[stop:])
    assert second.compute() == whole.compute() and second.rows(9) == whole.rows(9)
    assert {k: v.tolist() for k, v in second.state().items()} == {k: v.tolist() for k, v in whole.state().items()}


def test_a_restored_metric_does_not_share_the_arrays():
    data = case(films=2)
    first = fed(MultiViewAccuracy(7), data, np.arange(3))
    state = first.state()
    before = state["totals"].copy()
    second = MultiViewAccuracy(7)
    second.restore(state)
    fed(second, data, np.arange(3, 6))
    assert np.array_equal(state["totals"], before) and first.compute()["views"] == 3 and second.compute()["views"] == 6


def test_memory_is_bounded():
    data, alive = case(), []
    metric = MultiViewAccuracy(7, keep=3)
    for i in range(210):
        fed(metric, data, np.array([i]))
        alive.append(sum(f.total is not None for f in metric.films.values()))
    assert max(alive) == 1 and alive[-1] == 0
    state = metric.state()
    assert state["totals"].size == 0 and state["best"].shape == (30, 3)
    with pytest.raises(PvnbError, match="expected 1 to 3"):
        metric.rows(4)


def test_losses_and_tensors():
    p, video, label = case(films=3, views=2)
    metric = MultiViewAccuracy(2)
    for part, loss in ((slice(0, 4), 1.0), (slice(4, 6), 4.0)):
        metric.update({"probabilities": paddle.to_tensor(p[part]), "loss": paddle.to_tensor(loss)},
                      {"video": paddle.to_tensor(video[part, None]), "label": paddle.to_tensor(label[part, None])})
    assert metric.compute()["loss"] == 2.0 and "loss" not in fed(MultiViewAccuracy(2), (p, video, label), np.arange(6)).compute()
    metric.reset()
    with pytest.raises(PvnbError, match="no view"):
        metric.compute()


def test_unknown_labels_and_nan():
    metric = MultiViewAccuracy(2)
    metric.update({"probabilities": np.array([[.9, .1], [.8, .2]])}, {"video": [0, 0]})
    assert metric.compute()["top1"] == 0 and metric.rows(2)[0]["classes"] == [0, 1] and math.isclose(metric.rows(1)[0]["scores"][0], .85)
    metric.update({"probabilities": np.array([[np.nan, np.nan], [.9, .1]])}, {"video": [1, 1], "label": [0, 0]})
    assert metric.compute()["top1"] == 0 and metric.compute()["clip_top1"] == 1 / 4, "a film with a NaN is wrong"


@pytest.mark.parametrize("outputs,batch,words", [
    ([[.5, .5]], {"label": [0]}, "no 'video'"), ([[.5, .5]], {"video": [0, 1], "label": [0, 1]}, r"expected \[N, C\]"), ([.5, .5], {"video": [0, 1]}, r"expected \[N, C\]"),
    ([[.5, .5]], {"video": [0], "label": [2]}, "0 to 1|expected"), ([[.5, .3, .2]], {"video": [0], "label": [0]}, "3 classes, and of 2"),
    ([[.5, .5]], {"video": [7], "label": [0]}, "video 7 has label 0 in one view and 1 in another")])
def test_faults(outputs, batch, words):
    metric = MultiViewAccuracy(3)
    metric.update({"probabilities": np.array([[.5, .5]])}, {"video": [7], "label": [1]})
    with pytest.raises(PvnbError, match=words):
        metric.update({"probabilities": np.array(outputs)}, batch)


def test_wrong_states_and_settings():
    state = fed(MultiViewAccuracy(7), case(), np.arange(20)).state()
    for metric, given, words in ((MultiViewAccuracy(6), state, "7 views"), (MultiViewAccuracy(7, keep=5), state, "20 best"), (MultiViewAccuracy(7), {"films": 0}, "no settings")):
        with pytest.raises(PvnbError, match=words):
            metric.restore(given)
    for wrong in (dict(num_views=0), dict(keep=0)):
        with pytest.raises(PvnbError, match="at least 1"):
            MultiViewAccuracy(**wrong)


def test_report_counts_films_without_a_view_as_wrong():
    p, video, label = case(films=4, views=3)
    truth = label[::3]
    seen = video != 2
    found = multiview_report(video[seen], p[seen], truth, 3)
    hits = [p[video == v].mean(axis=0).argmax() == truth[v] for v in (0, 1, 3)]
    assert found["top1_percent"] == round(100 * sum(hits) / 4, 2) and found["corrupted"] == 1 and found["min_clips"] == 0 and found["max_clips"] == 3


def test_golden():
    path = golden_dir() and golden_dir()/"metrics"/"multicrop.npz"
    if not path or not path.is_file():
        pytest.skip("the golden data is not here")
    a = np.load(path)
    found = multiview_report(a["video_ids"], a["probabilities"], a["ground_truth"], int(a["num_test_clips"]))
    rows = found.pop("infer_rows")
    assert len(found) == 7 and all(v == float(a[k]) for k, v in found.items())
    assert np.array_equal(rows[:, :2], a["infer_rows_video_class_probability"][:, :2])
    assert np.abs(rows[:, 2] - a["infer_rows_video_class_probability"][:, 2]).max() < 1e-15
