"BMN: the mask proposal by proposal, the exchanged layer against the dense one, losses where the original divides by zero, the metric, the mini configuration, the original's names."
import json

import numpy as np
import pytest

from helpers import run_zoo_cell
from paddlevideo_nb.bmn_tasks import BMNTask, balanced_loss, boundary_loss, confidence_loss, proposals, raw_proposals, regression_loss
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.untrimmed import make_untrimmed
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.models.bmn import BMN, BoundaryMatching, Tiles, sampling_mask, valid_cells
from paddlevideo_nb.proposal_tasks import ProposalScores
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.train import fit
from paddlevideo_nb.zoo import load_weights, save_legacy

paddle = import_paddle()
SMALL = dict(feat_dim=8, tscale=14, dscale=10, num_sample=5, num_sample_perbin=2, hidden_sizes=(8, 6, 12))


def plain_mask(tscale, dscale, samples, readings, ratio):
    "The mask entry by entry, as the text of the paper and of the program say it."
    out = np.zeros((tscale, samples, dscale, tscale))
    for d in range(dscale):
        for s in range(tscale - d):
            places = np.linspace(s - (d + 1)*ratio, s + d + (d + 1)*ratio, samples*readings)
            for i, p in enumerate(places):
                low, high, share = int(p), int(np.ceil(p)), p - int(p)
                if 0 <= low < tscale and p > -1:
                    out[low, i//readings, d, s] += (1 - share)/readings
                if 0 <= high < tscale:
                    out[high, i//readings, d, s] += share/readings
    return out.reshape(tscale, -1)


@pytest.mark.parametrize("sizes", [(9, 9, 4, 3, .5), (12, 7, 5, 2, .3), (7, 3, 3, 3, 1.)])
def test_mask_is_its_definition(sizes):
    np.testing.assert_allclose(sampling_mask(*sizes), plain_mask(*sizes), atol=1e-6)


def test_tiles_hold_the_whole_mask_and_no_empty_cell():
    mask = sampling_mask(23, 17, 6, 3)
    tiles, again = Tiles(mask, 23, 17), np.zeros((23, 6, 17*23), np.float32)
    for rows, cells, weights in zip(tiles.rows, tiles.cells, tiles.weights, strict=True):
        again[rows[:, None]//6, rows[:, None] % 6, cells] = weights.T
    assert (again.reshape(mask.shape) == mask).all()
    cells = np.concatenate(tiles.cells)
    assert len(set(cells)) == len(cells) == valid_cells(23, 17).sum()
    assert (tiles.of_map[cells] == np.arange(len(cells))).all() and (np.delete(tiles.of_map, cells) == len(cells)).all()


def both(layer, x):
    "(map, gradients of x, weight, bias) of the exchanged and of the dense form."
    found = []
    for form in (lambda a: layer.spread(layer(a), layer.conv.bias), layer.dense):
        a = x.clone()
        a.stop_gradient = False
        z = form(a)
        (z*paddle.sin(paddle.arange(z.size, dtype="float32").reshape(z.shape))).sum().backward()
        found.append([t.numpy() for t in (z, a.grad, layer.conv.weight.grad, layer.conv.bias.grad)])
        layer.clear_gradients()
    return found


@pytest.mark.parametrize("noise", [False, True], ids=["mask", "noise"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batch", [1, 3])
def test_exchanged_form_equals_the_dense_one(batch, mode, noise):
    paddle.seed(1)
    layer = BoundaryMatching(6, 9, 21, 16, 5, 3)
    layer.conv.bias.set_value(paddle.randn([9]))
    getattr(layer, mode)()
    if noise:  # any mask will do, also one that is nowhere zero
        layer.sample_mask.set_value(paddle.randn(layer.sample_mask.shape))
        layer.follow()
        assert layer.of_map.numpy().max() == 21*16 - 1
    for ours, theirs in zip(*both(layer, paddle.randn([batch, 6, 21])), strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5*max(np.abs(theirs).max(), 1)


def test_network_follows_a_mask_that_was_loaded():
    paddle.seed(2)
    network = BMN(**SMALL)
    network.eval()
    x = paddle.randn([2, 8, 14])
    before = network(x)[0].numpy()
    network.matching.sample_mask.set_value(paddle.to_tensor(sampling_mask(14, 10, 5, 2, ratio=.25)))
    network.eval()
    other = BMN(**{**SMALL, "prop_boundary_ratio": .25})
    other.set_state_dict(network.state_dict())
    other.eval()
    after = network(x)[0].numpy()
    np.testing.assert_allclose(after, other(x)[0].numpy(), atol=1e-6)
    assert np.abs(after - before).max() > 1e-4


def test_names_shapes_and_legacy_file(tmp_path):
    network = BMN(**SMALL)
    names = original_names(network)
    assert len(names) == 25 and {"sample_mask", "Base_1.w_0", "TEM_e2.b_0", "PEM_3d1.w_0", "PEM_2d4.b_0"} <= set(names.values())
    state = {names[k]: v.numpy() for k, v in network.state_dict().items()}
    state["sample_mask"] = state["sample_mask"].reshape(14, 5, 10, 14)  # as it is before the first run
    save_legacy(tmp_path/"BMN.pdparams", state, 1)
    loaded = load_weights(BMN(**SMALL), tmp_path/"BMN.pdparams")
    for key, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), network.state_dict()[key].numpy())


# --- losses


def original_balanced(p, positive, negative):
    "The paper's coefficients, in float64; not a number without positives."
    entries, count = positive.sum() + negative.sum(), positive.sum()
    ratio = entries/count
    return -(.5*ratio*(np.log(p + 1e-6)*positive).sum() + .5*ratio/(ratio - 1)*(np.log(1 - p + 1e-6)*negative).sum())/entries


def test_balanced_loss_has_the_papers_coefficients():
    rng = np.random.default_rng(3)
    p, positive = rng.random((2, 30)), (rng.random((2, 30)) < .2).astype("float64")
    ours = float(balanced_loss(*(paddle.to_tensor(a.astype("float32")) for a in (p, positive, 1 - positive))))
    assert abs(ours - original_balanced(p, positive, 1 - positive)) < 1e-5


@pytest.mark.parametrize("value", [0., 1.])
def test_losses_are_finite_at_the_extremes(value):
    p, valid = paddle.full([2, 10, 14], .3), paddle.to_tensor(valid_cells(14, 10))
    iou = paddle.full([2, 10, 14], value)
    found = boundary_loss(p[:, 0], iou[:, 0]), confidence_loss(p, iou, valid), regression_loss(p, iou, valid, paddle.rand([2, 10, 14]))
    assert all(np.isfinite(float(x)) for x in found)
    p.stop_gradient = False
    (regression_loss(p, iou, valid, paddle.rand([2, 10, 14])) + confidence_loss(p, iou, valid)).backward()
    assert np.isfinite(p.grad.numpy()).all()


def test_regression_draws_about_as_many_of_each_group():
    iou, valid = paddle.zeros([1, 40, 40]), paddle.ones([40, 40])
    iou[0, :2] = .8    # 80 cells high
    iou[0, 2:20] = .5  # 720 in the middle; the other 800 low
    draws = paddle.to_tensor(np.random.default_rng(4).random((2, 40, 40)).astype("float32"))
    one = paddle.ones([1, 40, 40])
    scores = paddle.where(iou > .7, iou, iou + one)  # wrong by 1 in the groups that are drawn from
    loss = float(regression_loss(scores, iou, valid, draws))
    assert abs(loss - .5*160/240) < .05


# --- proposals and their measure


def test_proposals_of_a_clear_answer():
    maps, start, end = np.full((2, 8, 10), .01), np.full(10, .05), np.full(10, .05)
    start[2], end[5], maps[:, 3, 2] = .9, .8, .9
    segments, scores = raw_proposals(maps, start, end)
    best = scores.argmax()
    np.testing.assert_allclose(segments[best], [.2, .6])
    assert abs(scores[best] - .9*.8*.81) < 1e-12
    assert (np.diff(segments, axis=1) <= .8 + 1e-9).all(), "longer than the map has rows"
    kept, lowered = proposals(maps, start, end)
    np.testing.assert_allclose(kept[0], segments[best])
    assert (np.diff(lowered) <= 0).all() and len(kept) <= len(segments)


def database(**videos):
    return {"database": {n: {"duration": d, "subset": "validation", "annotations": [{"segment": list(s), "label": "x"} for s in segments]} for n, (d, segments) in videos.items()}}


def batch_of(name, start_at, end_at):
    maps, start, end = np.full((1, 2, 10, 10), .01), np.full((1, 10), .01), np.full((1, 10), .01)
    start[0, start_at], end[0, end_at] = .9, .9
    maps[0, :, end_at - start_at, start_at] = .9
    return {"found": [proposals(maps[0], start[0], end[0])], "loss": 2.0}, {"name": [name]}


def test_metric_by_hand():
    metric = ProposalScores(database(a=(50, [(10, 30)]), b=(20, [(4, 12)]), c=(9, [])))
    with pytest.raises(PvnbError, match="no video"):
        metric.compute()
    for name in ("a", "b"):
        metric.update(*batch_of(name, 2, 5))  # .2 to .6 of each: exact in both
    found = metric.compute()
    assert found["ar100"] == 1.0 and found["ar1"] == 1.0 and found["videos"] == 2 and found["loss"] == 2.0
    np.testing.assert_allclose(metric.results["a"][0]["segment"], [10, 30])
    metric.reset()
    metric.update(*batch_of("a", 7, 9))  # wrong
    assert metric.compute()["ar1"] == 0.0
    with pytest.raises(PvnbError, match="zzz is not in the annotations"):
        metric.update(*batch_of("zzz", 2, 5))
    metric.reset()
    metric.update(*batch_of("c", 2, 5))
    with pytest.raises(PvnbError, match="none of the evaluated videos"):
        metric.compute()


# --- the task, from features to figures


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_untrimmed(tmp_path_factory.mktemp("untrimmed"), sizes={"train": 16, "val": 6}, progress=False)


def task_of(world, **more):
    return get_task(load_config("bmn_mini", **{"MODEL.anno_file": str(world/"annotations.json"), "MODEL.feat_path": str(world/"features"), **more}))


def test_mini_task_learns_and_evaluates_the_same_twice(world):
    task = task_of(world)
    assert isinstance(task, BMNTask)
    network, history = fit(task, epochs=3, seed=0, log_interval=1, valid_interval=0, progress=False)
    losses = [row["loss"] for row in history if "loss" in row]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    first, second = (evaluate(task, network, mode="test", progress=False) for _ in range(2))
    assert first == second and first["videos"] == 6 and 0 < first["auc"] < 1 and np.isfinite(first["loss"])


def test_training_survives_videos_without_any_action(world, tmp_path):
    table = json.loads((world/"annotations.json").read_text())
    for entry in table["database"].values():
        entry["annotations"] = []
    (tmp_path/"empty.json").write_text(json.dumps(table))
    _, history = fit(task_of(world, **{"MODEL.anno_file": str(tmp_path/"empty.json")}), epochs=1, seed=0, log_interval=1, valid_interval=0, progress=False)
    assert history and np.isfinite([row["loss"] for row in history]).all()


def test_features_of_another_width_are_named(world):
    with pytest.raises(PvnbError, match="44 wide, expected 400"):
        task_of(world, **{"MODEL.feat_dim": 400}).dataset("infer")[0]


def test_predictions_of_features_alone(world):
    task = task_of(world)
    network = create_model("BMN", task.config)
    data = task.dataset("infer")
    sample = data[0]
    with paddle.no_grad():
        outputs = task.forward(network, {"feature": paddle.to_tensor(sample["feature"][None])}, "infer")
    row, = task.predictions(outputs, {"name": [sample["name"]]}, topk=5)
    assert row["name"] == sample["name"] and len(row["segments"]) == len(row["scores"]) == 5 and row["scores"] == sorted(row["scores"], reverse=True)
    assert all(0 <= a < b <= 1 for a, b in row["segments"])


# --- the lesson's zoo cell


def small(name, **overrides):
    size = {"feat_dim": 8, "tscale": 14, "dscale": 14, "num_sample": 5, "num_sample_perbin": 2, "hidden_sizes": [8, 6, 12]}
    return load_config(name, **{f"MODEL.{k}": v for k, v in size.items()}, **overrides)


def run_cell(*where, **more): return run_zoo_cell("bmn", *where, load_config=small, evaluate=evaluate, get_task=get_task, **more)


def test_zoo_cell_measures_a_legacy_file(tmp_path):
    paddle.seed(5)
    network = BMN(**{**SMALL, "dscale": 14})
    names = original_names(network)
    save_legacy(tmp_path/"BMN.pdparams", {names[k]: v.numpy() for k, v in network.state_dict().items()}, 1)
    (tmp_path/"fix_feat_100").mkdir()
    rng, table = np.random.default_rng(6), {}
    for i in range(4):
        features = rng.normal(size=(14, 8)).astype("float32")
        np.save(tmp_path/"fix_feat_100"/f"v_{i}.npy", features)
        network.eval()
        maps, start, end = (a.numpy()[0] for a in network(paddle.to_tensor(features.T[None])))
        best = raw_proposals(maps, start, end)
        a, b = best[0][best[1].argmax()]*20.0
        table[f"v_{i}"] = {"duration_second": 20.0, "duration_frame": 500, "subset": "validation", "annotations": [{"segment": [a, b], "label": "x"}]}
    (tmp_path/"activitynet_1.3_annotations.json").write_text(json.dumps(table))
    found = run_cell(tmp_path, tmp_path/"BMN.pdparams")
    assert found["measured"]["videos"] == 4 and found["measured"]["ar100"] == 1.0  # the annotations are its own best proposals
    rows = {r["metric"]: r for r in found["zoo_rows"]}
    assert len(rows) == 5 and rows["ActivityNet-1.3 AUC (%)"]["published"] == 67.19 and not rows["ActivityNet-1.3 AR100 (%)"]["ok"]
    assert run_cell(tmp_path, "", mode="mini")["zoo_rows"] == []
    with pytest.raises(PvnbError, match="activitynet_1.3_annotations"):
        run_cell(tmp_path/"nowhere", "none")
