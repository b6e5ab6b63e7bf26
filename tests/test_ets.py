"""ETS: attention and beams by hand, padding, the task, its data and their faults, scores of captions, a caption for a raw film, the lesson's zoo cell."""
import json
import pickle

import numpy as np
import pytest
from helpers import run_zoo_cell

import paddlevideo_nb.metrics.captioning as captioning
from paddlevideo_nb.captioners import for_film, learn_captioner, load_captioner
from paddlevideo_nb.cli import main
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.captions import (CaptionDataset, cut_words, pad_words, plain_words, read_caption_list, read_dictionary, sentence_of, story,
                                              story_film, word_numbers, write_caption_data)
from paddlevideo_nb.datasets.loader import Skipped
from paddlevideo_nb.datasets.untrimmed import DIM
from paddlevideo_nb.ets_tasks import noam
from paddlevideo_nb.evaluate import evaluate
from paddlevideo_nb.models.ets import ETS, beam_search, greedy
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.train import fit
from paddlevideo_nb.zoo import load_weights, save_weights

paddle = import_paddle()
WORDS = ["<s>", "<e>", "<unk>", "a", "dog", "runs"]


@pytest.fixture
def data(tmp_path):
    "A folder with lists, a dictionary, features of two films (20 and 13 rows), and a configuration for it."
    rng = np.random.default_rng(0)
    (tmp_path / "dict.txt").write_text("".join(f"{w} {i}\n" for i, w in enumerate(WORDS)))
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "v_a.npy", rng.normal(size=(20, 7)).astype("f4"))
    (tmp_path / "features" / "v_b").write_bytes(pickle.dumps(rng.normal(size=(13, 7)).astype("f4"), protocol=2))
    lines = ["v_a\t0.0\t2.5\ta dog runs", "v_a\t1.0\t4.0\ta zebra runs", "v_b\t0.9\t2.5\tdog", "v_b\t0.9\t2.5\ta dog"]
    (tmp_path / "all.list").write_text("\n".join(lines) + "\n")
    return tmp_path


def small(data, **keys):
    sizes = {"feat_size": 7, "fc_dim": 6, "gru_hidden_dim": 4, "decoder_size": 5, "word_emb_dim": 3, "max_length": 6}
    where = {"feat_path": str(data / "features"), "dict_file": str(data / "dict.txt")}
    return load_config("ets", MODEL={**sizes, **where, **keys}, TRAIN={"batch_size": 2, "epoch": 1, "filelist": str(data / "all.list")},
                       VALID={"filelist": str(data / "all.list"), "batch_size": 2}, TEST={"filelist": str(data / "all.list")}, INFER={"filelist": str(data / "all.list")})


def network(attention="tanh", encoder="gru", words=6):
    paddle.seed(1)
    net = ETS(7, 6, 4, 5, 3, words, encoder, attention)
    net.eval()
    return net


# --- the network


def test_attention_without_tanh_is_the_same_for_every_word():
    x, w = paddle.randn([2, 9, 7]), paddle.to_tensor([[0, 3, 4], [0, 5, 5]])
    same, moves = (network(kind).attention(x, w).numpy() for kind in ("linear", "tanh"))
    assert np.abs(same - same[:, :1]).max() < 1e-6 < np.abs(moves - moves[:, :1]).max()
    assert np.allclose(moves.sum(2), 1, atol=1e-5)


@pytest.mark.parametrize("encoder", ["gru", "mean"])
def test_padding_changes_nothing(encoder):
    net, x, w = network(encoder=encoder), paddle.randn([2, 9, 7]), paddle.to_tensor([[0, 3], [0, 5]])
    both = net(x, w, paddle.to_tensor([9, 4])).numpy()
    assert np.allclose(both[1], net(x[1:, :4], w[1:]).numpy()[0], atol=1e-5)


def test_the_mean_encoder_knows_no_order_and_the_other_does():
    x, w = paddle.randn([1, 8, 7]), paddle.to_tensor([[0, 3, 4]])
    assert np.allclose(network(encoder="mean")(x, w), network(encoder="mean")(x.flip(1), w), atol=1e-5)
    assert np.abs(network()(x, w).numpy() - network()(x.flip(1), w).numpy()).max() > 1e-4


def test_wrong_words_for_encoder_attention_and_shapes():
    with pytest.raises(PvnbError, match="encoder is 'lstm'.*gru"): ETS(encoder="lstm")
    with pytest.raises(PvnbError, match="attention is 'relu'"): ETS(7, 6, 4, 5, 3, 6, attention="relu")
    with pytest.raises(PvnbError, match=r"\[1, 4, 8\], expected \[N, T, 7\]"): network()(paddle.randn([1, 4, 8]), paddle.to_tensor([[0]]))


