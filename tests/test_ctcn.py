"""C-TCN: network, loss, task, metric, and the concept sequences."""
import pickle

import numpy as np
import pytest

from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, golden_dir, import_paddle
from paddlevideo_nb.ctcn_tasks import CTCNTask, read_durations, truth_of
from paddlevideo_nb.datasets.activitynet import read_ctcn_list, read_scores
from paddlevideo_nb.datasets.concepts import concept_video, make_concepts, signatures
from paddlevideo_nb.datasets.loader import collate
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.metrics.detection import evaluate_detections
from paddlevideo_nb.models.ctcn import CTCN, Stack, detection_loss, hardest_negatives
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.train import fit

paddle = import_paddle()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_concepts(tmp_path_factory.mktemp("concepts"), sizes={"train": 16, "val": 8})


@pytest.fixture(scope="module")
def task(world):
    lists = {s: {"filelist": str(world / f"{'train' if s == 'TRAIN' else 'val'}.listformat")} for s in ("TRAIN", "VALID", "TEST", "INFER")}
    lists["INFER"]["video_duration_file"] = str(world / "durations.list")
    return get_task(load_config("ctcn_mini", MODEL={"root": str(world)}, **lists))


def batch_of(data):
    return {k: v if isinstance(v, list) else paddle.to_tensor(v) for k, v in collate([data[i] for i in range(len(data))]).items() if k != "skipped"}


# --- the network


@pytest.mark.parametrize("size", [32, 64, 128])
def test_as_many_predictions_as_anchors(size):
    from paddlevideo_nb.metrics.temporal import anchor_boxes
    network = CTCN(4, 6, size, width=2, blocks=(1, 1, 1, 1))
    offsets, logits = network(paddle.randn([2, 1, size, 6]))
    assert offsets.shape == [2, len(anchor_boxes(size)), 2] and logits.shape == [2, len(anchor_boxes(size)), 4]
    assert float(offsets.abs().max()) <= 5


def test_faults_of_the_network():
    for size in (48, 16, 0):
        with pytest.raises(PvnbError, match="img_size"):
            CTCN(4, 6, size, width=2)
    with pytest.raises(PvnbError, match=r"\[N, 1, 32, 6\]"):
        CTCN(4, 6, 32, width=2, blocks=(1, 1, 1, 1))(paddle.zeros([1, 1, 32, 7]))
    with pytest.raises(PvnbError, match="depth is 3"):
        Stack(4, 6, 32, 3, 4, 4)


def test_concepts_stay_apart_until_the_heads():
    paddle.seed(0)
    network, order = CTCN(4, 6, 32, width=2, blocks=(1, 2, 1, 1)), [4, 2, 0, 5, 1, 3]
    network.eval()
    image = paddle.randn([1, 1, 32, 6])
    with paddle.no_grad():
        for a, b in zip(network.maps(image), network.maps(image[..., order]), strict=True):
            assert float((a[..., order] - b).abs().max()) < 1e-5
        assert float((network(image)[1] - network(image[..., order])[1]).abs().max()) > 1e-4


def test_plain_stack_mixes_and_concept_wise_does_not():
    for concept_wise in (True, False):
        stack = Stack(4, 6, 32, 2, 4, 4, concept_wise)
        stack.eval()
        x = paddle.randn([1, 1, 32, 6])
        y = x if concept_wise else x.transpose([0, 3, 2, 1])
        assert stack.body(stack.stem(y)).shape == [1, 4, 8, 6 if concept_wise else 1]


def test_names_count_like_the_original():
    names = original_names(CTCN(4, 6, 32, width=2))
    convs = {n for n in names.values() if n.startswith("conv2d_")}
    assert "conv2d_53.w_0" in convs and "conv2d_53.b_0" not in convs and "conv2d_54.b_0" in convs
    assert {"loc_pred_conv1_weights", "cls_pred_conv2_bias"} <= set(names.values())


# --- the loss


def naive_loss(offsets, logits, targets, classes):
    "Anchor by anchor, in NumPy."
    location = classification = positives = 0.0
    for o, z, t, y in zip(offsets, logits, targets, classes, strict=True):
        p = np.exp(z - z.max(1, keepdims=True))
        losses = -np.log(p/p.sum(1, keepdims=True))[np.arange(len(y)), np.maximum(y, 0)]*(y >= 0)
        positive = np.flatnonzero(y > 0)
        d = np.abs(o - t)[positive]
        location += np.where(d < 1, .5*d**2, d - .5).sum()
        negatives = sorted(losses[y <= 0], reverse=True)[:3*len(positive)]
        classification += losses[positive].sum() + sum(negatives)
        positives += len(positive)
    return (2*location + classification)/positives


def test_loss_against_a_loop():
    rng = np.random.default_rng(0)
    offsets, targets, logits = rng.normal(0, 2, (3, 40, 2)), rng.normal(0, 2, (3, 40, 2)), rng.normal(0, 2, (3, 40, 5))
    classes = np.where(rng.random((3, 40)) < .15, rng.integers(1, 5, (3, 40)), 0)
    classes[0, :3] = -1
    ours = detection_loss(*(paddle.to_tensor(v.astype("float32")) for v in (offsets, logits, targets)), paddle.to_tensor(classes))
    assert float(ours[0]) == pytest.approx(naive_loss(offsets, logits, targets, classes), rel=1e-5)
    assert float(ours[0]) == pytest.approx(float(ours[1] + ours[2]), rel=1e-6)


def test_loss_without_a_positive_is_zero_and_has_a_gradient():
    logits = paddle.randn([2, 10, 3])
    logits.stop_gradient = False
    loss, *_ = detection_loss(paddle.zeros([2, 10, 2]), logits, paddle.ones([2, 10, 2]), paddle.zeros([2, 10], "int64"))
    loss.backward()
    assert float(loss) == 0 and float(logits.grad.abs().sum()) == 0


