"A folder of films and a table of segments to a data set: subsets, faults, films that are not read twice."
import json

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.datasets.activitynet import ActivityNetDataset
from paddlevideo_nb.segments import film_reader, find_films, read_segment_table, split_films, write_segment_data
from paddlevideo_nb.video import write_video

HEAD = "video,start,end,label\n"


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Six films of 4 seconds, 12 frames a second."
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for i in range(6):
        write_video(folder/f"film{i}.mp4", rng.integers(0, 255, (48, 64, 64, 3), np.uint8), 12)
    return folder


def table(tmp_path, text, name="table.csv", **kwargs):
    path = tmp_path/name
    path.write_text(text, encoding="utf-8", **kwargs)
    return path


@pytest.mark.parametrize("line, message", [
    ("a.mp4,one,2,left", r"line 3: start 'one' and end '2', expected seconds"),
    ("a.mp4,1,,left", r"line 3: start '1' and end ''"),
    ("a.mp4,1", r"line 3: .*expected a video"),
    (",1,2,left", r"line 3: expected a video"),
    ("a.mp4,1,2, ", r"line 3: .*a label"),
    ("a.mp4,1,inf,left", r"line 3: .*not finite"),
    ("a.mp4,nan,2,left", r"line 3: .*not finite"),
])
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(PvnbError, match=message) as caught:
        read_segment_table(table(tmp_path, HEAD + "a.mp4,1,2,left\n" + line + "\n"))
    assert "table.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_without_rows_or_columns(tmp_path):
    with pytest.raises(PvnbError, match="has no column 'label'"): read_segment_table(table(tmp_path, "video,start,end\na,1,2\n"))
    with pytest.raises(PvnbError, match="has no column 'video'"): read_segment_table(table(tmp_path, ""))
    with pytest.raises(PvnbError, match="has no rows"): read_segment_table(table(tmp_path, HEAD))
    with pytest.raises(PvnbError, match="nowhere.csv"): read_segment_table(tmp_path/"nowhere.csv")


def test_spreadsheets_save_with_a_byte_order_mark(tmp_path):
    path = tmp_path/"excel.csv"
    path.write_text(HEAD + "räder.mp4,1,2,左\n", encoding="utf-8-sig")
    assert read_segment_table(path)[0] == {"räder": [{"segment": [1.0, 2.0], "label": "左"}]}


def test_subsets(tmp_path):
    text = "video,start,end,label,subset\na,1,2,x,Train\na,3,4,x,\nb,1,2,x,val\n"
    assert read_segment_table(table(tmp_path, text))[1] == {"a": "training", "b": "validation"}
    with pytest.raises(PvnbError, match="line 5: a is of the other subset"): read_segment_table(table(tmp_path, text + "a,5,6,x,validation\n"))
    with pytest.raises(PvnbError, match="line 5: subset 'test'"): read_segment_table(table(tmp_path, text + "c,5,6,x,test\n"))
    split = split_films("abcdef", {"a": "training", "b": "validation"}, every=2)
    assert split == {"a": "training", "b": "validation", "c": "training", "d": "validation", "e": "training", "f": "validation"}
    assert list(split_films("ab").values()) == ["training", "validation"]


def test_folders_of_films(tmp_path, films):
    assert list(find_films(films)) == [f"film{i}" for i in range(6)]
    with pytest.raises(PvnbError, match="no film in the folder"): find_films(tmp_path)
    for suffix in ("mp4", "avi"): (tmp_path/f"same.{suffix}").write_bytes(b"")
    with pytest.raises(PvnbError, match="share the name same"): find_films(tmp_path)


def test_unknown_and_featureless_readers():
    with pytest.raises(PvnbError, match="no model 'motoin'"): film_reader("motoin")
    with pytest.raises(PvnbError, match="looks at features, not at films"): film_reader("BMN")


