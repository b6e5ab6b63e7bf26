"""Attention LSTM: the layer against plain loops, padding, both directions, faults, the mini configuration and its films, and the lesson's zoo cell."""

import numpy as np
import pytest

from helpers import jitter, run_zoo_cell
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.features import make_features
from paddlevideo_nb.datasets.loader import make_loader
from paddlevideo_nb.datasets.youtube8m import YouTube8MDataset, make_video, pad_collate, write_records
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.models.attention_lstm import AttentionLSTM, LSTMAttention, PeepholeLSTM
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.zoo import load_weights, save_weights

paddle = import_paddle()
LENGTHS = [7, 4, 1, 6]


def batch(*widths, seed=1):
    "Padded sequences `[4, 7, width]`, with rubbish behind their ends, and their lengths."
    rng = np.random.default_rng(seed)
    return *(paddle.to_tensor(rng.normal(0, 1, (4, 7, w)).astype("float32")) for w in widths), paddle.to_tensor(LENGTHS)


def by_loops(x, weight, bias):
    "The recurrence in float64, gate by gate and cell by cell: [T, 4S] -> [T, S]."
    def sigmoid(z): return 1/(1 + np.exp(-z))
    size = len(weight)
    h, c, out = np.zeros(size), np.zeros(size), []
    for step in x.astype("float64"):
        old_h, old_c, h, c = h, c, np.zeros(size), np.zeros(size)
        for k in range(size):
            def gate(block, k=k, step=step, old_h=old_h): return step[block*size + k] + bias[block*size + k] + sum(old_h[j]*weight[j, block*size + k] for j in range(size))
            write = sigmoid(gate(1) + bias[4*size + k]*old_c[k])
            keep = sigmoid(gate(2) + bias[5*size + k]*old_c[k])
            c[k] = keep*old_c[k] + write*np.tanh(gate(0))
            h[k] = sigmoid(gate(3) + bias[6*size + k]*c[k])*np.tanh(c[k])
        out.append(h)
    return np.array(out)


# --- the layer


@pytest.mark.parametrize("reverse", [False, True])
def test_layer_is_the_recurrence_over_each_sequences_own_length(reverse):
    lstm = jitter(PeepholeLSTM(3, "lstm_0", reverse))
    x, lengths = batch(12)
    y, turn = lstm(x, lengths).numpy(), slice(None, None, -1 if reverse else 1)
    for k, n in enumerate(LENGTHS):
        wanted = by_loops(x.numpy()[k, :n][turn], lstm.weight.numpy().astype("float64"), lstm.bias.numpy()[0].astype("float64"))[turn]
        assert np.abs(y[k, :n] - wanted).max() < 1e-5
        assert (y[k, n:] == 0).all()


def test_what_lies_behind_the_end_reaches_nothing():
    lstm = jitter(PeepholeLSTM(3, "lstm_0", reverse=True))
    x, lengths = batch(12)
    other = x.numpy().copy()
    for k, n in enumerate(LENGTHS):
        other[k, n:] = 1e4
    assert (lstm(paddle.to_tensor(other), lengths) == lstm(x, lengths)).all()


def test_peepholes_and_gate_order_matter():
    lstm = jitter(PeepholeLSTM(3, "lstm_0"))
    x, lengths = batch(12)
    before = lstm(x, lengths).numpy()
    for first, last in ((3*4, 3*5), (3*5, 3*6), (3*6, 3*7)):  # input, forget, output peephole
        value = lstm.bias.numpy()
        changed = value.copy()
        changed[:, first:last] = 0
        lstm.bias.set_value(changed)
        assert np.abs(lstm(x, lengths).numpy() - before).max() > 1e-3
        lstm.bias.set_value(value)


# --- padding


def gradients(network, inputs, lengths):
    "Gradients of all parameters, of the sum of squared logits over the batch."
    network.clear_gradients()
    (network(*inputs, lengths)**2).sum().backward()
    return {name: p.grad.numpy().astype("float64") for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["attention", "last"])
