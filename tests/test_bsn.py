"""BSN: the two networks and their losses, PGM, the data set between the stages, its files, and faults."""
import numpy as np
import pytest

from paddlevideo_nb.bsn_stages import train_both
from paddlevideo_nb.bsn_tasks import ProposalDataset, find_segments, propose, read_proposals, write_proposals
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.loader import Skipped, make_loader
from paddlevideo_nb.models.bsn import BsnPem, BsnTem, boundary_loss, match, pem_loss, proposal_features, selection, start_end_proposals, tem_loss
from paddlevideo_nb.proposal_tasks import ProposalScores
from paddlevideo_nb.tasks import create_model, get_task, list_models

paddle = import_paddle()


def interp1d_feature(action, start, end, ratio=0.25, samples=(16, 8, 8), per_bin=3):
    "The BSP feature of one proposal, from the description in golden/README.md's case, reading by reading."
    T = len(action)
    centres = np.concatenate([[-0.5], np.arange(T) + 0.5, [T + 0.5]]) / T
    values = np.concatenate([[0], action, [0]])
    out, length = [], end - start
    for low, high, n in ((start, end, samples[0]), (start - ratio * length, start + ratio * length, samples[1]), (end - ratio * length, end + ratio * length, samples[2])):
        step = (high - low) / (n - 1)
        y = [np.interp(low - step / 2 + step / per_bin * i, centres, values, 0, 0) for i in range(n * per_bin + 1)]
        out += [np.mean(y[i * per_bin:(i + 1) * per_bin + 1]) for i in range(n)]
    return np.array(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from paddlevideo_nb.datasets.untrimmed import make_untrimmed
    return make_untrimmed(tmp_path_factory.mktemp("untrimmed"), sizes={"train": 8, "val": 4}, progress=False)


@pytest.fixture(scope="module")
def tasks(world):
    places = {"MODEL.anno_file": str(world / "annotations.json")}
    return (get_task(load_config("bsn_tem_mini", **places, **{"MODEL.feat_path": str(world / "features"), "TRAIN.batch_size": 4})),
            get_task(load_config("bsn_pem_mini", **places, **{"TRAIN.batch_size": 4})))


# --- networks


def test_models_are_listed_and_created():
    assert {"BsnTem", "BsnPem"} <= set(list_models())
    tem, pem = create_model("bsntem"), create_model("BSNPEM")
    assert tem(paddle.zeros([1, 400, 100])).shape == [1, 3, 100] and pem(paddle.zeros([1, 7, 32])).shape == [7, 1]


def test_tem_takes_any_length():
    assert [BsnTem(6, 4)(paddle.zeros([2, 6, n])).shape for n in (1, 5, 300)] == [[2, 3, 1], [2, 3, 5], [2, 3, 300]]


def test_idle_layer_of_pem_gets_no_gradient_and_the_other_wiring_does():
    for hidden in (False, True):
        network = BsnPem(hidden=hidden)
        network(paddle.rand([1, 5, 32])).sum().backward()
        assert (network.fc0.weight.grad is not None) == hidden and network.fc1.weight.grad is not None


# --- losses


def test_boundary_loss_is_the_originals_formula():
    rng = np.random.default_rng(0)
    p, g = rng.uniform(0.05, 0.95, (2, 3, 40)).astype("float32")
    positive, n = (g > 0.5), g.size
    ratio = n / positive.sum()
    theirs = -(0.5 * ratio * (np.log(p + 1e-6) * positive).mean() + 0.5 * n / (n - positive.sum() + 1) * (np.log(1 - p + 1e-6) * ~positive).mean())
    assert abs(float(boundary_loss(paddle.to_tensor(p), paddle.to_tensor(g))) - theirs) < 1e-5


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_losses_are_finite_without_positives_or_negatives(value):
    curves = paddle.to_tensor(np.random.default_rng(1).uniform(0, 1, (2, 3, 20)).astype("float32"))
    curves.stop_gradient = False
    target = paddle.full([2, 20], value)
    total, *_ = tem_loss(curves, target, target, target)
    total.backward()
    assert np.isfinite(float(total)) and np.isfinite(curves.grad.numpy()).all()
    predicted = paddle.rand([40, 1])
    assert np.isfinite(float(pem_loss(predicted, target.unsqueeze(2), paddle.rand([40, 2])))) and np.isfinite(float(pem_loss(predicted, target.unsqueeze(2))))


def test_selection_draws_the_expected_numbers_and_takes_all_where_high_ones_abound():
    rng = np.random.default_rng(2)
    overlap = paddle.to_tensor(rng.choice([0.1, 0.4, 0.8], (3000, 1), p=[0.6, 0.3, 0.1]).astype("float32"))
    draws = [selection(overlap, paddle.to_tensor(rng.random((3000, 2)).astype("float32"))).numpy() for _ in range(20)]
    assert np.abs(np.mean([d.sum() for d in draws]) / float(selection(overlap).sum()) - 1) < 0.05
    crowd = paddle.to_tensor([[0.9], [0.9], [0.9], [0.4], [0.1], [-1.0]])
    assert selection(crowd, paddle.rand([6, 2])).flatten().tolist() == [3, 3, 3, 2, 2, 0] == selection(crowd).flatten().tolist()


# --- PGM


def test_every_pair_of_candidates_best_first():
    rng = np.random.default_rng(3)
    for T in (1, 2, 7, 30):
        start, end = rng.random((2, T))
        found = start_end_proposals(start, end)
        scores = found["scores"].prod(1)
        assert (np.diff(scores) <= 0).all() and (found["segments"][:, 1] - found["segments"][:, 0] > 1 / T - 1e-9).all()
        assert len({tuple(s) for s in found["segments"]}) == len(scores)
        first = np.round(found["segments"][:, 0] * T).astype(int)
        assert np.allclose(found["scores"][:, 0], start[first])


def test_filling_up_is_reproducible_and_keeps_what_was_found():
    start, end = np.random.default_rng(4).random((2, 50)) ** 8
    few = start_end_proposals(start, end)
    a, b = (start_end_proposals(start, end, 900, rng=np.random.default_rng(7)) for _ in range(2))
    assert len(few["segments"]) < 900 == len(a["segments"]) and np.array_equal(a["segments"], b["segments"])
    assert {tuple(s) for s in few["segments"]} <= {tuple(s) for s in a["segments"]}
    assert (a["segments"][:, 1] > a["segments"][:, 0]).all() and a["segments"].min() >= 0 and a["segments"].max() <= 1 + 1e-12
    assert len(start_end_proposals(start, end, 5, rng=np.random.default_rng(0))["segments"]) == 5


@pytest.mark.parametrize("T", [1, 3, 20, 100, 400])
def test_features_equal_the_description(T):
    rng = np.random.default_rng(T)
    action, segments = rng.random(T), np.sort(rng.random((20, 2)), 1)
    ours = proposal_features(action, segments)
    assert ours.shape == (20, 32) and np.abs(ours - [interp1d_feature(action, *s) for s in segments]).max() < 1e-12
    assert proposal_features(action, np.zeros((0, 2))).shape == (0, 32)
    assert proposal_features(action, segments, samples=(5, 3, 4), per_bin=2).shape == (20, 12)


def test_match_without_annotation_is_zero():
    overlap, inside = match([[0.1, 0.2], [0.0, 1.0]], np.zeros((0, 2)))
    assert overlap.tolist() == inside.tolist() == [0, 0]
    assert match([[0.0, 0.5]], [[0.25, 1.0]])[0][0] == pytest.approx(0.25) and match([[0.0, 0.5]], [[0.25, 1.0]])[1][0] == pytest.approx(0.5)


def test_wrong_shapes_are_told():
    with pytest.raises(PvnbError, match=r"\[4\] and \[5\]"):
        start_end_proposals(np.zeros(4), np.zeros(5))
    with pytest.raises(PvnbError, match="proposals"):
        proposal_features(np.zeros(4), np.zeros((3, 3)))


# --- what passes between the stages


@pytest.fixture(scope="module")
def found(tasks):
    paddle.seed(0)
    network = tasks[0].network()
    return network, {mode: propose(tasks[0], network, tasks[0].dataset(mode), 60, progress=False) for mode in ("train", "valid")}


def test_propose_gives_every_video_and_the_same_again(tasks, found):
    network, both = found
    assert len(both["train"]) == 8 and len(both["valid"]) == 4
    again = propose(tasks[0], network, tasks[0].dataset("valid"), 60, batch_size=1, progress=False)
    for name, f in both["valid"].items():
        assert f["features"].shape == (60, 32) and f["overlap"].shape == (60,) and (f["inside"] >= f["overlap"] - 1e-12).all()
        assert np.allclose(again[name]["segments"], f["segments"])


def test_files_hold_what_memory_held(tmp_path, found):
    write_proposals(found[1]["valid"], tmp_path / "f", tmp_path / "p")
    for name, f in found[1]["valid"].items():
        read = read_proposals(name, tmp_path / "f", tmp_path / "p")
        assert all(np.array_equal(read[k], f[k]) for k in ("segments", "scores", "features", "overlap", "inside"))
    assert (tmp_path / "p" / f"{name}.csv").read_text().splitlines()[0] == "xmin,xmax,xmin_score,xmax_score,score,match_iou,match_ioa"


def test_damaged_files_are_skipped_in_training_and_told_in_prediction(tmp_path, found):
    write_proposals(found[1]["valid"], tmp_path, tmp_path)
    names = sorted(found[1]["valid"])
    (tmp_path / f"{names[0]}.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / f"{names[1]}.npy", np.zeros((3, 32)))
    (tmp_path / f"{names[2]}.csv").write_text("a,b\n1,2\n")
    data, strict = (ProposalDataset(None, names, mode, 60, tmp_path, tmp_path) for mode in ("train", "infer"))
    batch, = make_loader(data, 4)
    assert len(batch["skipped"]) == 3 and batch["feature"].shape == [1, 60, 32]
    for i, word in enumerate(("damaged", "expected \\[60, D\\]", "no column")):
        assert isinstance(data[i], Skipped)
        with pytest.raises(PvnbError, match=word):
            strict[i]
    with pytest.raises(PvnbError, match="nowhere"):
        ProposalDataset(None, ["nowhere"], "infer", 60, tmp_path, tmp_path)[0]


def test_unannotated_videos_cannot_be_learnt_from_but_predicted():
    f = start_end_proposals([0.9, 0.1, 0.2], [0.1, 0.2, 0.9])
    found = {"v": {**f, "features": proposal_features([0.5] * 3, f["segments"])}}
    assert isinstance(ProposalDataset(found)[0], Skipped) and "gt_iou" not in ProposalDataset(found, mode="infer")[0]


# --- the tasks


def test_both_stages_train_and_report(tmp_path, tasks):
    run, = train_both(*tasks, folder=tmp_path, epochs=2, progress=False)
    assert {"BsnTem_last.safetensors", "BsnPem_last.safetensors", "PGM_feature", "PGM_proposals"} <= {p.name for p in tmp_path.iterdir()}
    assert set(run["metrics"]["pem"]) == {"auc", "ar1", "ar5", "ar10", "ar100", "videos", "loss"} and run["metrics"]["pem"]["videos"] == 4
    name = sorted(run["found"]["valid"])[0]
    segments, scores, curves = find_segments(tasks[0], run["tem"], tasks[1], run["pem"], tasks[0].dataset("valid").feature(0).T)
    assert curves.shape == (3, 100) and (np.diff(scores) <= 0).all() and len(segments) == len(scores) == 99
    assert np.allclose(curves, run["found"]["valid"][name]["curves"], atol=1e-5)
    with pytest.raises(PvnbError, match="44"):
        find_segments(tasks[0], run["tem"], tasks[1], run["pem"], np.zeros((10, 7), "float32"))
    with pytest.raises(PvnbError, match="seeds"):
        train_both(*tasks, seeds=(0, 1), folder=tmp_path)


def test_stages_that_do_not_fit_are_told(tasks):
    other = get_task(load_config("bsn_pem_mini", **{"MODEL.feat_dim": 16}))
    with pytest.raises(PvnbError, match="32 numbers a proposal.*16"):
        train_both(tasks[0], other)


def test_filled_rows_change_no_result(tasks):
    rng = np.random.default_rng(5)
    curves = [rng.random((3, n)) for n in (5, 12)]
    found = {}
    for i, c in enumerate(curves):
        f = start_end_proposals(c[0], c[1])
        found[f"v{i}"] = {**f, "features": proposal_features(c[2], f["segments"]), "overlap": rng.random(len(f["segments"]))}
    data, network = ProposalDataset(found, mode="valid"), tasks[1].network()
    network.eval()
    batch, = make_loader(data, 2)
    with paddle.no_grad():
        outputs = tasks[1].forward(network, batch)
    for i, (segments, scores) in enumerate(tasks[1].proposals(outputs, batch)):
        alone, = make_loader(ProposalDataset({f"v{i}": found[f"v{i}"]}, mode="valid"), 1)
        with paddle.no_grad():
            (a, b), = tasks[1].proposals(tasks[1].forward(network, alone), alone)
        assert np.allclose(a, segments) and np.allclose(b, scores) and segments.min() >= 0


def test_perfect_proposals_score_one(world):
    from paddlevideo_nb.datasets.activitynet import read_videos
    metric, videos = ProposalScores(str(world / "annotations.json")), read_videos(world / "annotations.json", "validation")[0]
    metric.update({"found": [(v["segments"], np.ones(len(v["segments"]))) for v in videos]}, {"name": [v["name"] for v in videos]})
    assert metric.compute()["ar100"] == pytest.approx(1.0) and metric.compute()["videos"] == 4
    with pytest.raises(PvnbError, match="nobody"):
        metric.update({"found": [(np.zeros((0, 2)), np.zeros(0))]}, {"name": ["nobody"]})
    metric.reset()
    with pytest.raises(PvnbError, match="no video"):
        metric.compute()


def test_predictions_have_the_form_of_a_list(tasks):
    paddle.seed(1)
    network, data = tasks[0].network(), tasks[0].dataset("valid")
    batch, = make_loader(data, 4)
    with paddle.no_grad():
        rows = tasks[0].predictions(tasks[0].forward(network, batch, "infer"), batch, 3)
    assert [r["name"] for r in rows] == batch["name"] and all(len(r["segments"]) == len(r["scores"]) == 3 for r in rows)
