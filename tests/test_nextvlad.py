"NeXtVLAD: its aggregation and NetVLAD's against plain loops, padding, order, parameter formulas, bytes and eigenvalues, faults, the mini configuration, checkpoints."
import numpy as np
import pytest

from helpers import jitter
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle, repo_dir
from paddlevideo_nb.datasets.youtube8m import YouTube8MDataset
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.layers.resnet import count_parameters
from paddlevideo_nb.models.nextvlad import GroupedVLAD, NetVLAD, NeXtVLAD, read_eigenvalues, unwhitening
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.zoo import load_weights, save_legacy

paddle = import_paddle()


def small(seed=0, **options):
    return jitter(NeXtVLAD(**{**dict(num_classes=5, channels=(12, 6), sizes=(8, 4), cluster_size=3, hidden_size=16, groups=4), **options}), seed)


def some_videos(lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (n, 12), dtype=np.uint8), rng.integers(0, 256, (n, 6), dtype=np.uint8)) for n in lengths]


def padded(videos, to=None, fill=0):
    "(rgb, audio, lengths) as tensors; what lies behind the end of a video is `fill`."
    longest = to or max(len(rgb) for rgb, _ in videos)
    parts = [np.stack([np.pad(v[i], ((0, longest - len(v[i])), (0, 0)), constant_values=fill) for v in videos]) for i in (0, 1)]
    return *map(paddle.to_tensor, parts), paddle.to_tensor(np.array([len(rgb) for rgb, _ in videos]))


def pulls(network, *inputs):
    "(logits, gradients of a weighted sum of them by the parameters), as arrays."
    network.clear_gradients()
    logits = network(*inputs)
    (logits * paddle.arange(1, logits.shape[1] + 1, dtype="float32")).sum().backward()
    return logits.numpy(), [p.grad.numpy() for p in network.parameters() if p.grad is not None]


def near(ours, theirs, bound=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=bound, atol=bound*max(1, np.abs(theirs).max()))


# --- the aggregations are their definitions


def norm(layer, x):
    mean, var, scale, shift = (v.numpy().astype("float64") for v in (layer._mean, layer._variance, layer.weight, layer.bias))
    return (x - mean)/np.sqrt(var + 1e-5)*scale + shift


def softmax(x):
    e = np.exp(x - x.max())
    return e/e.sum()


def described(y, layer):
    "Each column to length 1, flattened feature by feature, then the batch norm."
    return norm(layer.norm_out, (y/np.sqrt((y*y).sum(0) + 1e-12)).reshape(-1))


def test_netvlad_is_its_definition():
    layer = jitter(NetVLAD(5, 3))
    x = np.random.default_rng(2).normal(size=(2, 4, 5)).astype("float32")
    w, c = layer.clusters.numpy().astype("float64"), layer.centres.numpy().astype("float64")
    for film, found in zip(x, layer(paddle.to_tensor(x)).numpy(), strict=True):
        y = np.zeros((5, 3))
        for frame in film:
            a = softmax(norm(layer.norm_assign, frame @ w))
            for k in range(3):
                y[:, k] += a[k]*(frame - c[k])
        near(found, described(y, layer), 1e-4)


def test_grouped_vlad_is_its_definition():
    layer = jitter(GroupedVLAD(6, 4, 3, 3, 4))  # 12 wide, 4 groups of 3
    x = np.random.default_rng(3).normal(size=(2, 4, 6)).astype("float32")
    w, c = layer.clusters.numpy().astype("float64"), layer.centres.numpy().astype("float64")
    assert c.shape == (3, 3) and layer(paddle.to_tensor(x)).shape == [2, 9]
    for film, found in zip(x, layer(paddle.to_tensor(x)).numpy(), strict=True):
        y = np.zeros((3, 3))
        for frame in film:
            wide = frame @ layer.expand.weight.numpy().astype("float64") + layer.expand.bias.numpy()
            gate = 1/(1 + np.exp(-(wide @ layer.attend.weight.numpy() + layer.attend.bias.numpy())))
            scores = norm(layer.norm_assign, wide @ w)
            for g in range(4):
                a = softmax(scores[3*g:3*g + 3])
                for k in range(3):
                    y[:, k] += gate[g]*a[k]*(wide[3*g:3*g + 3] - c[k])
        near(found, described(y, layer), 1e-4)


