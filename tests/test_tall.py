"Windows, sentences, the measure, the network's two forms, the grounder and its commands, faults included."
import json
import pickle

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.datasets.grounding import (PairDataset, QueryDataset, TinyEncoder, Windows, answers, clip_parts, moment_nms, read_clip_sentences, read_sentence_table, recalls, training_pairs, with_context,
                                               write_clip_sentences)
from paddlevideo_nb.datasets.untrimmed import DIM
from paddlevideo_nb.models.tall import TALL
from paddlevideo_nb.tall_tasks import GroundingMetric, moments_of
from paddlevideo_nb.tasks import get_task

paddle = import_paddle()


def windows_of(film="kitchen", last=24, width=3, seed=0):
    rng = np.random.default_rng(seed)
    return Windows({f"{film}_{a}_{a + 4}": rng.normal(size=width).astype("float32") for a in range(0, last - 3, 2)})


@pytest.mark.parametrize("name", ["kitchen", "kitchen_1", "kitchen_4_4", "kitchen_5_4", "kitchen_a_b", "_1_2"])
def test_names_of_windows(name):
    with pytest.raises(PvnbError, match="expected FILM_START_END"): clip_parts(name)
    assert clip_parts("s13-d21.avi_1_65.npy") == ("s13-d21.avi", 1, 65) and clip_parts("a_b_1.5_2") == ("a_b", 1.5, 2)


def test_windows_that_cannot_be_used(tmp_path):
    with pytest.raises(PvnbError, match="windows not found"): Windows(tmp_path/"nowhere")
    np.save(tmp_path/"a_0_4.npy", np.array([1, np.nan], "float32"))
    np.save(tmp_path/"a_2_6.npy", np.ones((2, 2), "float32"))
    (tmp_path/"a_4_8.npy").write_bytes(b"torn")
    np.save(tmp_path/"a_6_10.npy", np.ones(2, "float32"))
    windows = Windows(tmp_path, width=2)
    for name, message in (("a_0_4", "finite"), ("a_2_6", r"\[2, 2\]"), ("a_4_8", "a_4_8.npy cannot be read"), ("b_0_4", "no features of the window b_0_4")):
        with pytest.raises(PvnbError, match=message): windows[name]
    assert windows["a_6_10"].tolist() == [1, 1]


def test_context_of_missing_neighbours():
    windows = windows_of(last=8)  # windows at 0, 2 and 4
    own, before, behind = (windows[f"kitchen_{a}_{a + 4}"] for a in (4, 0, 4))
    found = with_context(windows, "kitchen_4_8", size=4, count=2)
    np.testing.assert_allclose(found, np.concatenate([before, own, behind]), rtol=1e-6)  # what is missing is the last that was there
    np.testing.assert_allclose(with_context(windows, "kitchen_4_8", size=4, count=0), np.tile(own, 3))


def test_what_answers_against_the_definition():
    rng = np.random.default_rng(1)
    a, b = (np.sort(rng.uniform(0, 10, (40, 2)), 1) for _ in "ab")
    found = answers(a, b)
    for i, (s, e) in enumerate(a):
        for j, (s2, e2) in enumerate(b):
            inter = max(min(e, e2) - max(s, s2), 0)
            assert found[i, j] == (inter/(max(e, e2) - min(s, s2)) > .5 and (e - s - inter)/(e - s) < .15)
    assert found.any()


def test_pairs_of_other_films():
    sentences = [("kitchen_3_8", np.ones(5, "float32")), ("garden_0_4", np.ones(5, "float32"))]
    windows = windows_of()
    assert training_pairs(windows, sentences) == [("kitchen_4_8", 0, (-1, 0))]
    queries = QueryDataset(windows, sentences)
    assert len(queries) == 1 and queries.skipped == {"sentences about films without windows": 1} and queries[0]["visual"].shape == (11, 9)
    for kind, message in ((PairDataset, "none of 11 windows answers"), (QueryDataset, "no sentence speaks of a film with windows")):
        with pytest.raises(PvnbError, match=message): kind(windows, sentences[1:])


