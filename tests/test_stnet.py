"StNet: its two temporal parts against plain loops, who sees which order, the original's names, ImageNet's first kernel, the mini configuration, and the lesson's zoo cell."
import json
import pickle

import cv2
import numpy as np
import pytest

from helpers import jitter, run_zoo_cell
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.theatre import load_clips
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.layers.resnet import count_parameters
from paddlevideo_nb.models.stnet import StNet, TemporalBlock, TemporalXception
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.transforms import sample_frames
from paddlevideo_nb.zoo import load_pretrained, save_weights

paddle = import_paddle()


def norm(layer, x):
    "Batch norm in eval mode of x [T, C, ...], in float64."
    shape = [1, -1] + [1]*(x.ndim - 2)
    mean, var, scale, shift = (v.numpy().astype("float64").reshape(shape) for v in (layer._mean, layer._variance, layer.weight, layer.bias))
    return (x - mean)/np.sqrt(var + 1e-5)*scale + shift


def over_time(weight, x):
    "A kernel [out, in, 3] over x [T, in, ...], zeros beyond the ends; moment by moment."
    out = []
    for t in range(len(x)):
        near = [(k, x[t + k - 1]) for k in range(3) if 0 <= t + k - 1 < len(x)]
        out.append(sum(np.tensordot(weight[:, :, k].astype("float64"), frame, 1) for k, frame in near))
    return np.stack(out)


# --- the parts


def test_temporal_block_is_its_definition():
    block = jitter(TemporalBlock(6, "conv3d_0", "batch_norm_0"))
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3, 4)).astype("float32")  # [N, T, C, H, W]
    found = block(paddle.to_tensor(x)).numpy()
    for film, result in zip(x, found, strict=True):
        conv = over_time(block.conv.weight.numpy()[:, :, :, 0, 0], film) + block.conv.bias.numpy().reshape(1, -1, 1, 1)
        np.testing.assert_allclose(result, film + norm(block.norm, np.maximum(conv, 0)), rtol=1e-4, atol=1e-4)  # norm behind the rectifier


def test_xception_is_its_definition():
    head = jitter(TemporalXception(8))
    x = np.random.default_rng(2).normal(size=(3, 8, 6)).astype("float32")  # [N, D, T]
    found = head(paddle.to_tensor(x)).numpy()
    assert found.shape == (3, 4, 6) and (found >= 0).all() and (found > 0).any()

    def wide(layer, v):  # a channel at a time
        return np.stack([over_time(w[None, None], v[:, c, None])[:, 0] for c, w in enumerate(layer.weight.numpy()[:, 0, :, 0])], 1) + layer.bias.numpy()

    def point(layer, v): return v @ layer.weight.numpy()[:, :, 0, 0].T.astype("float64") + layer.bias.numpy()
    for film, result in zip(x, found, strict=True):
        v = norm(head.norm_in, film.T.astype("float64"))  # [T, D]
        y = np.maximum(norm(head.norm_mid, point(head.channel1, wide(head.time1, v))), 0)
        y = norm(head.norm_out, point(head.skip, v) + point(head.channel2, wide(head.time2, y)))
        np.testing.assert_allclose(result, np.maximum(y, 0).T, rtol=1e-4, atol=1e-4)


# --- the network


def network(seed=0, **options):
    paddle.seed(seed)
    net = StNet(5, 14, 8, **options)
    net.eval()
    return net


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("xception", [False, True])
def test_who_sees_the_order_of_segments(blocks, xception):
    net, clip = network(seglen=2, blocks=blocks, xception=xception), paddle.randn([2, 6, 6, 32, 32])
    here = net(clip).numpy()
    scale = np.abs(here[0] - here[1]).max()
    change = np.abs(here - net(clip[:, [3, 0, 5, 1, 4, 2]]).numpy()).max()/scale
    assert change > 1e-2 if blocks or xception else change < 1e-4


def test_a_super_image_sees_the_order_of_its_frames():
    clip = paddle.randn([2, 3, 15, 32, 32])
    backwards = clip.reshape([2, 3, 5, 3, 32, 32]).flip(2).reshape(clip.shape)
    net = network(blocks=False, xception=False)
    assert float((net(clip) - net(backwards)).abs().max()) > 1e-3
    equal = clip[:, :, :3].tile([1, 1, 5, 1, 1])  # five equal frames: nothing to turn round
    np.testing.assert_allclose(net(equal).numpy(), net(equal.reshape([2, 3, 5, 3, 32, 32]).flip(2).reshape(clip.shape)).numpy(), atol=1e-5)