def test_the_steps_of_a_sentence_are_those_of_teacher_forcing():
    net, x, words = network(), paddle.randn([1, 6, 7]), [0, 3, 4]
    memory, hidden = net.encode(x)
    logits = net(x, paddle.to_tensor([words])).numpy()[0]
    for i, word in enumerate(words):
        said, hidden, _ = net.step(paddle.to_tensor([word]), hidden, memory)
        assert np.allclose(said.numpy()[0], logits[i], atol=1e-5)


def test_a_beam_of_one_is_greedy_and_scores_are_sums_of_log_probabilities():
    net, x, lengths = network(), paddle.randn([3, 9, 7]), paddle.to_tensor([9, 4, 6])
    for p in net.parameters(): p.set_value(p * 4)
    said, _ = greedy(net, x, lengths, 7)
    for i, beams in enumerate(beam_search(net, x, lengths, 1, 7)):
        words, scores = beams[0]
        assert [w for w in words[1:].tolist() if w != 1] == said[i] and words[0] == 0
        n = int(lengths[i])
        logits = net(x[i:i + 1, :n], paddle.to_tensor(words[None, :-1]))
        steps = paddle.nn.functional.log_softmax(logits).numpy()[0][np.arange(len(words) - 1), words[1:]]
        assert np.allclose(np.cumsum(steps), scores[1:], atol=1e-4)


def test_beams_end_at_the_end_word_come_best_first_and_start_from_init_scores():
    net, x = network(), paddle.randn([2, 5, 7])
    net.out.bias.set_value(net.out.bias + paddle.to_tensor([0., 1.5, 0, 0, 0, 0]))
    plain, moved = beam_search(net, x, None, 3, 20), beam_search(net, x, None, 3, 20, init_scores=[2.0, 2.0])
    for beams, others in zip(plain, moved, strict=True):
        totals = [s[-1] for _, s in beams]
        assert totals == sorted(totals, reverse=True) and len(beams) == 3
        assert all(1 not in w[:-1] and len(w) == len(s) for w, s in beams)
        assert [w.tolist() for w, _ in beams] == [w.tolist() for w, _ in others] and np.allclose(others[0][1] - beams[0][1], 2)
    with pytest.raises(PvnbError): beam_search(net, paddle.randn([2, 5, 8]))