def test_data_set_from_films(tmp_path, films, capsys):
    rows = "".join(f"film{i}.mp4,0.5,1.5,left\nfilm{i}.mp4,2,3.5,grow\n" for i in range(5))
    faults = "film0,3,2,left\nfilm1,3.5,9,left\nfilm2,7,9,grow\n"  # backwards, past the end, wholly past the end
    out = tmp_path/"data"
    assert main(["data", "segments", str(films), "--csv", str(table(tmp_path, HEAD + rows + faults)), "--out", str(out), "--every", "3"]) == 0
    said = capsys.readouterr().out
    assert "6 films" in said and "1 films without segment" in said and "11 segments kept" in said
    made = json.loads((out/"annotations.json").read_text())["database"]
    assert [made[f"film{i}"]["subset"] for i in range(6)] == ["training", "training", "validation"]*2
    assert made["film5"]["annotations"] == [] and all(0 <= a["segment"][0] < a["segment"][1] <= v["duration"] for v in made.values() for a in v["annotations"])
    assert (out/"labels.txt").read_text() == "grow 0\nleft 1\n"
    sample = ActivityNetDataset(out/"annotations.json", out/"features", mode="train", tscale=20)[0]
    assert sample["feature"].shape == (44, 20) and np.isfinite(sample["feature"]).all() and sample["gt_iou_map"].max() > .5


def test_films_are_read_once(tmp_path, films, monkeypatch):
    from paddlevideo_nb import segments
    path = table(tmp_path, HEAD + "film0,1,2,left\nfilm3,1,2,grow\n")
    write_segment_data(films, path, tmp_path/"data", progress=False)
    before = (tmp_path/"data"/"annotations.json").read_text()
    calls = []
    real = segments.film_reader
    def counted(*args):
        read, kind = real(*args)
        return (lambda film: calls.append(film.stem) or read(film)), kind
    monkeypatch.setattr(segments, "film_reader", counted)
    write_segment_data(films, path, tmp_path/"data", progress=False)
    assert calls == [] and (tmp_path/"data"/"annotations.json").read_text() == before
    (tmp_path/"data"/"features"/"film2.npy").unlink()
    write_segment_data(films, path, tmp_path/"data", progress=False)
    assert calls == ["film2"]


def test_an_interruption_loses_one_film(tmp_path, films, monkeypatch):
    from paddlevideo_nb import segments
    path, real, seen = table(tmp_path, HEAD + "film0,1,2,left\n"), segments.film_reader, []
    def breaking(*args):
        read, kind = real(*args)
        def some(film):
            seen.append(film.stem)
            if len(seen) == 4: raise KeyboardInterrupt
            return read(film)
        return some, kind
    monkeypatch.setattr(segments, "film_reader", breaking)
    with pytest.raises(KeyboardInterrupt): write_segment_data(films, path, tmp_path/"data", progress=False)
    assert len(list((tmp_path/"data"/"features").iterdir())) == 3
    write_segment_data(films, path, tmp_path/"data", progress=False)
    assert seen == ["film0", "film1", "film2", "film3", "film3", "film4", "film5"]


def test_tables_that_do_not_fit(tmp_path, films, capsys):
    with pytest.raises(PvnbError, match=r"names other, and no film .*\(2 such names\)"):
        write_segment_data(films, table(tmp_path, HEAD + "other,1,2,left\nmore,1,2,left\n"), tmp_path/"data")
    with pytest.raises(PvnbError, match="no segment lies within its film"):
        write_segment_data(films, table(tmp_path, HEAD + "film0,100,200,left\n"), tmp_path/"data", progress=False)
    assert main(["data", "segments", str(films), "--csv", str(tmp_path/"table.csv"), "--out", str(tmp_path/"x"), "--every", "1"]) == 2
    assert "every is 1, expected at least 2" in capsys.readouterr().err


def test_a_broken_film_is_named(tmp_path, films):
    folder = tmp_path/"films"
    folder.mkdir()
    (folder/"torn.mp4").write_bytes((films/"film0.mp4").read_bytes()[:500])
    with pytest.raises(PvnbError, match="torn.mp4"):
        write_segment_data(folder, table(tmp_path, HEAD + "torn,1,2,left\n"), tmp_path/"data", progress=False)
    assert not (tmp_path/"data"/"annotations.json").exists()