def test_reach_of_the_temporal_blocks():
    net, film = network(seglen=1, xception=False), paddle.randn([4, 9, 3, 64, 64])
    other = film.clone()
    other[:, 4] = paddle.randn([4, 3, 64, 64])
    change = (net.maps(film) - net.maps(other)).abs().max([0, 2, 3, 4]).numpy()
    assert np.flatnonzero(change > 0).tolist() == [2, 3, 4, 5, 6]


def test_shapes_and_any_number_of_segments():
    for xception, width in ((True, 128), (False, 256)):
        net = network(seglen=3, xception=xception)
        for t in (1, 4, 7):
            clip = paddle.randn([2, t, 9, 64, 32])
            maps = net.maps(clip)
            assert maps.shape == [2, t, 256, 2, 1] and net.features(clip).shape == [2, width] and net(clip).shape == [2, 5]
            np.testing.assert_allclose(net.head(maps).numpy(), net(clip).numpy(), atol=1e-5)


def test_unknown_depth_is_named():
    with pytest.raises(PvnbError, match="num_layers is 34, expected one of 14, 50"):
        StNet(5, 34, 4)


@pytest.mark.parametrize("depth", [14, 50, 101, 152])
def test_names_count_the_norms_before_them(depth):
    net, seen = StNet(2, depth, 2), []
    for name, layer in net.named_sublayers():
        if isinstance(layer, (paddle.nn.BatchNorm2D, paddle.nn.BatchNorm3D)):
            layer.register_forward_post_hook(lambda *_, name=name: seen.append(name))
    net.eval()
    net(paddle.zeros([1, 2, 15, 32, 32]))
    names = original_names(net)
    for block in ("block3", "block4"):
        assert names[f"{block}.norm.weight"] == f"batch_norm_{seen.index(f'{block}.norm')}.w_0", depth
    if depth == 50:
        assert (names["block3.norm._mean"], names["block4.norm._variance"], names["block4.conv.bias"]) == ("batch_norm_24.w_1", "batch_norm_44.w_2", "conv3d_1.b_0")
    assert len(set(names.values())) == len(names)


def test_published_size(golden):
    kept = json.loads((golden/"stnet"/"published_parameters.json").read_text())
    net = create_model("STNET")
    state = net.state_dict()
    ours = {name: list(state[key].shape) for key, name in original_names(net).items()}
    theirs = {v["name"]: v["shape"] for v in kept["variables"]}
    assert ours == theirs and len(ours) == 301
    assert count_parameters(net) == kept["trainable_parameters"]
    d = 512
    blocks = sum(3*c*c + 3*c for c in (d, 2*d))  # kernel, bias, scale and shift
    assert count_parameters(net) - count_parameters(StNet(blocks=False)) == blocks


# --- start weights


def test_first_kernel_from_imagenet(tmp_path):
    old, new = StNet(5, 14, 4, seglen=1), StNet(7, 14, 4, seglen=5)
    state, names = old.state_dict(), original_names(old)
    arrays = {name: state[key].numpy() for key, name in names.items() if key.startswith("trunk.")}
    save_weights(tmp_path/"imagenet.safetensors", {**arrays, "fc_0.w_0": np.zeros((128, 1000), "float32")})
    report = load_pretrained(new, tmp_path/"imagenet.safetensors")
    assert report["unused"] == ["fc_0.w_0"] and {"conv3d_0.w_0", "xception_bn.w_0", "fc_0.w_0"} <= set(report["missing"])
    kernel, spread = arrays["conv1_weights"], new.trunk.conv1.conv.weight.numpy()
    assert spread.shape == (4, 15, 7, 7) and np.abs(spread - kernel.mean(1, keepdims=True)/5).max() < 1e-6
    frame = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype("float32")
    gray = np.repeat(frame.mean(1, keepdims=True), 3, 1)  # of equal frames the new trunk sees what the old sees of their gray version
    for net in (old, new):
        net.eval()
    np.testing.assert_allclose(new.trunk(paddle.to_tensor(np.tile(frame, (1, 5, 1, 1)))).numpy(), old.trunk(paddle.to_tensor(gray)).numpy(), rtol=1e-3, atol=1e-4)


# --- the two sets of the lesson: what each way of looking cannot see


