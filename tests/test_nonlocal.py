"""Non-local: the block against a plain loop, what C2D and I3D can tell apart, the head over several windows, the mini configuration, and the lesson's zoo cell."""

import numpy as np
import pytest

from helpers import jitter, run_zoo_cell
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.metrics.multiview import MultiViewAccuracy
from paddlevideo_nb.models.nonlocal_net import AFFINITIES, ARCHITECTURES, Affine, NonLocal, NonLocalBlock, ConvNorm3D, inflate, temporal_radius
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.video import write_video
from paddlevideo_nb.zoo import save_weights

paddle = import_paddle()


def by_loops(block, x):
    "The block in float64, place by place: [C, T, H, W] -> the same. Batch norm has its starting statistics (0 and 1)."
    def flat(a): return a.reshape(len(a), -1).T.astype("float64")  # [places, C]
    def through(layer, rows):
        if not hasattr(layer, "weight"):
            return rows
        return rows @ layer.weight.numpy().astype("float64").reshape(layer.weight.shape[0], -1).T + (0 if layer.bias is None else layer.bias.numpy())
    keys = x
    if block.pool:
        c, t, h, w = x.shape
        keys = x[:, :, :h//2*2, :w//2*2].reshape(c, t, h//2, 2, w//2, 2).max((3, 5))
    theta, phi, g = through(block.theta, flat(x)), through(block.phi, flat(keys)), through(block.g, flat(keys))
    y = np.zeros((len(theta), g.shape[1]))
    for i, a in enumerate(theta):
        if block.affinity in ("gaussian", "embedded_gaussian"):
            f = np.array([np.exp(a @ b * block.scale) for b in phi])
            f /= f.sum()
        elif block.affinity == "dot_product":
            f = np.array([a @ b for b in phi]) / len(phi)
        else:
            f = np.array([max(0, block.pair.weight.numpy()[:, 0] @ np.concatenate([a, b])) for b in phi]) / len(phi)
        y[i] = f @ g
    z = through(block.out, y)
    if isinstance(block.norm, Affine):
        z = z * block.norm.scale.numpy() + block.norm.offset.numpy()
    elif block.norm is not None:
        z = z / np.sqrt(1 + 1e-5) * block.norm.weight.numpy() + block.norm.bias.numpy()
    return x + z.T.reshape(x.shape)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("options", [{}, {"pool": False, "scale": False, "norm": None}, {"norm": "affine", "bias": False}])
def test_block_is_its_definition(affinity, options):
    block = jitter(NonLocalBlock(6, affinity=affinity, **options), statistics=False)
    x = np.random.default_rng(1).normal(0, .7, (2, 6, 3, 4, 5)).astype("float32")  # an odd width: the last column is no key
    out = block(paddle.to_tensor(x)).numpy()
    for film, result in zip(x, out, strict=True):
        np.testing.assert_allclose(result, by_loops(block, film), rtol=1e-4, atol=1e-4)


def test_weights_are_shares_for_the_gaussians_only():
    x = paddle.randn([2, 8, 3, 4, 4])
    for affinity in AFFINITIES:
        w = jitter(NonLocalBlock(8, affinity=affinity), statistics=False).weights(x)
        assert w.shape == [2, 3*16, 3*4]
        assert np.allclose(w.sum(-1).numpy(), 1, atol=1e-5) == ("gaussian" in affinity)


def test_a_new_block_changes_nothing():
    x = paddle.randn([1, 8, 2, 4, 4])
    for options in ({}, {"zero_init": True, "norm": None}, {"zero_init": True, "gamma": 1.0}):
        assert bool((NonLocalBlock(8, **options)(x) == x).all())
    assert not bool((NonLocalBlock(8, gamma=1.0)(x) == x).all())


def test_groups_are_blocks_of_their_own():
    block, x = jitter(NonLocalBlock(8, group=2, norm="affine"), statistics=False), paddle.randn([2, 8, 6, 4, 4])
    apart = paddle.concat([block(x[:, :, t:t + 2]) for t in (0, 2, 4)], axis=2)
    np.testing.assert_allclose(block(x).numpy(), apart.numpy(), atol=1e-5)
    assert bool((block(x[:, :, :1]) != x[:, :, :1]).any())  # fewer frames than a group: all with all
    with pytest.raises(PvnbError, match="groups of 2 frames was given 5"):
        block(paddle.randn([1, 8, 5, 4, 4]))


def test_unknown_options_are_named():
    with pytest.raises(PvnbError, match="unknown affinity 'cosine', expected one of embedded_gaussian"):
        NonLocalBlock(8, affinity="cosine")
    with pytest.raises(PvnbError, match=r"video_arc_choice is 7 .* 1 \(C2D, depth 50\)"):
        NonLocal(arc=7)
    with pytest.raises(PvnbError, match="video_arc_choice is 3 with depth 50"):
        NonLocal(depth=50, arc=3)


def network(arc, **options):
    paddle.seed(0)
    net = NonLocal(5, 14, arc, 8, {3: 1, 4: 1}, gamma=1.0, std=.01, block={"gamma": 1.0, "std": .1}, **options)
    net.eval()
    return net


def test_direction_of_time():
    clips = paddle.randn([4, 3, 6, 32, 32])
    for arc in (1, 2):
        logits, reverse = (network(arc)(x).numpy() for x in (clips, clips.flip(2)))
        scale = np.abs(logits - logits[::-1]).max()
        assert np.abs(logits - reverse).max() < 1e-4*scale if arc == 1 else np.abs(logits - reverse).max() > .05*scale
    pairs, swapped = [4, 5, 0, 1, 2, 3], [1, 2, 3, 4, 5, 0]
    c2d = network(1)
    a, b, c = (c2d(x).numpy() for x in (clips, clips[:, :, pairs], clips[:, :, swapped]))
    assert np.abs(a - b).max() < 1e-4*np.abs(a - a[::-1]).max() < np.abs(a - c).max()  # whole pairs may change places, frames of different pairs may not


def test_without_blocks_scores_are_additive():
    paddle.seed(0)
    net = NonLocal(2, 14, 1, 8, {}, gamma=1.0)
    net.eval()
    begin, end = paddle.randn([2, 3, 2, 32, 32]), paddle.randn([2, 3, 4, 32, 32])
    def sums(net):
        s = np.array([[np.diff(net(paddle.concat([b, e], axis=1).unsqueeze(0)).numpy()).item() for e in end] for b in begin])
        return abs(s[0, 0] + s[1, 1] - s[0, 1] - s[1, 0]) / np.abs(s).max()
    assert sums(net) < 1e-4
    paddle.seed(0)
    mixed = NonLocal(2, 14, 1, 8, {3: 1}, gamma=1.0, std=.01, block={"gamma": 1.0, "std": .1})
    mixed.eval()
    assert sums(mixed) > 1e-3


def test_head_averages_the_softmax_of_windows():
    net, maps = network(1, dropout=0.0), paddle.randn([2, 3, 256, 8, 9])  # windows of 7x7: 2 x 3
    assert net.positions(maps).shape == [2, 6, 256] and net.positions(maps[..., :2, :2]).shape == [2, 1, 256]
    m, w, b = maps.numpy().mean(1), net.pred.weight.numpy(), net.pred.bias.numpy()
    each = [m[:, :, i:i + 7, j:j + 7].mean((2, 3)) @ w + b for i in range(2) for j in range(3)]
    expected = np.mean([np.exp(e) / np.exp(e).sum(1, keepdims=True) for e in each], 0)
    found = paddle.nn.functional.softmax(net.head(maps)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dropout_is_the_old_kind():
    net, maps = network(1, dropout=0.5), paddle.ones([400, 2, 256, 1, 1])
    half = paddle.nn.functional.linear(.5*paddle.ones([1, 256]), net.pred.weight, net.pred.bias)
    np.testing.assert_allclose(net.head(maps)[0].numpy(), paddle.nn.functional.log_softmax(half)[0].numpy(), atol=1e-5)
    net.train()
    seen = []
    net.pred.register_forward_pre_hook(lambda layer, args: seen.append(args[0].numpy()))
    net.head(maps)
    assert set(np.unique(seen[0])) == {0, 1} and abs(seen[0].mean() - .5) < .01


def test_kernels_over_time():
    for arc, (kind, depth) in ARCHITECTURES.items():
        net = NonLocal(5, depth, arc, 4)
        spans = {c.conv.original["weight"]: c.conv.weight.shape[2] for c in net.sublayers() if isinstance(c, ConvNorm3D)}
        long = {name for name, span in spans.items() if span > 1}
        if kind == "C2D":
            assert not long and temporal_radius("C2D", 2, 0) == 0
        else:
            assert spans["conv1_weights"] == 5 and {"res2a_branch2a_weights", "res2b_branch2a_weights", "res2c_branch2a_weights"} < long
            assert all(name == "conv1_weights" or name.endswith("branch2a_weights") for name in long)
        blocks = [name for name, layer in net.named_children() if isinstance(layer, NonLocalBlock)]
        assert len(blocks) == 5, (arc, blocks)


def test_inflated_kernel_sees_a_still_as_the_flat_one():
    kernel, picture = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("float32"), paddle.randn([1, 3, 8, 8])
    film = paddle.nn.functional.conv3d(picture.unsqueeze(2).expand([1, 3, 7, 8, 8]), paddle.to_tensor(inflate(kernel, 5)), padding=(2, 1, 1))
    flat = paddle.nn.functional.conv2d(picture, paddle.to_tensor(kernel), padding=1)
    np.testing.assert_allclose(film[:, :, 3].numpy(), flat.numpy(), atol=1e-5)
    net = NonLocal(5, 14, 2, 4)
    assert net.adapt_pretrained("conv1_weights", np.ones((4, 3, 7, 7), "float32")).shape == (4, 3, 5, 7, 7)
    assert net.adapt_pretrained("bn_conv1_scale", np.ones(4)).shape == (4,)


def test_last_layer_of_a_test_checkpoint():
    net, array = NonLocal(5, 14, 1, 4), np.random.default_rng(0).normal(size=(5, 128, 1, 1, 1)).astype("float32")
    assert (net.adapt_original("pred_w", array) == array.reshape(5, 128).T).all()
    assert net.adapt_original("pred_w", array[:, :, 0, 0, 0].T).shape == (128, 5)


def test_mini_configuration():
    mini, published = load_config("nonlocal_mini"), load_config("nonlocal")
    added = {"MODEL": {"width", "flip"}, "NONLOCAL": {"affinity"}, "TRAIN": {"use_gpu"}}
    gone = {"TEST": {"filename_gt", "checkpoint_dir", "dataset_size"}, "INFER": {"checkpoint_dir"}}
    for section in published:
        assert set(mini[section]) == set(published[section]) - gone.get(section, set()) | added.get(section, set()), section
    names = set(original_names(get_task(mini).network()).values())
    assert {"nonlocal_conv3_0_theta_w", "nonlocal_conv4_0_out_w"} <= names
    off = load_config("nonlocal_mini", **{"NONLOCAL.conv3_nonlocal": False, "NONLOCAL.conv4_nonlocal": False})
    assert not any("nonlocal" in n for n in original_names(get_task(off).network()).values())
    changed = get_task(load_config("nonlocal_mini", **{"NONLOCAL.affinity": "dot_product", "NONLOCAL.use_maxpool": True})).network().nonlocal_conv3_0
    assert changed.affinity == "dot_product" and changed.pool
    train = mini.TRAIN
    assert train.max_iter == train.epoch * (480//train.batch_size) and sum(train.step_sizes) < train.max_iter


# --- the lesson's zoo cell, on a network and films small enough for a test


def small(name, **overrides):
    "The published configuration, its network and pictures made small; views, lists and labels as they are."
    size = {"width": 4, "depth": 14, "num_classes": 6}
    return load_config(name, **{f"MODEL.{k}": v for k, v in size.items()}, **{"TEST.crop_size": 48, "TEST.jitter_scales": [48, 48], "TEST.video_length": 4}, **overrides)


def run_cell(*where, **more): return run_zoo_cell("nonlocal", *where, load_config=small, evaluate=evaluate, get_task=get_task, **more)


def test_zoo_cell_counts_films_by_the_mean_of_their_30_views(tmp_path):
    rng = np.random.default_rng(3)
    for k in range(3):
        write_video(tmp_path/f"{k}.mp4", np.kron(rng.integers(0, 256, (20, 8, 10, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8)), 10)
    net = create_model("NONLOCAL", small("nonlocal"))
    for p in [p for p in net.parameters() if not p.stop_gradient]:
        p.set_value(rng.normal(0, .3, p.shape).astype("float32"))
    state = net.state_dict()
    save_weights(tmp_path/"w.safetensors", {name: state[key].numpy() for key, name in original_names(net).items()})
    (tmp_path/"testlist.txt").write_text("".join(f"{tmp_path}/{k}.mp4 {k} {t} {s}\n" for k in range(3) for t in range(10) for s in range(3)))
    (tmp_path/"vallist.txt").write_text("".join(f"{tmp_path}/{k}.mp4 0\n" for k in range(3)))
    config = small("nonlocal", **{"TEST.filelist": str(tmp_path/"testlist.txt"), "TEST.filename_gt": str(tmp_path/"vallist.txt")})
    data, total = get_task(config).dataset("test"), {}
    with paddle.no_grad():
        for i in range(len(data)):
            sample = data[i]
            total.setdefault(int(sample["video"][0]), []).append(paddle.nn.functional.softmax(net(paddle.to_tensor(sample["image"][None]))).numpy()[0])
    assert {len(v) for v in total.values()} == {30}
    answers = [int(np.mean(total[k], axis=0).argmax()) for k in range(3)]
    labels = [answers[0], answers[1], (answers[2] + 1) % 6]  # two right, one wrong
    (tmp_path/"vallist.txt").write_text("".join(f"{tmp_path}/{k}.mp4 {labels[k]}\n" for k in range(3)))
    names = run_cell(tmp_path, tmp_path/"w.safetensors")
    assert names["measured"]["videos"] == 3 and names["measured"]["views"] == 90
    (row,) = names["zoo_rows"]
    assert row["measured"] == pytest.approx(2/3) and row["published"] == .739 and not row["ok"]
    assert isinstance(get_task(config).metric("test"), MultiViewAccuracy)


def test_zoo_cell_names_a_missing_list(tmp_path):
    with pytest.raises(PvnbError, match="testlist.txt"):
        run_cell(tmp_path, "none")
    assert run_cell(tmp_path, "", mode="mini")["zoo_rows"] == []
