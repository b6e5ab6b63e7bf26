"""Attention Cluster: a bag of frames, padded or not; shifting; what it refuses."""
import numpy as np
import pytest

from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.features import make_features
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.models.attention_cluster import AttentionCluster, AveragePooling, Mean, ShiftingAttention
from paddlevideo_nb.tasks import get_task
from paddlevideo_nb.train import fit

paddle = import_paddle()

LENGTHS = [7, 3, 1, 6]


def tensors(*shape, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def network(kind=AttentionCluster, **more):
    paddle.seed(3)
    made = kind(5, (12, 4), **({"cluster_nums": (6, 3)} if kind is AttentionCluster else {}), hidden=(16, 8), **more)
    made.eval()
    return made


KINDS = [pytest.param(AttentionCluster, {}, id="shifting"), pytest.param(AttentionCluster, {"shift": False}, id="plain"), pytest.param(AveragePooling, {}, id="average")]


@pytest.mark.parametrize("kind, more", KINDS)
def test_padded_batch_equals_each_video_alone(kind, more):
    net, rgb, audio = network(kind, **more), tensors(4, 7, 12), tensors(4, 7, 4, seed=1)
    rgb[1, 3:], audio[2, 1:] = 1e4, -1e4  # whatever stands behind the end
    weight = tensors(4, 5, seed=2)

    def run(rgb, audio, lengths, weight):
        net.clear_gradients()
        out = net(rgb, audio, lengths)
        (out * weight).sum().backward()
        return out.numpy(), {name: p.grad.numpy().copy() for name, p in net.named_parameters()}

    together, gradients = run(rgb, audio, paddle.to_tensor(LENGTHS), weight)
    added = {name: np.zeros_like(g) for name, g in gradients.items()}
    for k, n in enumerate(LENGTHS):
        alone, one = run(rgb[k:k + 1, :n], audio[k:k + 1, :n], None, weight[k:k + 1])
        np.testing.assert_allclose(together[k], alone[0], rtol=1e-5, atol=1e-5)
        added = {name: added[name] + g for name, g in one.items()}
    for name, g in gradients.items():
        np.testing.assert_allclose(g, added[name], rtol=1e-5, atol=1e-5 * max(1, np.abs(g).max()), err_msg=name)
    assert sum(np.abs(g).sum() for g in gradients.values()) > 1


def test_padding_gets_no_gradient():
    net, rgb, audio = network(), tensors(4, 7, 12), tensors(4, 7, 4, seed=1)
    rgb.stop_gradient = False
    net(rgb, audio, paddle.to_tensor(LENGTHS)).sum().backward()
    for k, n in enumerate(LENGTHS):
        assert np.abs(rgb.grad[k, n:].numpy()).max(initial=0) < 1e-20
        assert rgb.grad[k, :n].numpy().any() or n == 1
    assert np.isfinite(rgb.grad.numpy()).all()


@pytest.mark.parametrize("kind, more", KINDS)
def test_order_of_frames_does_not_matter(kind, more):
    net, rgb, audio = network(kind, **more), tensors(3, 9, 12), tensors(3, 9, 4, seed=1)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(net(rgb, audio).numpy(), net(rgb[:, order], audio[:, order[::-1].copy()]).numpy(), rtol=1e-5, atol=1e-5)


def test_attention_weights_sum_to_one_within_each_video():
    layer = ShiftingAttention(12, 6)
    weights = layer.weights(tensors(4, 7, 12), paddle.to_tensor(LENGTHS)).numpy()
    assert weights.shape == (4, 6, 7)
    np.testing.assert_allclose(weights.sum(2), 1, atol=1e-6)
    assert all(not weights[k, :, n:].any() for k, n in enumerate(LENGTHS))


@pytest.mark.parametrize("units", [1, 5, 32])
def test_shifted_answers_have_length_one(units):
    out = ShiftingAttention(12, units)(100 * tensors(4, 7, 12))
    np.testing.assert_allclose(np.linalg.norm(out.numpy(), axis=1), 1, atol=1e-5)


def test_shifting_can_undo_scale_and_common_part():
    layer, x = ShiftingAttention(12, 4), tensors(2, 5, 12)
    before, scale, offset = layer(x).numpy(), layer.scale.numpy(), layer.offset.numpy()
    layer.conv.weight.set_value(layer.conv.weight / 3)  # the same scores from features three times as large
    layer.scale.set_value(scale / 3)
    layer.offset.set_value(offset - 7 * scale / 3)
    np.testing.assert_allclose(layer(3 * x + 7).numpy(), before, atol=1e-5)


def test_zero_features_give_zero_not_nan():
    layer = ShiftingAttention(4, 2)
    layer.offset.set_value(paddle.zeros([2]))
    x = paddle.zeros([1, 3, 4])
    x.stop_gradient = False
    out = layer(x)
    out.sum().backward()
    assert not out.numpy().any() and np.isfinite(x.grad.numpy()).all()


def test_one_modality_and_heads_of_other_depths():
    x = tensors(2, 5, 12)
    for hidden in ((), (8,), (8, 6), (8, 6, 4)):
        net = AttentionCluster(3, (12,), (4,), hidden=hidden)
        assert net(x).shape == [2, 3]
        assert f"fc{len(hidden)}.weights" in original_names(net).values() or not hidden
    assert network(AveragePooling).features(tensors(2, 5, 12), tensors(2, 5, 4)).shape == [2, 16]


def test_dropout_is_of_the_old_kind():
    net, rgb, audio = network(), tensors(2, 5, 12), tensors(2, 5, 4)
    np.testing.assert_allclose(net.dropout(net.features(rgb, audio)).numpy(), net.features(rgb, audio).numpy() / 2, atol=1e-7)


@pytest.mark.parametrize("call, words", [
    (lambda: network()(tensors(2, 5, 12)), "rgb and audio"),
    (lambda: network()(tensors(2, 5, 11), tensors(2, 5, 4)), r"\[2, 5, 11\].*\[N, T, 12\]"),
    (lambda: network()(tensors(5, 12), tensors(2, 5, 4)), r"\[5, 12\]"),
    (lambda: Mean(12)(tensors(2, 5, 11)), r"\[N, T, 12\]"),
    (lambda: ShiftingAttention(12, 4)(tensors(2, 5, 12), paddle.to_tensor([5, 0])), r"lengths are \[5, 0\]"),
    (lambda: ShiftingAttention(12, 4)(tensors(2, 5, 12), paddle.to_tensor([6, 1])), "1 to 5"),
    (lambda: ShiftingAttention(12, 4)(tensors(2, 5, 12), paddle.to_tensor([5])), r"shape \[1\]"),
    (lambda: ShiftingAttention(12, 0), "0 attention units"),
    (lambda: AttentionCluster(5, (12, 4), (6,)), "cluster_nums"),
    (lambda: AttentionCluster(5, (12, 4, 2), (6, 3, 1)), "rgb and audio"),
])
def test_bad_input_is_named_in_one_line(call, words):
    with pytest.raises(PvnbError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_mini_configuration_trains_from_records(tmp_path):
    flash = make_features(tmp_path, sizes={"flash": (128, 64), "orders": (2, 2), "topics": (1, 1)}, progress=False) / "flash"
    task = get_task(load_config("attention_cluster_mini", **{"TRAIN.filelist": str(flash / "train.list"), "VALID.filelist": str(flash / "val.list")}))
    net, history = fit(task, epochs=6, seed=0, log_interval=1, valid_interval=6, progress=False)
    losses = [row["loss"] for row in history if "loss" in row]
    assert net.features(tensors(2, 25, 64)).shape == [2, 32 * 64]
    assert losses[-1] < .8 * losses[0] and history[-1]["valid_gap"] > .2
