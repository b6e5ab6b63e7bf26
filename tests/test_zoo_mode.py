"""The zoo mode of the TSN lesson, on a miniature laid out as the published files are: a legacy TSN.pdparams and a test.list of pickled clips."""
import io

import numpy as np
import pytest
from PIL import Image

from helpers import run_zoo_cell
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.kinetics import write_pickle
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.reproduce import record, verdict
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.zoo import save_legacy, weights_form

paddle = import_paddle()
CLIPS, FRAMES, RIGHT = 6, 8, 4
MEAN, STD = np.float32([.485, .456, .406]), np.float32([.229, .224, .225])


def jpegs(clip):
    "Eight frames of 80 x 60, of a colour and a stripe of their clip's own."
    rng, frames = np.random.default_rng(clip), []
    base = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for t in range(FRAMES):
        picture = Image.fromarray(np.roll(base, t, axis=1)).resize((80, 60), Image.BILINEAR)
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=95)
        frames.append(data.getvalue())
    return frames


def as_network_input(frames, segments):
    "The published test recipe once more, without the library: middle frames, 256 on the short side at 4:3, centre crop of 224, normalised."
    step = FRAMES//segments
    rows = []
    for i in range(segments):
        picture = Image.open(io.BytesIO(frames[i*step + (step - 1)//2])).convert("RGB").resize((341, 256), Image.BILINEAR)
        left, top = round((341 - 224)/2), round((256 - 224)/2)
        pixels = np.asarray(picture, dtype=np.float32)[top:top + 224, left:left + 224]/255
        rows.append(((pixels - MEAN)/STD).transpose(2, 0, 1))
    return np.stack(rows)


def cross_entropy(logits, labels):
    z = logits.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Full-size random TSN as a 2019 pickle, six pickled clips of which it names four rightly, and what an independent computation finds."
    root = tmp_path_factory.mktemp("zoo")
    paddle.seed(7)
    network, clips = create_model("TSN"), [jpegs(c) for c in range(CLIPS)]
    with paddle.no_grad():
        features = {n: np.concatenate([network.features(paddle.to_tensor(as_network_input(c, n)[None])).numpy() for c in clips]) for n in (7, 3)}
    rng = np.random.default_rng(7)
    centre = features[7].mean(0)
    length = np.linalg.norm(features[7] - centre, axis=1).mean()
    weight = (rng.standard_normal(network.fc.weight.shape)*3/length).astype("float32")  # logits of deviation 3
    network.fc.weight.set_value(weight)                       # random weights see all clips alike; about their mean they differ
    network.fc.bias.set_value((-centre @ weight).astype("float32"))
    logits = {n: f @ weight - centre @ weight for n, f in features.items()}
    predicted = logits[7].argmax(1)
    labels = predicted.copy()
    labels[RIGHT:] = (predicted[RIGHT:] + 1) % 400            # exactly four are right
    state = network.state_dict()
    save_legacy(root/"TSN.pdparams", {name: state[key].numpy() for key, name in original_names(network).items()}, 1)
    for k, (frames, label) in enumerate(zip(clips, labels, strict=True)):
        write_pickle(root/f"clip{k}.pkl", f"clip{k}", int(label), frames)
    (root/"test.list").write_text("".join(f"{root/f'clip{k}.pkl'}\n" for k in range(CLIPS)))
    return root, labels, logits


def run_cell(*where, **more): return run_zoo_cell("tsn", *where, load_config=load_config, evaluate=evaluate, get_task=get_task, **more)


def test_zoo_cell_measures_what_an_independent_computation_finds(world, tmp_path):
    root, labels, logits = world
    assert len(set(labels.tolist())) > 2  # the network tells clips apart, so one constant answer cannot score
    assert weights_form(root/"TSN.pdparams") == "pickle"
    names = run_cell(root, root/"TSN.pdparams")
    measured, (row,) = names["measured"], names["zoo_rows"]
    assert measured["videos"] == CLIPS and "skipped" not in measured
    assert row["measured"] == measured["top1"] == pytest.approx(RIGHT/CLIPS) == pytest.approx((logits[7].argmax(1) == labels).mean())
    assert row["published"] == .67 and str(CLIPS) in row["claim"]
    # the loss sees every pixel and the number of segments, where the accuracy could agree by luck
    assert measured["loss"] == pytest.approx(cross_entropy(logits[7], labels), rel=2e-3)
    assert abs(cross_entropy(logits[3], labels) - measured["loss"]) > .01*measured["loss"]
    (kept,) = record("TSN", [row], out=str(tmp_path/"out"))  # a row that the report takes, and judges by the published figure
    published = {"value": kept["published"], "tolerance": kept["tolerance"]}
    assert verdict(kept, published) == "ok" and verdict({**kept, "measured": .5}, published) == "off baseline"


def test_a_broken_clip_is_counted_apart(world, tmp_path, capsys):
    root, labels, _ = world
    (tmp_path/"broken.pkl").write_bytes(b"no pickle")
    (tmp_path/"test.list").write_text(f"{tmp_path/'broken.pkl'}\n{root/'clip0.pkl'}\n{root/'clip5.pkl'}\n")
    names = run_cell(tmp_path, root/"TSN.pdparams")
    assert names["measured"]["skipped"] == 1 and names["measured"]["videos"] == 2
    assert names["zoo_rows"][0]["measured"] == .5  # clip 0 is right, clip 5 wrong
    assert "broken.pkl" in capsys.readouterr().err


def test_missing_list_and_weights_are_named(world, tmp_path):
    root, *_ = world
    with pytest.raises(PvnbError, match="test.list"):
        run_cell(tmp_path, root/"TSN.pdparams")
    with pytest.raises(PvnbError, match="absent.pdparams"):
        run_cell(root, tmp_path/"absent.pdparams")


def test_mini_mode_measures_nothing(tmp_path):
    assert run_cell(tmp_path, "", mode="mini")["zoo_rows"] == []
