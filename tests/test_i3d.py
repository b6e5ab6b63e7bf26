"I3D: its shapes, its arithmetic, its weights on real clips."
import numpy as np
import pytest

from helpers import real_weights
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.views import crop_normalised, resize_short, spatial_offsets
from paddlevideo_nb.models.i3d import ENDPOINTS, I3D, Unit3D
from paddlevideo_nb.pretrained import label_names
from paddlevideo_nb.video import probe, read_frames
from paddlevideo_nb.zoo import load_weights

paddle = import_paddle()


@pytest.fixture(scope="module")
def net():
    paddle.seed(0)
    network = I3D(12)
    network.eval()
    return network


def clip(*shape): return paddle.to_tensor(np.random.default_rng(0).uniform(-1, 1, shape).astype("float32"))


def test_parameters():
    assert sum(p.size for p in I3D().parameters() if not p.stop_gradient) == 12_689_984
    # what a count by hand gives: kernels, one offset for each of 7,280 normalised channels, the classifier
    state = I3D().state_dict()
    assert sum(v.size for k, v in state.items() if k.endswith("offset")) == 7280 and not any("norm.weight" in k for k in state)
    assert state["logits.weight"].size + state["logits.bias"].size == 410_000


@pytest.mark.parametrize("t, steps", [(8, 1), (9, 2), (16, 2), (17, 3), (25, 4)])
def test_any_length(net, t, steps):
    image = clip(2, 3, t, 40, 33)
    with paddle.no_grad():
        maps = net.maps(image)
        out, over_time, features = net(image), net.logits_over_time(image), net.features(image)
        assert maps.shape == [2, steps, 1024, 2, 2] and out.shape == [2, 12] and features.shape == [2, 1024]
        assert over_time.shape == [2, max(steps - 1, 1), 12]
        np.testing.assert_allclose(net.head(maps).numpy(), out.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(over_time.mean(1).numpy(), out.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(net.logits(features).numpy(), out.numpy(), rtol=1e-5, atol=1e-5)


def test_endpoints(net):
    channels = dict(zip(ENDPOINTS, (64, 64, 64, 192, 192, 256, 480, 480, 512, 512, 512, 528, 832, 832, 832, 1024), strict=True))
    halved = {"Conv3d_1a_7x7": (1, 1), "MaxPool3d_2a_3x3": (1, 2), "MaxPool3d_3a_3x3": (1, 3), "MaxPool3d_4a_3x3": (2, 4), "MaxPool3d_5a_2x2": (3, 5)}
    image, half = clip(1, 3, 16, 64, 96), None
    with paddle.no_grad():
        for name in ENDPOINTS:
            half = halved.get(name, half)
            assert net.endpoint(image, name).shape == [1, channels[name], 16 >> half[0], 64 >> half[1], 96 >> half[1]], name
        assert (net.endpoint(image).numpy() == net.maps(image).numpy().transpose(0, 2, 1, 3, 4)).all()


def test_averages_of_the_head(net):
    "The means over two steps and 7x7 places, against NumPy."
    maps = clip(1, 4, 1024, 8, 9)
    a = maps.numpy()[0]                                                                                     # [4, 1024, 8, 9]
    windows = np.lib.stride_tricks.sliding_window_view(a, (2, 7, 7), (0, 2, 3)).mean((-3, -2, -1))          # [3, 1024, 2, 3]
    with paddle.no_grad():
        np.testing.assert_allclose(net.pooled(maps).numpy()[0], windows.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_a_unit_against_numpy():
    "SAME padding with an odd surplus, batch norm without scale, ReLU: written out."
    paddle.seed(1)
    unit = Unit3D(2, 3, 3, 2)
    unit.eval()
    rng = np.random.default_rng(1)
    bias, mean, variance = rng.normal(size=3), rng.normal(size=3), rng.uniform(.5, 2, 3)
    for tensor, value in ((unit.offset, bias.reshape(-1, 1, 1, 1)), (unit.norm._mean, mean), (unit.norm._variance, variance)):
        tensor.set_value(value.astype("float32"))
    image, kernel = clip(1, 2, 6, 5, 8), unit.conv.weight.numpy()
    padded = np.pad(image.numpy()[0], ((0, 0), (0, 1), (1, 1), (0, 1)))  # even sizes: one after; odd: one on each side
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), (1, 2, 3))[:, ::2, ::2, ::2]  # [2, 3, 3, 4, 3, 3, 3]
    y = np.einsum("cthwijk,ocijk->othw", windows, kernel)
    column = (-1, 1, 1, 1)
    wanted = np.maximum((y - mean.reshape(column)) / np.sqrt(variance + 1e-3).reshape(column) + bias.reshape(column), 0)
    with paddle.no_grad():
        np.testing.assert_allclose(unit(image).numpy()[0], wanted, rtol=1e-4, atol=1e-5)


def test_training_reaches_every_parameter():
    paddle.seed(2)
    network = I3D(3)
    network.train()
    network(clip(2, 3, 9, 32, 32)).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if not p.stop_gradient and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert silent == []


def test_gradient_of_a_unit():
    "Against differences: of the input through the batch statistics, and of the offset."
    paddle.seed(3)
    unit, image, weight = Unit3D(2, 3, 3, 2), clip(2, 2, 4, 6, 6), clip(2, 3, 2, 3, 3)
    unit.train()
    unit.offset.set_value(np.full([3, 1, 1, 1], .3, "float32"))
    image.stop_gradient = False
    (unit(image) * weight).sum().backward()
    for tensor, at in ((image, (1, 0, 2, 3, 3)), (image, (0, 1, 1, 2, 4)), (unit.offset, (1, 0, 0, 0))):
        value, ends = tensor.numpy().copy(), []
        for step in (1e-2, -1e-2):
            moved = value.copy()
            moved[at] += step
            tensor.set_value(moved)
            with paddle.no_grad():
                ends.append(float((unit(image) * weight).sum()))
        tensor.set_value(value)
        assert abs((ends[0] - ends[1])/2e-2 - float(tensor.grad.numpy()[at])) < 2e-2 * max(1, abs(float(tensor.grad.numpy()[at])))


def test_faults(net):
    for shape, text in (((1, 3, 7, 64, 64), "7 frames"), ((1, 3, 8, 64, 31), "31x64 pixels, expected at least 8 frames of 32x32"), ((1, 8, 3, 64, 64), r"\[1, 8, 3, 64, 64\]"),
                        ((3, 8, 64, 64), "expected .N, 3, T, H, W.")):
        with pytest.raises(PvnbError, match=text):
            net(clip(*shape))
    with pytest.raises(PvnbError, match="did you mean 'Mixed_4f'"):
        net.endpoint(clip(1, 3, 8, 32, 32), "mixed_4f2")


# ---- the real weights


@pytest.fixture(scope="module")
def trained():
    network = load_weights(I3D(), real_weights("i3d"))
    network.eval()
    return network


def seen(path, frames=64):
    "The middle of a video as the network takes it."
    first = max(probe(path).frames - frames, 0)//2
    small = resize_short(read_frames(path, np.arange(first, first + frames)), 256)
    return crop_normalised(small, *spatial_offsets(*small.shape[1:3], 224), 224, False, [127.5], [127.5])[None]


def named_scores(network, image):
    with paddle.no_grad():
        scores = paddle.nn.functional.softmax(network(paddle.to_tensor(image)))[0].numpy()
    return label_names()[scores.argmax()], float(scores.max())


@pytest.mark.parametrize("file, action", [("archery.avi", "archery"), ("flipping_pancake.mkv", "flipping pancake"), ("cleaning_pool.mp4", "cleaning pool")])
def test_real_clips(trained, repo, file, action):
    path = repo.parent/"shared"/"data"/"clips"/file
    if not path.is_file():
        pytest.skip(f"no clip {file} beside this checkout: it may not be passed on")
    found, score = named_scores(trained, seen(path))
    assert found == action and score >= .9
