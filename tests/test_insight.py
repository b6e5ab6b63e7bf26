"What adds to a score, where and when: exact for linear heads, first-order for others, and nothing is left disturbed."
import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.insight import activation_figure, activation_map, overlay, over_time, paddle
from paddlevideo_nb.models.nonlocal_net import NonLocal
from paddlevideo_nb.models.stnet import StNet
from paddlevideo_nb.models.tsm import TSM
from paddlevideo_nb.models.tsn import TSN
from paddlevideo_nb.plots import save_figure

NETWORKS = {  # network, shape of two clips, moments that its maps have
    "TSN": (lambda: TSN(5, 14, 4), [2, 3, 3, 64, 64], 3), "TSM": (lambda: TSM(5, 14, 8), [2, 4, 3, 64, 64], 4),
    "STNET": (lambda: StNet(5, 14, 4, seglen=2), [2, 3, 6, 64, 64], 3),
    "NONLOCAL": (lambda: NonLocal(5, 14, 1, 4, {4: 1}, gamma=1.0, block={"gamma": 1.0}), [2, 3, 4, 64, 64], 2),
}


@pytest.fixture(scope="module", params=NETWORKS)
def made(request):
    "(name, network in training mode, two clips, moments of the maps)."
    make, shape, moments = NETWORKS[request.param]
    paddle.seed(3)
    return request.param, make(), paddle.randn(shape), moments


def test_best_class_by_default_and_logits_of_the_network(made):
    _, network, image, moments = made
    maps, logits = activation_map(network, image)
    again, _ = activation_map(network, image, logits.argmax(1))
    network.eval()
    assert np.allclose(logits, network(image).numpy(), rtol=1e-4, atol=1e-5) and np.array_equal(maps, again)
    network.train()
    assert maps.shape == (2, moments, 2, 2) and maps.dtype == logits.dtype == np.float32
    assert np.abs(maps).max() > 0 and np.allclose(over_time(maps), maps.reshape(2, moments, -1).sum(2))


@pytest.mark.parametrize("name", ["TSN", "TSM"])
@pytest.mark.parametrize("k", range(5))
def test_mean_and_linear_head_adds_up_to_the_logit(name, k):
    make, shape, _ = NETWORKS[name]
    paddle.seed(k)
    network = make()
    network.fc.bias.set_value(paddle.linspace(-1, 1, 5))
    maps, logits = activation_map(network, paddle.randn(shape), [k, k])
    assert maps.sum((1, 2, 3)) + network.fc.bias.numpy()[k] == pytest.approx(logits[:, k], abs=1e-5)


def test_each_moment_of_tsn_is_what_is_lost_without_it():
    paddle.seed(0)
    network, image = TSN(5, 14, 4), paddle.randn([1, 3, 3, 64, 64])
    network.eval()
    added = over_time(activation_map(network, image, [2])[0])[0]
    for t in range(3):
        maps = network.maps(image).numpy()
        whole = network.head(paddle.to_tensor(maps)).numpy()[0, 2]
        maps[:, t] = 0
        assert whole - network.head(paddle.to_tensor(maps)).numpy()[0, 2] == pytest.approx(added[t], abs=1e-5)


def test_each_moment_is_the_slope_of_the_score(made):
    "Any head: making the maps of one moment a little stronger raises the score by so much of what that moment adds."
    _, network, image, moments = made
    added = over_time(activation_map(network, image, [1, 4])[0])
    network.eval()
    head, maps, small = network.to(dtype="float64").head, network.maps(image.astype("float64")).numpy(), 1e-5

    def scores(t, factor):
        changed = maps.copy()
        changed[:, t] *= factor
        return head(paddle.to_tensor(changed)).numpy()[[0, 1], [1, 4]]

    try:
        for t in range(moments):
            assert (scores(t, 1 + small) - scores(t, 1 - small))/(2*small) == pytest.approx(added[:, t], rel=1e-3, abs=1e-4)
    finally:
        network.to(dtype="float32")
        network.train()