def test_sampling_follows_its_generator():
    net, x = network(), paddle.randn([2, 5, 7])
    draws = [greedy(net, x, None, 12, sample=np.random.default_rng(s))[0] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


# --- words, lists, features


def test_words_lists_and_their_faults(tmp_path, data):
    dictionary = read_dictionary(data / "dict.txt")
    fed, said = word_numbers("a zebra runs", dictionary)
    assert fed.tolist() == [0, 3, 2, 5] and said.tolist() == [3, 2, 5, 1]
    assert sentence_of([0, 3, 4, 1], WORDS) == "a dog" and sentence_of([0, 3, 4], WORDS, published=True) == "a"
    assert read_caption_list(data / "all.list")[0] == ("v_a", 0.0, 2.5, "a dog runs")
    for text, message in (("<s> 1\n<e> 1\n\na 3\n", "line 3"), ("<s> 1\n<e> 1\n<unk> 1\na 2\na 2\n", "line 5.*'a'"), ("<s> 1\n<e> 1\na 2\n", "<unk>")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(PvnbError, match=message): read_dictionary(tmp_path / "bad.txt")
    for text, message in (("v\t0\t1", "3 columns"), ("v\tx\t1\ta", "start 'x'"), ("v\t5\t1\ta", "0 <= start <= end"), ("v\t0\t1\t ", "3 columns|empty"), ("\n", "no lines")):
        (tmp_path / "bad.list").write_text(text + "\n")
        with pytest.raises(PvnbError, match=message): read_caption_list(tmp_path / "bad.list")


def test_the_two_tokenizers_agree_on_plain_captions():
    sentences = ["A man's dog doesn't stop, then runs.", "They cannot; it IS a well-known game!", "The two of them, then, go."]
    cut, how = cut_words(sentences)
    assert [plain_words(s) for s in sentences] == cut, how


def test_samples_and_batches(data):
    lines = CaptionDataset(data / "all.list", "train", data / "features", data / "dict.txt", feat_size=7)
    assert len(lines[0]["features"]) == 13 and len(lines[1]["features"]) == 15 and lines[1]["words"].tolist() == [0, 3, 2, 5]
    batch = lines.collate([lines[i] for i in (0, 2)])
    assert batch["features"].shape == (2, 13, 7) and batch["lengths"].tolist() == [13, 9] and batch["word_lengths"].tolist() == [4, 2]
    assert batch["next_words"][1].tolist() == [4, 1, -1, -1] and not batch["features"][1, 9:].any()


def test_lines_without_features_are_skipped_and_named(data):
    (data / "all.list").write_text("v_none\t0\t1\ta\nv_b\t9\t12\ta dog\nv_b\t0\t1\ta\n")
    lines = CaptionDataset(data / "all.list", "train", data / "features", data / "dict.txt")
    assert isinstance(lines[0], Skipped) and "v_none" in lines[0].message
    assert isinstance(lines[1], Skipped) and "from 9 to 12 s" in lines[1].message
    assert len(lines.collate([lines[i] for i in range(3)])["skipped"]) == 2


def test_a_pickle_that_runs_code_is_refused(data):
    class Evil:
        def __reduce__(self): return (eval, ("1/0",))
    (data / "features" / "v_b").write_bytes(pickle.dumps(Evil()))
    line = CaptionDataset(data / "all.list", "train", data / "features", data / "dict.txt")[2]
    assert isinstance(line, Skipped) and "refused" in line.message


def test_data_captions_counts_what_it_leaves_out(data, capsys):
    times, sentences = [[0, 2], [1, 99], [30, 40], [3, 1], [0, 1]], ["A dog runs.", "A dog, again!", "late", "backwards", "  "]
    (data / "train.json").write_text(json.dumps({"v_a": {"duration": 4.0, "timestamps": times, "sentences": sentences}}))
    counts, _ = write_caption_data(data / "out", data / "train.json", features=data / "features", least=2)
    assert counts["train: sentences"] == 5 and counts["train: cut off"] == counts["train: outside of the video"] == counts["train: backwards"] == counts["train: empty"] == 1
    assert (data / "out" / "dict.txt").read_text().split()[::2] == ["<s>", "<e>", "<unk>", "a", "dog"]
    assert main(["data", "captions", str(data / "train.json"), "--features", str(data / "features"), "--out", str(data / "again")]) == 0
    assert "5 train: sentences" in capsys.readouterr().out
    lines = CaptionDataset(data / "again" / "train.list", "train", data / "again" / "features.h5", data / "again" / "dict.txt")
    assert lines[0]["features"].shape == (10, 7) and lines[1]["sentence"] == "a dog again"
    (data / "train.json").write_text(json.dumps({"v_a": {"duration": 4.0, "timestamps": [], "sentences": ["x"]}}))
    assert main(["data", "captions", str(data / "train.json"), "--out", str(data / "bad")]) == 2


# --- the task


def test_schedule_and_loss(data):
    task = get_task(small(data))
    lines = task.dataset("train")
    batch = {k: paddle.to_tensor(v) if isinstance(v, np.ndarray) and v.ndim else v for k, v in lines.collate([lines[0], lines[2]]).items()}
    net = task.network()
    loss = float(task.loss(task.forward(net, batch, "valid"), batch))
    logits = paddle.nn.functional.log_softmax(net(batch["features"], batch["words"], batch["lengths"])).numpy()
    by_hand = -np.mean([logits[i, t, w] for i, row in enumerate(batch["next_words"].numpy()) for t, w in enumerate(row) if w >= 0])
    assert abs(loss - by_hand) < 1e-5
    _, schedule = task.optimizer(net)
    rates = []
    for _ in range(3):
        rates.append(schedule.get_lr())
        schedule.step()
    assert np.allclose(rates, [noam(i, 4) for i in range(3)], rtol=1e-6) and rates[0] > 0


def test_train_and_evaluate(data, monkeypatch):
    task = get_task(small(data))
    net, history = fit(task, log_interval=1, progress=False)
    assert history[-1]["valid_loss"] > 0 and history[-1]["valid_log_likelihood"] == -history[-1]["valid_loss"]
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)  # no METEOR: the Java machine takes seconds to start
    found = evaluate(task, net, progress=False, batch_size=2)
    assert found["captions"] == 3 and 0 <= found["bleu1"] <= 1 and found["library"].startswith("pycocoevalcap")  # two of four lines are about the same seconds


def test_without_a_dictionary_the_network_stands_but_data_do_not(tmp_path):
    config = load_config("ets", **{"MODEL.dict_file": str(tmp_path / "none.txt")})
    assert create_model("ETS", config).dict_size == 4000
    with pytest.raises(PvnbError, match="none.txt"): get_task(config).dictionary  # noqa: B018


# --- scores


def test_scores_without_java_say_so(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    found = captioning.caption_scores({1: "a dog runs", 2: "a cat"}, {1: ["a dog runs"], 2: ["the cat", "a cat sits"]})
    assert "meteor" not in found and "no java" in found["notes"] and found["exact"] == .5 and found["rouge_l"] > .5


def test_scores_of_what_does_not_fit():
    for said, truth, message in (({1: "a"}, {2: ["a"]}, "first difference"), ({}, {}, "no captions"), ({1: "a"}, {1: []}, "no reference"), ({1: "a"}, {1: [" "]}, "empty")):
        with pytest.raises(PvnbError, match=message): captioning.caption_scores(said, truth)


# --- a raw film


def test_a_caption_for_a_raw_film(tmp_path, capsys):
    from paddlevideo_nb.datasets.theatre import FPS
    from paddlevideo_nb.video import write_video
    rng = np.random.default_rng(0)
    (tmp_path / "dict.txt").write_text("".join(f"{w} {i}\n" for i, w in enumerate(WORDS)))
    (tmp_path / "features").mkdir()
    for v in "ab": np.save(tmp_path / "features" / f"{v}.npy", rng.normal(size=(10, DIM)).astype("f4"))
    (tmp_path / "all.list").write_text("a\t0\t5\ta dog runs\nb\t0\t5\ta dog\n")
    config = small(tmp_path, feat_size=DIM, rate=2.0)
    folder = learn_captioner(tmp_path / "captioner", config, epochs=1, progress=False)
    loaded, weights = load_captioner(folder)
    write_video(tmp_path / "story.mp4", story_film(rng, [0, 5])[0], FPS)
    (tmp_path / "own.yaml").write_text((folder / "ETS.yaml").read_text().replace(str(config.MODEL.dict_file), str(loaded.MODEL.dict_file)))
    assert main(["predict", "ETS", "--config", str(tmp_path / "own.yaml"), "--weights", str(weights), "--video_path", str(tmp_path / "story.mp4"), "--save_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "ETS_predictions.json").read_text())[0]
    assert found["video"].endswith("story.mp4") and len(found["top"]) == 3 and set(found["top"][0]["name"].split()) <= set(WORDS)
    with pytest.raises(PvnbError, match="2048 numbers.*motion rows of 44"): for_film(load_config("ets"), weights)
    with pytest.raises(PvnbError, match="no ETS.safetensors|no ETS.yaml"): load_captioner(tmp_path / "features")


def test_stories_and_films_agree():
    film, times = story_film(np.random.default_rng(1), [0, 4, 2])
    assert story([0, 4]) == "a digit moves left then grows" and film.shape[1:] == (64, 64, 3) and film.dtype == np.uint8
    assert len(times) == 3 and (np.diff(times.ravel()) > 0).all() and times[-1, 1] < len(film) / 12


# --- the lesson's zoo cell


def test_zoo_cell_measures_given_weights(data):
    pytest.importorskip("pycocoevalcap")
    config = small(data)
    net = get_task(config).network()
    save_weights(data / "ETS.safetensors", {k: v.numpy() for k, v in net.state_dict().items()})
    assert load_weights(get_task(config).network(), data / "ETS.safetensors")
    (data / "val.list").write_text((data / "all.list").read_text())
    write_caption_h5(data)
    def tiny(name, **overrides): return load_config(name, MODEL={k: v for k, v in config.MODEL.items() if k not in ("feat_path", "dict_file")}, **overrides)
    names = run_zoo_cell("ets", str(data), str(data / "ETS.safetensors"), load_config=tiny, get_task=get_task)
    row, = names["zoo_rows"]
    assert ("METEOR" in row["metric"] and row["published"] == 9.8) or "CIDEr" in row["metric"]


def write_caption_h5(data):
    import h5py
    with h5py.File(data / "features.h5", "w") as file:
        file["v_a"] = np.load(data / "features" / "v_a.npy")
        file["v_b"] = np.zeros((13, 7), "f4")


def test_pad_words_of_one_film_without_words():
    batch = pad_words([{"features": np.ones((4, 2), "f4"), "name": "x"}])
    assert batch["lengths"].tolist() == [4] and "words" not in batch