def test_padded_batch_equals_each_sequence_alone(pooling):
    network = jitter(AttentionLSTM(5, (6, 3), 4, 3, .5, (7, 4), pooling), size=.4)
    rgb, audio, lengths = batch(6, 3)
    logits, together, summed = network(rgb, audio, lengths).numpy(), gradients(network, (rgb, audio), lengths), {}
    for k, n in enumerate(LENGTHS):
        alone = rgb[k:k + 1, :n], audio[k:k + 1, :n]
        assert np.abs(network(*alone).numpy()[0] - logits[k]).max() < 1e-5
        for name, g in gradients(network, alone, None).items():
            summed[name] = summed.get(name, 0) + g
    assert set(summed) == set(together) and len(summed) >= 26
    for name, g in together.items():
        assert np.abs(g - summed[name]).max() < 1e-5*max(1, np.abs(g).max()), name


def test_more_padding_changes_nothing():
    network = jitter(AttentionLSTM(5, (6,), 4, 3, .5, (7, 4)))
    x, lengths = batch(6)
    longer = paddle.concat([x, paddle.full([4, 5, 6], 3.0)], 1)
    assert float((network(x, None, lengths) - network(longer, None, lengths)).abs().max()) < 1e-5


def test_attention_rows_sum_to_one_within_the_length():
    part = jitter(LSTMAttention(6, 4, 3, 0., 0, 0))
    x, lengths = batch(6)
    weights = part.weights(part.hidden(x, lengths), lengths).numpy()
    assert np.abs(weights.sum(1) - 1).max() < 1e-6
    for row, n in zip(weights, LENGTHS, strict=True):
        assert (row[:n] > 0).all() and (row[n:] == 0).all()


def test_last_states_are_where_each_direction_ends():
    part = jitter(LSTMAttention(6, 4, 3, 0., 0, 0, "last"))
    x, lengths = batch(6)
    hidden, pooled = part.hidden(x, lengths).numpy(), part(x, lengths).numpy()
    for k, n in enumerate(LENGTHS):
        assert np.allclose(pooled[k, :3], hidden[k, n - 1, :3]) and np.allclose(pooled[k, 3:], hidden[k, 0, 3:])


def test_it_sees_the_order():
    network = jitter(AttentionLSTM(5, (6,), 4, 3, .5, (7, 4)))
    x, _ = batch(6)
    assert float((network(x) - network(x.flip(1))).abs().max()) > 1e-3


# --- faults


def test_wrong_inputs_are_named():
    network = jitter(AttentionLSTM(5, (6, 3), 4, 3, .5, (7, 4)))
    rgb, audio, lengths = batch(6, 3)
    for wrong, message in (((audio, audio, lengths), r"rgb has shape \[4, 7, 3\], expected \[N, T, 6\]"), ((rgb, None, lengths), "audio has shape None"),
                           ((rgb, audio[:, :5], lengths), r"audio has shape \[4, 5, 3\]"), ((rgb[0], audio, lengths), r"rgb has shape \[7, 6\]"),
                           ((rgb, audio, lengths[:3]), r"expected 4 of 1 to 7"), ((rgb, audio, lengths - 1), r"lengths are \[6, 3, 0, 5\]"), ((rgb, audio, lengths + 1), r"lengths are \[8")):
        with pytest.raises(PvnbError, match=message):
            network(*wrong)


def test_wrong_settings_are_named():
    with pytest.raises(PvnbError, match="unknown pooling 'max', expected one of attention, last"):
        AttentionLSTM(5, (6,), 4, 3, pooling="max")
    for dims in ((), (6, 3, 2)):
        with pytest.raises(PvnbError, match="feature_dims"):
            AttentionLSTM(5, dims, 4, 3)


# --- the mini configuration


def orders(name, **overrides):
    "A small task on the theatre's orders."
    folder = make_features(progress=False)/"orders"
    lists = {f"{s}.filelist": str(folder/f"{'train' if s == 'TRAIN' else 'val'}.list") for s in ("TRAIN", "VALID", "TEST", "INFER")}
    return get_task(load_config(name, **lists, **overrides))


def test_mini_configuration_fits_the_films():
    task = orders("attention_lstm_mini")
    data, train = task.dataset("train"), task.config.TRAIN
    assert len(data) == train.num_samples and len(data) % train.batch_size == 0
    assert data[0]["rgb"].shape[1:] == tuple(task.config.MODEL.feature_dims) and data[0]["label"].shape == (task.config.MODEL.num_classes,)
    optimizer, schedule = task.optimizer(task.network())
    updates = train.decay_epochs[0]*len(data)//train.batch_size
    schedule.step(updates - 1)
    before = schedule.get_lr()
    schedule.step(updates + 1)
    assert before == pytest.approx(train.learning_rate) and schedule.get_lr() == pytest.approx(train.learning_rate*train.decay_gamma)
    assert train.decay_epochs[0] < train.epoch


