"Sound tracks, and films of one's own as YouTube-8M records."
import av
import h5py
import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.datasets.youtube8m import YouTube8MDataset, dequantise
from paddlevideo_nb.records import fit_scale, read_labels
from paddlevideo_nb.sound import BANDS, log_mel, mel_filters, read_sound, sound_rows
from paddlevideo_nb.video import VideoError, write_video


def film_with_sound(path, sound, rate=16000, seconds=2):
    with av.open(str(path), "w") as container:
        picture, track = container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=rate, layout="mono")
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        for _ in range(seconds*10):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray((sound*32767).astype(np.int16)[None] if path.suffix == ".mkv" else sound[None].astype(np.float32),
                                           format="s16" if path.suffix == ".mkv" else "fltp", layout="mono")
        frame.sample_rate = rate
        for stream, last in ((picture, None), (track, frame)): container.mux(stream.encode(last))
        container.mux(track.encode(None))


def tone(hertz, seconds=2, rate=16000): return .5*np.sin(2*np.pi*hertz*np.arange(seconds*rate)/rate)


def test_sound_is_read_as_written(tmp_path):
    film_with_sound(tmp_path/"a.mkv", tone(440))
    read = read_sound(tmp_path/"a.mkv")
    assert len(read) == 32000 and np.abs(read - tone(440)).max() < 1e-3
    film_with_sound(tmp_path/"b.mkv", tone(440, rate=8000), 8000)  # resampled
    assert abs(len(read_sound(tmp_path/"b.mkv")) - 32000) < 50


@pytest.mark.parametrize("hertz", [150, 600, 3000])
def test_a_tone_lies_in_its_band(hertz):
    row = log_mel(tone(hertz))[20]
    filters = mel_filters(16000, 1024, BANDS, 60)
    nearest = np.abs(np.fft.rfftfreq(1024, 1/16000)[:, None] - hertz).argmin(0)[0]
    assert abs(int(row.argmax()) - int(filters[nearest].argmax())) <= 1
    assert not log_mel(np.zeros(16000)).any()


def test_rows_of_spans(tmp_path):
    film_with_sound(tmp_path/"a.mkv", np.concatenate([tone(300, 1), np.zeros(16000)]))
    rows = sound_rows(tmp_path/"a.mkv", [0, 1.1, 7], [1, 2, 8])
    assert rows.shape == (3, 128) and rows[0].max() > 2 > rows[1].max() and not rows[2].any()
    write_video(tmp_path/"mute.mp4", np.zeros((5, 32, 32, 3), np.uint8), 5)
    assert read_sound(tmp_path/"mute.mp4").size == 0 and not sound_rows(tmp_path/"mute.mp4", [0], [1]).any()
    (tmp_path/"no.mp4").write_bytes(b"not a film at all")
    with pytest.raises(VideoError, match="no.mp4"): read_sound(tmp_path/"no.mp4")


def features_file(path, films, keys=("features", "audio")):
    with h5py.File(path, "w") as file:
        for name, parts in films.items():
            for key, part in zip(keys, parts, strict=False): file[f"{name}/{key}"] = part


@pytest.fixture
def films():
    rng = np.random.default_rng(0)
    return {f"f{i}": (rng.normal(i, 2, (3 + i, 6)).astype("float32"), rng.normal(0, 1, (3 + i, 4)).astype("float32")) for i in range(4)}


def test_records_of_films(films, tmp_path, capsys):
    features_file(tmp_path/"x.h5", films)
    (tmp_path/"labels.csv").write_text("video,label\nf0.mp4,cat\nsome/f1.mkv,dog\nf1,cat\nf2,a cow\nf3,dog\n")
    assert main(["data", "records", str(tmp_path/"x.h5"), "--out", str(tmp_path/"x.tfrecord"), "--labels", str(tmp_path/"labels.csv")]) == 0
    assert (tmp_path/"x.labels.txt").read_text() == "a cow 0\ncat 1\ndog 2\n"
    data, scale = YouTube8MDataset(tmp_path/"x.tfrecord", "valid", num_classes=3), fit_scale(films)
    assert [np.flatnonzero(data[i]["label"]).tolist() for i in range(4)] == [[1], [1, 2], [0], [2]]
    for i, (rgb, _) in enumerate(films.values()):
        wanted = ((rgb - scale["rgb_mean"])/scale["rgb_deviation"]).clip(-1.99, 2)
        assert np.abs(dequantise(data.video(i)["rgb"]) - wanted).max() < 4/255
    # other films, the same scale, no labels
    features_file(tmp_path/"y.h5", {"new": films["f3"]})
    assert main(["data", "records", str(tmp_path/"y.h5"), "--out", str(tmp_path/"y.tfrecord"), "--scale", str(tmp_path/"x.scale.npz")]) == 0
    assert (YouTube8MDataset(tmp_path/"y.tfrecord", "infer").video(0)["rgb"] == data.video(3)["rgb"]).all()


@pytest.mark.parametrize("change, text", [
    (lambda folder, films: features_file(folder/"x.h5", films, ("features",)), "no sound features"),
    (lambda folder, films: (folder/"x.h5").write_bytes(b"text"), "not a readable HDF5"),
    (lambda folder, films: (folder/"labels.csv").write_text("film,label\nf0,cat\n"), "expected video and label"),
    (lambda folder, films: (folder/"labels.csv").write_text("video,label\nf0,cat\n"), "no row for f1"),
    (lambda folder, films: (folder/"labels.csv").write_text("video,label\nf0,cat\nf1,\nf2,cat\nf3,cat\n"), "line 3"),
    (lambda folder, films: features_file(folder/"x.h5", {**films, "g": (films["f0"][0][:, :3], films["f0"][1])}), "widths"),
])
def test_faults(films, tmp_path, capsys, change, text):
    features_file(tmp_path/"x.h5", films)
    (tmp_path/"labels.csv").write_text("video,label\nf0,cat\nf1,cat\nf2,cat\nf3,cat\n")
    change(tmp_path, films)
    code = main(["data", "records", str(tmp_path/"x.h5"), "--out", str(tmp_path/"x.tfrecord"), "--labels", str(tmp_path/"labels.csv")])
    assert code != 0 and text in capsys.readouterr().err and not (tmp_path/"x.tfrecord").exists()


def test_label_names(tmp_path):
    (tmp_path/"l.csv").write_text("video,label\na,dog\n")
    assert read_labels(tmp_path/"l.csv", ["cat", "dog"])[0] == {"a": [1]}
    with pytest.raises(PvnbError, match="line 2: label 'dog' of 'a', expected one of cat"): read_labels(tmp_path/"l.csv", ["cat"])