def test_recalls_against_a_plain_loop():
    rng = np.random.default_rng(2)
    films = [(rng.normal(size=(3, 20)), np.sort(rng.uniform(0, 30, (3, 20, 2)), 2), np.sort(rng.uniform(0, 30, (3, 2)), 1)) for _ in range(10)]
    def iou(p, q): return max(min(p[1], q[1]) - max(p[0], q[0]), 0)/(max(p[1], q[1]) - min(p[0], q[0]))
    def apart(p, q): return max(min(p[1], q[1]) - max(p[0], q[0]), 0)/((p[1] - p[0]) + (q[1] - q[0]) - max(min(p[1], q[1]) - max(p[0], q[0]), 0))
    found = recalls(films)
    for n in (1, 5, 10):
        for m in (.1, .3, .5, .7):
            right = 0
            for scores, segments, truth in films:
                for s, moments, wanted in zip(scores, segments, truth, strict=True):
                    kept = []
                    for k in np.argsort(-s):
                        if all(apart(moments[k], moments[j]) <= m - .05 for j in kept): kept.append(k)
                    right += any(iou(moments[k], wanted) >= m for k in kept[:n])
            assert found[n, m] == right/30
    with pytest.raises(PvnbError, match="no sentence to judge"): recalls([])
    assert moment_nms(np.array([[0, 4], [0, 4.]]), np.array([.5, .5]), .4).tolist() == [1]  # of equals the last


def test_vectors_go_through_a_file(tmp_path):
    lines = [("kitchen", 3.0, 8.0, "she cuts"), ("kitchen", 3.0, 8.0, "she cuts again"), ("garden", 1.5, 2.0, "it rains")]
    write_clip_sentences(tmp_path/"s.pkl", lines, lambda texts: np.arange(len(texts)*2.0).reshape(-1, 2))
    found = read_clip_sentences(tmp_path/"s.pkl")
    assert [n for n, _ in found] == ["kitchen_3_8", "kitchen_3_8", "garden_1.5_2"] and [v.tolist() for _, v in found] == [[0, 1], [2, 3], [4, 5]]
    for content, message in (([], "holds no sentence"), ([[b"kitchen_1_2"]], "expected pairs"), ([[b"kitchen_1_2", [np.array([np.nan])]]], "finite"), ([[b"kitchen", [np.ones(2)]]], "FILM_START_END")):
        (tmp_path/"bad.pkl").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(PvnbError, match=message): read_clip_sentences(tmp_path/"bad.pkl")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Call:
        def __reduce__(self): return (print, ("run!",))
    (tmp_path/"s.pkl").write_bytes(pickle.dumps([Call()]))
    with pytest.raises(PvnbError): read_clip_sentences(tmp_path/"s.pkl")


def table(tmp_path, text):
    (tmp_path/"t.csv").write_text("film,start,end,sentence\n" + text)
    return tmp_path/"t.csv"


def test_sentences_that_do_not_fit_are_counted(tmp_path, capsys):
    text = "kitchen,3,8,he cuts the carrot\nkitchen,2,5, ?\nkitchen,50,60,late\nkitchen,8,3,backwards\nkitchen,15,30,she washes\n"
    found, counts = read_sentence_table(table(tmp_path, text), {"kitchen": 24})
    assert [line[3] for line in found] == ["he cuts the carrot", "she washes"] and found[1][1:3] == (15, 24)
    assert {k: n for k, n in counts.items() if n} == {"segments": 5, "empty": 1, "outside of the video": 1, "backwards": 1, "cut off": 1}
    for line, message in (("garden,1,2,x", "line 2: no windows of the film 'garden'"), ("kitchen,one,2,x", "line 2"), ("kitchen,nan,2,x", "line 2"), ("kitchen,30,40,x", "no sentence with times inside")):
        with pytest.raises(PvnbError, match=message): read_sentence_table(table(tmp_path, line + "\n"), {"kitchen": 24})
    (tmp_path/"w").mkdir()
    for a in range(0, 20, 2): np.save(tmp_path/"w"/f"kitchen_{a}_{a + 4}.npy", np.ones(3, "float32"))
    assert main(["data", "tacos", str(table(tmp_path, text)), "--windows", str(tmp_path/"w"), "--out", str(tmp_path/"s.pkl"), "--encoder", "tiny"]) == 0
    assert "1 backwards" in capsys.readouterr().out and len(read_clip_sentences(tmp_path/"s.pkl")) == 2
    assert main(["data", "tacos", str(tmp_path/"t.csv"), "--windows", str(tmp_path/"w")]) == 2 and "--out" in capsys.readouterr().err