def test_no_window_of_orders_holds_both_digits():
    for seed in range(50):
        chosen = sample_frames(36, 4, 5, "train", rng=np.random.default_rng(seed)).reshape(4, 5)//18
        assert (chosen == [[0], [0], [1], [1]]).all()


def test_single_test_frames_of_jumps_lie_in_four_stretches():
    assert len(set(sample_frames(36, 4, 1, "test")//6)) == 4


def test_super_images_alone_give_an_order_film_and_its_reversal_the_same_scores(mini):
    films, labels = load_clips(mini, "orders", "val", progress=False)
    films, labels = films[:, :, ::2, ::2], labels
    twin = [(a, b) for a in np.flatnonzero(labels == 0)[:12] for b in np.flatnonzero(labels == 1) if np.abs(films[a].astype(int) - films[b][::-1]).mean() < 2]
    assert len(twin) == 12
    chosen = sample_frames(36, 4, 5, "test")
    def clip(film): return paddle.to_tensor((film[chosen].astype("float32")/128 - 1).transpose(0, 3, 1, 2).reshape(1, 4, 15, 32, 32))
    for blocks in (False, True):
        net = network(blocks=blocks, xception=False)
        change = np.array([np.abs(net(clip(films[a])).numpy() - net(clip(films[b])).numpy()).max() for a, b in twin])
        between = np.ptp(np.concatenate([net(clip(films[a])).numpy() for a, _ in twin]), axis=0).max()
        assert change.max() > .1*between if blocks else change.max() < .1*between  # coding noise is all that is left


def test_mini_configuration():
    mini, published = load_config("stnet_mini"), load_config("stnet")
    for section in published:
        assert set(published[section]) - {"pretrain_base"} <= set(mini[section]), section
    task = get_task(mini)
    net = task.network()
    assert isinstance(net, StNet) and net.seglen == mini.MODEL.seglen and net.block3 is not None and net.xception is not None
    assert not mini.MODEL.flip  # left and right are labels
    assert mini.TRAIN.total_videos == 240 and mini.TEST.seg_num == mini.INFER.seg_num == mini.MODEL.seg_num == 4


# --- the lesson's zoo cell, on a network and films small enough for a test


def small(name, **overrides):
    "The published configuration with its network and pictures made small; 25 segments of 5 frames, pickles and list as they are."
    size = {"MODEL.width": 4, "MODEL.num_layers": 14, "MODEL.num_classes": 6, "TEST.short_size": 40, "TEST.target_size": 32}
    return load_config(name, **size, **overrides)


def run_cell(*where, **more): return run_zoo_cell("stnet", *where, load_config=small, evaluate=evaluate, get_task=get_task, **more)


def test_zoo_cell_measures_and_judges(tmp_path):
    rng, net = np.random.default_rng(3), jitter(create_model("STNET", small("stnet")))
    state = net.state_dict()
    save_weights(tmp_path/"w.safetensors", {name: state[key].numpy() for key, name in original_names(net).items()})

    def write(labels):
        for k, label in enumerate(labels):
            jpegs = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures[k]]
            (tmp_path/f"{k}.pkl").write_bytes(pickle.dumps((f"film {k}", label, jpegs), protocol=2))
        (tmp_path/"test.list").write_text("".join(f"{tmp_path}/{k}.pkl\n" for k in range(len(labels))))

    pictures = [np.kron(rng.integers(0, 256, (130, 5, 6, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8)) for _ in range(4)]
    write([0]*4)
    data = get_task(small("stnet", **{"TEST.filelist": str(tmp_path/"test.list")})).dataset("test")
    assert data[0]["image"].shape == (25, 15, 32, 32)
    answers = [int(net(paddle.to_tensor(data[k]["image"][None])).numpy().argmax()) for k in range(4)]
    write([*answers[:3], (answers[3] + 1) % 6])  # three right, one wrong
    names = run_cell(tmp_path, tmp_path/"w.safetensors")
    (row,) = names["zoo_rows"]
    assert names["measured"]["videos"] == 4 and row["measured"] == pytest.approx(.75) and row["published"] == .69 and row["ok"]
    write([(a + 1) % 6 for a in answers])
    (row,) = run_cell(tmp_path, tmp_path/"w.safetensors")["zoo_rows"]
    assert row["measured"] == 0 and not row["ok"]


def test_zoo_cell_names_a_missing_list(tmp_path):
    with pytest.raises(PvnbError, match="test.list"):
        run_cell(tmp_path, "none")
    assert run_cell(tmp_path, "", mode="mini")["zoo_rows"] == []