# --- sequences


def test_a_padded_batch_is_each_video_alone():
    network, videos = small(), some_videos([7, 3, 1, 5])
    together, gradients = pulls(network, *padded(videos))
    alone = [pulls(network, *padded([v])) for v in videos]
    near(together, np.concatenate([logits for logits, _ in alone]))
    for whole, parts in zip(gradients, zip(*(g for _, g in alone), strict=True), strict=True):
        near(whole, np.sum(parts, 0))


@pytest.mark.parametrize("training", [False, True])
def test_padding_is_not_seen(training):
    network, videos = small(dropout=0.0), some_videos([7, 3, 4, 6])
    network.train() if training else network.eval()
    logits, gradients = pulls(network, *padded(videos))
    far, far_gradients = pulls(network, *padded(videos, to=11, fill=255))
    near(far, logits, 1e-4)
    for a, b in zip(gradients, far_gradients, strict=True):
        near(b, a, 1e-4 if not training else 1e-3)


def test_lengths_are_optional_where_all_are_full():
    network, videos = small(), some_videos([6, 6])
    rgb, audio, lengths = padded(videos)
    near(network(rgb, audio).numpy(), network(rgb, audio, lengths).numpy())


def test_the_order_of_frames_is_nothing_to_it():
    network, (rgb, audio) = small(), some_videos([9])[0]
    rng = np.random.default_rng(4)
    before = network(*padded([(rgb, audio)])).numpy()
    near(network(*padded([(rgb[rng.permutation(9)], audio[rng.permutation(9)])])).numpy(), before)  # not even which sound belongs to which picture
    changed = rgb.copy()
    changed[4] = 255 - changed[4]
    assert np.abs(network(*padded([(changed, audio)])).numpy() - before).max() > 1e-3


def test_frames_twice_are_frames_once():
    network, (rgb, audio) = small(), some_videos([9])[0]
    near(network(*padded([(np.repeat(rgb, 2, 0), np.repeat(audio, 2, 0))])).numpy(), network(*padded([(rgb, audio)])).numpy(), 1e-4)


# --- parameters


def matrices(*layers):
    return sum(int(p.size) for layer in layers for p in layer.parameters() if len(p.shape) == 2)


def grouped_formula(n, k, h, groups, expansion):
    "Lin et al. 2018, Eq. 9, multiplied out."
    wide = expansion*n
    return wide*n + wide*groups + wide*groups*k + k*wide//groups + k*wide//groups*h