def test_the_split_form_is_the_papers():
    paddle.seed(3)
    net = TALL(6, 5, 8, 7)
    x, q = paddle.randn([4, 6]), paddle.randn([3, 5])
    np.testing.assert_allclose(net(x, q).numpy(), net.dense(x, q).numpy(), atol=1e-6)
    with pytest.raises(PvnbError, match=r"clips have the shape \[4, 5\], expected \[N, 6\]"): net(x[:, :5], q)
    with pytest.raises(PvnbError, match="sentences have the shape"): net(x, x)


def test_a_metric_goes_on_where_it_stopped():
    rng, one, two = np.random.default_rng(4), GroundingMetric(), GroundingMetric()
    batches = [({"outputs": rng.normal(size=(3, 2, 6)), "loss": .5}, {"windows": np.stack([np.arange(6), np.arange(6) + 4.0], 1), "truth": np.array([[1, 5], [2, 9.0]])}) for _ in range(4)]
    for b in batches: one.update(*b)
    for b in batches[:2]: two.update(*b)
    again = GroundingMetric()
    again.restore(two.state())
    for b in batches[2:]: again.update(*b)
    assert again.compute() == one.compute()
    scores, moments = moments_of(batches[0][0]["outputs"], batches[0][1]["windows"], regress=False)
    assert (moments == batches[0][1]["windows"]).all()


def test_an_untrained_grounder_and_its_faults():
    from paddlevideo_nb.grounders import Grounder
    task, encoder = get_task("tall_mini"), TinyEncoder.learn([f"the digit {a} after it {b}" for a in ("grows", "shrinks", "turns") for b in ("moves left", "moves right")], 47)
    task.config.MODEL.sentence_embedding_size = encoder.width
    grounder = Grounder(task, task.network(), encoder)
    rows = np.random.default_rng(5).normal(size=(30, DIM)).astype("float32")
    found, unknown = grounder(rows, "the digit grows enormously")
    assert unknown == ["enormously"] and found and all(0 <= r["segment"][0] < r["segment"][1] <= 15 and 0 <= r["score"] <= 1 for r in found)
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    for these, query, message in ((rows[:3], "it grows", "3 rows of features, expected at least 4"), (rows, " ", "expected words"), (rows, "quelque chose", "no word of the sentence")):
        with pytest.raises(PvnbError, match=message): grounder(these, query)


def test_words_of_the_command(tmp_path, capsys):
    (tmp_path/"film.mp4").write_bytes(b"")
    for words, message in ((["--query", " "], "--query is empty"), (["--query", "it grows", "--proposals", "BMN"], "--query asks TALL")):
        assert main(["localize", str(tmp_path/"film.mp4"), *words]) == 2 and message in capsys.readouterr().err


def test_vectors_of_another_width_are_named(tmp_path):
    write_clip_sentences(tmp_path/"s.pkl", [("kitchen", 3.0, 8.0, "x")], lambda texts: np.ones((1, 4)))
    with pytest.raises(PvnbError, match=r"kitchen_3_8 has 4 numbers, expected 47"): get_task("tall_mini").dataset("train", filelist=str(tmp_path/"s.pkl"))


def test_predict_reads_the_published_kind_of_list(tmp_path, capsys):
    "INFER.filelist names a folder in the published configuration: the sentences are in clip_sentvec."
    windows = windows_of(width=88)
    np.savez(tmp_path/"w.npz", **windows.source)
    write_clip_sentences(tmp_path/"s.pkl", [("kitchen", 3.0, 8.0, "x")], lambda texts: np.ones((1, 47)))
    from paddlevideo_nb.zoo import save_weights
    save_weights(tmp_path/"TALL.safetensors", {k: v.numpy() for k, v in get_task("tall_mini").network().state_dict().items()})
    assert main(["predict", "TALL", "--config", "tall_mini", f"--weights={tmp_path/'TALL.safetensors'}", f"INFER.filelist={tmp_path}", f"INFER.sliding_clip_path={tmp_path/'w.npz'}", f"INFER.clip_sentvec={tmp_path/'s.pkl'}",
                 "--infer_topk=2", f"--save_dir={tmp_path}"]) == 0
    top = json.loads((tmp_path/"TALL_predictions.json").read_text())[0]["top"]
    assert len(top) == 2 and top[0]["score"] >= top[1]["score"]