def test_evaluation_does_not_depend_on_the_batches(tmp_path):
    task = orders("attention_lstm_mini")
    network = jitter(task.network())
    data = task.dataset("test")
    one, many = (evaluate(task, network, data, batch_size=b, progress=False) for b in (240, 7))
    for key in ("gap", "hit1", "perr", "mAP"):
        assert one[key] == pytest.approx(many[key], abs=1e-6)
    (first,) = [b for b in make_loader(data, 240)]
    with paddle.no_grad():
        loss = float(task.loss(task.forward(network, first), first))
        halves = [{k: v[part] for k, v in first.items() if k in ("rgb", "audio", "lengths", "label")} for part in (slice(0, 120), slice(120, 240))]
        assert loss == pytest.approx(sum(float(task.loss(task.forward(network, half), half)) for half in halves), rel=1e-5)  # a sum, not a mean


def test_weights_go_out_under_the_original_names_and_come_back(tmp_path):
    task = orders("attention_lstm_mini")
    network, names = jitter(task.network()), original_names(task.network())
    state = network.state_dict()
    assert names["parts.0.backward_lstm.bias"] == "lstm_1.b_0" and state["parts.0.backward_lstm.bias"].shape == [1, 7*32]
    save_weights(tmp_path/"w.safetensors", {name: state[key].numpy() for key, name in names.items()})
    again = load_weights(task.network(), tmp_path/"w.safetensors")
    again.eval()
    x = paddle.randn([2, 9, 64])
    assert (again(x) == network(x)).all()


# --- the lesson's zoo cell, on a network and videos small enough for a test


def small(name, **overrides):
    "The published configuration with a small network and narrow features."
    size = {"feature_dims": [12, 4], "embedding_size": 5, "lstm_size": 4, "hidden_sizes": [8, 6], "num_classes": 9}
    return load_config(name, **{f"MODEL.{k}": v for k, v in size.items()}, **overrides)


def run_cell(*where, **more): return run_zoo_cell("attention_lstm", *where, load_config=small, create_model=create_model, get_task=get_task, **more)


def test_zoo_cell_measures_the_published_weights(tmp_path):
    rng = np.random.default_rng(3)
    network = jitter(create_model("AttentionLSTM", small("attention_lstm")), seed=3)
    state = network.state_dict()
    save_weights(tmp_path/"w.safetensors", {name: state[key].numpy() for key, name in original_names(network).items()})
    videos = [make_video(str(k), [], rng.integers(0, 256, (n, 12), dtype=np.uint8), rng.integers(0, 256, (n, 4), dtype=np.uint8)) for k, n in enumerate((5, 9, 3, 12))]
    write_records(tmp_path/"a.tfrecord", videos)
    (tmp_path/"test.list").write_text("a.tfrecord\n")
    samples = pad_collate([s for d in [YouTube8MDataset(tmp_path/"a.tfrecord", "test", num_classes=9)] for s in [d[i] for i in range(4)]])
    best = network(*(paddle.to_tensor(samples[k]) for k in ("rgb", "audio", "lengths"))).numpy().argmax(1)
    gaps = {}
    for right in (True, False):
        for video, b in zip(videos, best, strict=True):
            video["labels"] = np.array([b if right else (b + 1) % 9])
        write_records(tmp_path/"a.tfrecord", videos)
        names = run_cell(tmp_path, tmp_path/"w.safetensors")
        (row,) = names["zoo_rows"]
        assert names["measured"]["videos"] == 4 and names["measured"]["hit1"] == float(right)
        assert row["published"] == .8594 and row["measured"] == names["measured"]["gap"] and row["ok"] == (row["measured"] >= .8494)
        gaps[right] = row["measured"]
    assert gaps[True] > gaps[False] and gaps[False] < .8494


def test_zoo_cell_names_a_missing_list(tmp_path):
    with pytest.raises(PvnbError, match="test.list"):
        run_cell(tmp_path, "none")
    assert run_cell(tmp_path, "", mode="mini")["zoo_rows"] == []