def test_hardest_negatives_video_by_video():
    losses = paddle.to_tensor([[9., 1., 5., 4., 3., 2.], [1., 2., 3., 4., 5., 6.]])
    positive = paddle.to_tensor([[True, False, False, False, False, False], [False]*6])
    assert hardest_negatives(losses, positive).tolist() == [[0, 0, 1, 1, 1, 0], [0]*6]


# --- the task


def test_metric_agrees_with_the_official_evaluation(task, world):
    "The same detections through files in the server's form, in seconds."
    network = task.network()
    network.eval()
    data = task.dataset("valid")
    with paddle.no_grad():
        measured = evaluate(task, network, data, mode="valid", progress=False)
        outputs = task.forward(network, batch_of(data))
    durations = read_durations(world / "durations.list")
    truth = {name: {"subset": "validation", "duration": durations[name], "annotations": [{"segment": (s*durations[name]).tolist(), "label": str(k)} for s, k in zip(*v, strict=True)]}
             for name, v in truth_of(world / "val.listformat").items()}
    results = {}
    for i, name in enumerate(v["name"] for v in data.videos):
        segments, labels, scores = task.detections(outputs["offsets"][i].numpy(), outputs["probabilities"][i].numpy(), "valid")
        results[name] = [{"segment": (s*durations[name]).tolist(), "label": str(k), "score": float(p)} for s, k, p in zip(segments, labels, scores, strict=True)]
    official = evaluate_detections({"database": truth}, {"results": results}, unknown="ignore")
    assert measured["map"] == pytest.approx(official["average_map"], abs=1e-9) and measured["map50"] == pytest.approx(official["mean_ap"][0], abs=1e-9)


def test_metric_names_a_video_that_no_list_has(task):
    batch = batch_of(task.dataset("valid"))
    batch["name"][0] = "stranger"
    network = task.network()
    with paddle.no_grad(), pytest.raises(PvnbError, match="stranger"):
        outputs = task.forward(network, batch)
        task.metric("valid").update(outputs, batch)


def test_predictions_are_in_seconds(task, world):
    network = create_model("CTCN", task.config)
    batch = batch_of(task.dataset("infer"))
    with paddle.no_grad():
        found = task.predictions(task.forward(network, batch, "infer"), batch, 5)
    durations = read_durations(world / "durations.list")
    assert len(found) == 8 and any(len(p["segments"]) for p in found)
    for p in found:
        assert len(p["segments"]) <= 5 and p["scores"] == sorted(p["scores"], reverse=True)
        assert all(0 <= a <= b <= durations[p["name"]] + 1e-9 for a, b in p["segments"]) and set(p["classes"]) <= set(range(8))


def test_training_lowers_the_loss(task):
    data = task.dataset("train", seed=1)
    _, history = fit(task, epochs=6, seed=0, train_data=data, valid_data=task.dataset("valid"), valid_interval=6, log_interval=1, progress=False)
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0] and 0 <= history[-1]["valid_map"] <= 1


def test_faults_of_the_task(task, tmp_path):
    with pytest.raises(PvnbError, match="total_num_anchors is 100, expected 217"):
        CTCNTask(load_config("ctcn_mini", MODEL={"total_num_anchors": 100})).network()
    (tmp_path / "d").write_text("one 30 4.5\ntwo 30 soon\n")
    with pytest.raises(PvnbError, match="line 2"):
        read_durations(tmp_path / "d")


# --- the data


def test_concepts_are_deterministic_and_in_ctcn_form(world, tmp_path):
    again = make_concepts(tmp_path, sizes={"train": 16, "val": 8})
    names = sorted(str(p.relative_to(world)) for p in world.rglob("*") if p.is_file())
    assert len(names) == 2*24 + 4 and all((again / n).read_bytes() == (world / n).read_bytes() for n in names)
    for video in read_ctcn_list(world / "train.listformat"):
        scores = read_scores(*(world / s / f"{video['name']}.pkl" for s in ("rgb", "flow")))
        assert scores.shape == (video["frames"], 20) and len(video["labels"]) and set(video["labels"]) <= set(range(1, 9))
        assert (video["segments"][:, 0] < video["segments"][:, 1]).all() and video["segments"].max() <= video["frames"] and (np.diff(video["segments"].ravel()) > 0).all()


def test_train_and_validation_differ_and_faults(world, tmp_path):
    first = [pickle.loads((world / "rgb" / f"concepts_{s}_0000.pkl").read_bytes())["scores"] for s in ("train", "val")]
    assert first[0].shape != first[1].shape or not np.array_equal(*first)
    with pytest.raises(PvnbError, match="sizes"):
        make_concepts(tmp_path, sizes={"train": 0})


def test_twins_share_their_concepts():
    for k in range(0, 8, 2):
        assert set(signatures()[k]) == set(signatures()[k + 1]) and not np.array_equal(signatures()[k], signatures()[k + 1])
    for seed in range(200):
        scores, segments, labels = concept_video(np.random.default_rng(seed))
        assert len(segments) == len(labels) >= 1 and np.isfinite(scores).all() and segments.max() <= len(scores)


# --- parity


@pytest.mark.skipif(golden_dir() is None or not (golden_dir() / "ctcn").is_dir(), reason="no golden data")
def test_golden_inference():
    from paddlevideo_nb.core import read_json
    from paddlevideo_nb.parity import check_inference
    folder = golden_dir() / "ctcn"
    with np.load(folder / "reduced.npz") as arrays:
        rows = check_inference("reduced", read_json(folder / "reduced.json"), dict(arrays))
    assert len(rows) == 10 and all(r["verdict"] == "ok" for r in rows)
