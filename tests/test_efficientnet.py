"EfficientNet-Lite0: its shapes, its arithmetic, its weights on real pictures."
import numpy as np
import pytest

from helpers import real_weights
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.models.efficientnet import STAGES, EfficientNetLite0, InvertedBottleneck
from paddlevideo_nb.zoo import load_weights

paddle = import_paddle()


@pytest.fixture(scope="module")
def net():
    paddle.seed(0)
    network = EfficientNetLite0(12)
    network.eval()
    return network


def pictures(*shape): return paddle.to_tensor(np.random.default_rng(0).uniform(-1, 1, shape).astype("float32"))


def test_parameters():
    network = EfficientNetLite0()
    assert sum(p.size for p in network.parameters() if not p.stop_gradient) == 4_652_008
    assert len(network.blocks) == sum(s[0] for s in STAGES) == 16 and sum(b.short for b in network.blocks) == 9


def test_frames_and_films(net):
    films = pictures(2, 3, 3, 64, 33)
    with paddle.no_grad():
        maps, features, logits = net.maps(films), net.features(films), net(films)
        assert maps.shape == [2, 3, 1280, 2, 2] and features.shape == [2, 3, 1280] and logits.shape == [2, 3, 12]
        single = net(films[:, 1])
        assert single.shape == [2, 12]
        np.testing.assert_allclose(logits[:, 1].numpy(), single.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(net.head(maps).numpy(), logits.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(net.fc(features).numpy(), logits.numpy(), rtol=1e-5, atol=1e-6)


def test_short_cut():
    "Where the shapes agree the input comes through: with a projection of zeros the block changes nothing."
    block = InvertedBottleneck(8, 8, 3, 1, 6)
    block.eval()
    block.project.conv.weight.set_value(np.zeros([8, 48, 1, 1], "float32"))
    x = pictures(1, 8, 7, 7)
    with paddle.no_grad():
        np.testing.assert_array_equal(block(x).numpy(), x.numpy())
        assert InvertedBottleneck(8, 8, 3, 2, 6)(x).shape == [1, 8, 4, 4] and not InvertedBottleneck(8, 8, 3, 2, 6).short


def test_faults(net):
    for shape in ((1, 4, 64, 64), (3, 64, 64), (1, 3, 31, 64), (1, 2, 3, 64, 16)):
        with pytest.raises(PvnbError, match="expected .N, 3, H, W. or .N, T, 3, H, W."):
            net(pictures(*shape))


def test_real_pictures():
    """A palace (698) for the Chinese palace of scikit-learn's china.jpg, a daisy (985) for its flower, with a margin over the second.

    The flower is a dahlia, which is not among the thousand classes; the daisy is its nearest relative there.
    """
    import cv2
    from sklearn.datasets import load_sample_images
    network = load_weights(EfficientNetLite0(), real_weights("efficientnet_lite0"))
    network.eval()
    for picture, wanted in zip(load_sample_images().images, (698, 985), strict=True):
        height, width = picture.shape[:2]
        side = int(min(height, width) * 224/256)
        top, left = (height - side)//2, (width - side)//2
        small = cv2.resize(picture[top:top + side, left:left + side], (224, 224), interpolation=cv2.INTER_CUBIC)
        image = ((small.astype("float32") - 127)/128).transpose(2, 0, 1)[None]
        with paddle.no_grad():
            scores = paddle.nn.functional.softmax(network(paddle.to_tensor(image)))[0].numpy()
        best = scores.argsort()[::-1][:2]
        assert best[0] == wanted and scores[best[0]] > 1.5 * scores[best[1]]