@pytest.mark.parametrize(("n", "k", "h", "groups", "expansion"), [(24, 5, 7, 4, 2), (16, 3, 9, 8, 1), (10, 4, 6, 5, 3), (12, 7, 5, 1, 2)])
def test_parameter_formulas(n, k, h, groups, expansion):
    assert matrices(NetVLAD(n, k), paddle.nn.Linear(n*k, h)) == n*k*(h + 2)
    assert matrices(GroupedVLAD(n, n, k, expansion, groups), paddle.nn.Linear(k*expansion*n//groups, h)) == grouped_formula(n, k, h, groups, expansion)


def test_published_counts():
    ours, baseline = grouped_formula(1024, 128, 2048, 8, 2), 1024*128*(2048 + 2)
    assert (ours, baseline) == (71_352_320, 268_697_600)
    assert matrices(GroupedVLAD(1024, 1024, 128, 2, 8)) == ours - 128*256*2048


def test_whole_network_is_counted():
    "Every trainable number of a small network, from its sizes alone."
    wide, hidden, classes, described_by = 2*(8 + 4), 16, 5, 3*2*(8 + 4)//4
    weights = 2*8*12 + 2*4*6 + wide*4 + (wide*4*3) + 3*(2*8 + 2*4)//4 + described_by*hidden + 2*hidden*hidden//8 + hidden*classes
    vectors = wide + 2*4 + classes + 2*(2*4*3 + described_by + hidden + hidden//8)
    assert count_parameters(small()) == weights + vectors


# --- bytes, eigenvalues, decay


def test_bytes_are_decoded_in_the_network():
    network = small()
    rgb, audio = (paddle.to_tensor(np.resize(np.arange(256, dtype=np.uint8), (1, 40, width))) for width in (12, 6))
    x, y = network.decode(rgb, audio)
    np.testing.assert_allclose(y.numpy(), audio.numpy()*(4/255) + 4/512 - 2, atol=1e-5)
    np.testing.assert_allclose(x.numpy(), (rgb.numpy()*(4/255) - 2)*network.eigen.numpy(), atol=1e-5)  # without the half step
    assert network.eigen.stop_gradient


def test_eigenvalues(tmp_path):
    values = np.linspace(9, 1, 2048)[:, None].astype("float32")
    np.save(tmp_path/"eigenvals.npy", values)
    assert np.array_equal(read_eigenvalues(tmp_path/"eigenvals.npy", 1024), values[:1024, 0].astype("float64"))
    assert read_eigenvalues(tmp_path/"eigenvals.npy").shape == (2048,)
    np.testing.assert_allclose(unwhitening(values[:3]), np.sqrt(values[:3]) + 1e-4, rtol=1e-6)
    network = NeXtVLAD(4, (6, 2), (4, 4), 2, 8, 2, eigenvalues=values)  # more than it needs
    np.testing.assert_allclose(network.eigen.numpy(), np.sqrt(values[:6, 0]) + 1e-4, rtol=1e-6)
    assert (NeXtVLAD(4, (6, 2), (4, 4), 2, 8, 2).eigen.numpy() == 1).all()


def test_the_package_has_youtube8ms_eigenvalues():
    found = read_eigenvalues(channels=1024)
    assert found.shape == (1024,) and (found > 0).all() and (np.diff(found) <= 0).all()
    assert np.array_equal(found, read_eigenvalues("no/such/file.npy"))


@pytest.mark.parametrize("content", [b"not an array", None, np.array([1.0, -1.0] * 8), np.ones(3), np.array([{"a": 1}], dtype=object)])
def test_bad_eigenvalues(tmp_path, content):
    path = tmp_path/"eigenvals.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(PvnbError, match="eigenval") as failure:
        read_eigenvalues(path, 16)
    assert "\n" not in str(failure.value) and str(path) in str(failure.value)


def test_only_the_last_layer_is_decayed():
    names = original_names(small())
    keys = [key for key, p in small().named_parameters() if p.regularizer is not None]
    assert sorted(names[key] for key in keys) == ["logits_clf_bias", "logits_clf_weights"]


# --- faults


@pytest.mark.parametrize(("change", "words"), [
    (lambda rgb, audio: (rgb.astype("float32"), audio), "rgb is float32"),
    (lambda rgb, audio: (rgb, audio.astype("float32")), "audio is float32"),
    (lambda rgb, audio: (rgb[:, :, :5], audio), r"expected uint8 \[N, T, 12\]"),
    (lambda rgb, audio: (rgb, rgb), r"expected uint8 \[N, T, 6\]"),
    (lambda rgb, audio: (rgb[0], audio[0]), r"rgb is uint8 \[4, 12\]"),
])
def test_inputs_that_are_not_its_bytes(change, words):
    rgb, audio, _ = padded(some_videos([4]))
    with pytest.raises(PvnbError, match=words):
        small()(*change(rgb, audio))


@pytest.mark.parametrize(("kind", "width"), [("netvlad", 3*(12 + 6)), ("mean", 12 + 6)])
def test_other_aggregations(kind, width):
    network, videos = small(aggregation=kind), some_videos([7, 3])
    assert network.features(*padded(videos)).shape == [2, width]
    together, gradients = pulls(network, *padded(videos, fill=255))
    alone = [pulls(network, *padded([v])) for v in videos]
    near(together, np.concatenate([logits for logits, _ in alone]))
    for whole, parts in zip(gradients, zip(*(g for _, g in alone), strict=True), strict=True):
        near(whole, np.sum(parts, 0))
    with pytest.raises(PvnbError, match="unknown aggregation 'netvlat', did you mean|unknown aggregation 'netvlat'.*netvlad"):
        small(aggregation="netvlat")


def test_impossible_sizes():
    with pytest.raises(PvnbError, match="video: expansion 2 times size 8 cannot be cut into 3"):
        small(groups=3)
    with pytest.raises(PvnbError, match="3 eigenvalues for rgb features of 12"):
        small(eigenvalues=np.ones(3))


# --- the task


def test_mini_configuration(tmp_path):
    np.save(tmp_path/"eigenvals.npy", np.linspace(2, 1, 64)[:, None])
    task = get_task(load_config("nextvlad_mini", eigen_file=str(tmp_path/"eigenvals.npy")))
    network = task.network()
    np.testing.assert_allclose(network.eigen.numpy(), np.sqrt(np.linspace(2, 1, 64)) + 1e-4, rtol=1e-5)
    batch = {"rgb": paddle.zeros([2, 3, 64], "uint8"), "audio": paddle.zeros([2, 3, 16], "uint8"), "lengths": paddle.to_tensor([3, 2]), "label": paddle.zeros([2, 20])}
    outputs = task.forward(network, batch, "train")
    assert outputs["logits"].shape == [2, 20] and float(task.loss(outputs, batch)) > 0
    optimizer, schedule = task.optimizer(network)
    assert optimizer._grad_clip is None and schedule.get_lr() == task.config.TRAIN.learning_rate  # gradient_clip_norm is read by nobody, as in 2019


def test_features_of_another_width_need_their_own_eigenvalues(tmp_path):
    with pytest.raises(PvnbError, match="are for 1024 features, not for 64"):
        create_model("NEXTVLAD", load_config("nextvlad_mini", eigen_file=str(tmp_path/"missing.npy")))


def test_legacy_checkpoint(tmp_path):
    network, other = small(seed=5), small(seed=6)
    state = network.state_dict()
    save_legacy(tmp_path/"NEXTVLAD.pdparams", {name: state[key].numpy() for key, name in original_names(network).items()}, 1)
    load_weights(other, tmp_path/"NEXTVLAD.pdparams")
    inputs = padded(some_videos([4, 2]))
    assert np.array_equal(other(*inputs).numpy(), network(*inputs).numpy())


def test_a_real_record_at_the_published_size():
    record = repo_dir().parent/"shared"/"data"/"youtube8m_one_record.pkl"
    if not record.is_file():
        pytest.skip("no real YouTube-8M record: ../shared/data/youtube8m_one_record.pkl is not there")
    video = YouTube8MDataset(record, "test", dequantise=False)[0]
    network = create_model("NEXTVLAD")
    with paddle.no_grad():
        logits = network(paddle.to_tensor(video["rgb"][None]), paddle.to_tensor(video["audio"][None]))
    assert logits.shape == [1, 3862] and bool(paddle.isfinite(logits).all())
    x, y = network.decode(paddle.to_tensor(video["rgb"][None]), paddle.to_tensor(video["audio"][None]))
    spread = x.numpy()[0].std(0)
    assert spread[:32].mean() > 2*spread[-32:].mean()  # un-whitened: the first components vary most
    assert np.abs(y.numpy()).max() < 2.01