def test_nothing_is_left_disturbed(made):
    _, network, image, _ = made
    network(image).sum().backward()
    frozen = [m for m in network.sublayers() if type(m).__name__.startswith("BatchNorm")][0]
    frozen.eval()
    modes = [m.training for m in network.sublayers(include_self=True)]
    before = {k: v.numpy().copy() for k, v in network.state_dict().items()}
    gradients = {k: None if p.grad is None else p.grad.numpy().copy() for k, p in network.named_parameters()}
    with paddle.no_grad():
        quiet, _ = activation_map(network, image)
        assert not paddle.is_grad_enabled() if hasattr(paddle, "is_grad_enabled") else True
    loud, _ = activation_map(network, image)
    with pytest.raises(PvnbError):
        activation_map(network, image, [0, 5])
    assert np.array_equal(quiet, loud)
    assert [m.training for m in network.sublayers(include_self=True)] == modes and not frozen.training and network.training
    assert all(np.array_equal(before[k], v.numpy()) for k, v in network.state_dict().items())
    for k, p in network.named_parameters():
        assert (p.grad is None) == (gradients[k] is None) and (p.grad is None or np.array_equal(p.grad.numpy(), gradients[k])), k
    network.clear_gradients()
    network.train()


@pytest.mark.parametrize("classes", [[0, 5], [-1, 0], [0], [0, 1, 2], [0.0, 1.0]])
def test_wrong_classes_are_named(classes):
    with pytest.raises(PvnbError, match="for 2 clips, expected one of 0 .. 4 for each"):
        activation_map(TSN(5, 14, 4), paddle.zeros([2, 1, 3, 32, 32]), classes)


def test_a_network_without_maps_is_named():
    with pytest.raises(PvnbError, match="Linear has no maps"):
        activation_map(paddle.nn.Linear(3, 2), paddle.zeros([1, 3]))


def test_overlay_is_brightest_where_most_is_added():
    frames, maps = np.full((4, 40, 60, 3), 90, np.uint8), np.full((2, 2, 3), -1.0)
    maps[1, 1, 2], maps[0, 0, 0] = 4, 1
    shown = overlay(frames, maps)
    assert shown.shape == frames.shape and shown.dtype == np.uint8
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[2], shown[3])      # a moment covers its frames
    assert (shown[0, 20:, 40:] == 90).all() and (shown[2, :20, :20] == 90).all()          # what speaks against is not painted
    changed = np.abs(shown.astype(int) - 90).sum(3)
    assert changed[2, 39, 59] == changed.max() > 2*changed[0, 0, 0] > 0                   # one scale for all moments
    assert (overlay(frames, -np.abs(maps)) == 90).all()


@pytest.mark.parametrize("frames, maps, said", [
    (np.zeros((4, 8, 8, 3), np.uint8), np.zeros((3, 2, 2)), "a multiple"), (np.zeros((4, 8, 8, 3)), np.zeros((2, 2, 2)), "float64"),
    (np.zeros((4, 8, 8), np.uint8), np.zeros((2, 2, 2)), "expected uint8"), (np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 2)), "expected uint8"),
    (np.zeros((4, 8, 8, 3), np.uint8), np.full((2, 2, 2), np.nan), "diverged")])
def test_what_does_not_fit_is_said(frames, maps, said):
    for draw in (overlay, activation_figure):
        with pytest.raises(PvnbError, match=said):
            draw(frames, maps)


@pytest.mark.parametrize("frames, moments", [(1, 1), (6, 3), (125, 25)])
def test_figure_shows_few_frames_and_every_moment(frames, moments, tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(moments, 7, 7))
    fig = activation_figure(rng.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8), maps, np.arange(frames)/5, "a title")
    top, bottom, scale = fig.axes
    assert len(top.get_xticks()) == min(frames, 10) and top.get_title(loc="left") == "a title" and top.get_xlabel() == "time (s)"
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(maps.sum((1, 2)).tolist())
    assert scale.get_ylim() == pytest.approx((0, maps.max())) and scale.get_ylabel() == "added by a place"
    assert save_figure(fig, tmp_path/"seen.png").stat().st_size <= 150_000
