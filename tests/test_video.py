"Frames by number, exactly, and one clear line for each fault of a file."
import contextlib

import av
import numpy as np
import pytest

import paddlevideo_nb.video as V
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.video import Video, VideoError, iter_frames, probe, read_frames, read_video, write_video

H, W, N = 48, 64, 40


def film(n=N):
    y, x = np.mgrid[:H, :W]
    return [np.stack([(2 * x + 3 * i) % 256, (3 * y + i) % 256, np.full_like(x, 5 * i % 256)], -1).astype(np.uint8) for i in range(n)]


def judge(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


CASES = {
    "plain.mp4": {}, "b.mp4": dict(bframes=3, gop=10), "short_gop.mp4": dict(bframes=2, gop=2), "b.mkv": dict(bframes=3, gop=10),
    "open.mp4": dict(bframes=3, gop=10, options={"x264-params": "open-gop=1"}), "open.mkv": dict(bframes=3, gop=10, options={"x264-params": "open-gop=1"}),
    "b.mov": dict(bframes=2, gop=10), "b.flv": dict(bframes=3, gop=10), "b.avi": dict(bframes=3, gop=10), "b.ts": dict(bframes=3, gop=10),
    "mpeg4.avi": dict(codec="mpeg4", gop=10), "mpeg4_b.avi": dict(codec="mpeg4", bframes=2), "mjpeg.avi": dict(codec="mjpeg"), "vp9.webm": dict(codec="vp9", gop=10),
}


@pytest.mark.parametrize("name", CASES)
def test_every_frame_by_number(tmp_path, name):
    path = tmp_path/name
    write_video(path, film(), **CASES[name])
    truth, video = judge(path), Video(path)
    assert len(video) == len(truth) == N
    for n in range(N):
        assert np.array_equal(video.read([n])[0], truth[n]), n
    rng = np.random.default_rng(0)
    for _ in range(10):
        numbers = rng.integers(0, N, rng.integers(1, 12))
        assert np.array_equal(video.read(numbers), truth[numbers])
    assert np.array_equal(read_video(path), truth)


def test_the_picture_survives_encoding(tmp_path):
    "The right frames, not only consistent ones: quality 1 is close to the input."
    write_video(tmp_path/"a.mp4", film(), crf=1, options={"preset": "ultrafast"})
    flat = np.stack(film()).reshape(N, -1).astype(float)
    back = read_video(tmp_path/"a.mp4").reshape(N, -1).astype(float)
    nearest = [int(np.abs(flat - b).mean(1).argmin()) for b in back]
    assert nearest == list(range(N))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, suffix):
    times = np.cumsum(np.random.default_rng(1).uniform(.01, .3, N))
    path = tmp_path/f"vfr.{suffix}"
    write_video(path, film(), times=times, gop=10)
    info = probe(path)
    assert info.frames == N and np.allclose(info.timestamps, times - times[0], atol=1e-3)
    assert info.fps == pytest.approx((N - 1) / (times[-1] - times[0]), rel=1e-3)
    assert np.array_equal(read_frames(path, [37, 2, 37]), judge(path)[[37, 2, 37]])
    assert [(n, round(t, 2)) for n, t, _ in iter_frames(path, 3, 30, 13)] == [(n, round(float(times[n] - times[0]), 2)) for n in (3, 16, 29)]


def test_probe(tmp_path):
    write_video(tmp_path/"a.mkv", film(), fps=30000 / 1001)
    info = probe(tmp_path/"a.mkv")
    assert (info.frames, info.width, info.height, info.codec) == (N, W, H, "h264")
    assert info.fps == pytest.approx(29.97, abs=.02) and info.duration == pytest.approx(N / 29.97, abs=.02)


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation(tmp_path, degrees):
    write_video(tmp_path/"r.mp4", film(6), rotation=degrees)
    assert np.array_equal(read_video(tmp_path/"r.mp4"), np.rot90(judge(tmp_path/"r.mp4"), degrees // 90, axes=(1, 2)))
    cv2 = pytest.importorskip("cv2", minversion="5")  # 4.11 leaves films of a new FFmpeg as they lie
    assert np.array_equal(cv2.VideoCapture(str(tmp_path/"r.mp4")).read()[1][..., ::-1], read_frames(tmp_path/"r.mp4", [0])[0])


def test_edit_list(tmp_path):
    write_video(tmp_path/"a.mp4", film(), bframes=3, gop=10)
    with av.open(str(tmp_path/"a.mp4")) as a, av.open(str(tmp_path/"e.mp4"), "w", options={"use_editlist": "1", "avoid_negative_ts": "disabled"}) as b:
        out = b.add_stream_from_template(a.streams.video[0])
        for p in a.demux(video=0):
            if p.dts is not None:
                p.pts, p.dts, p.stream = p.pts - 7 * p.duration, p.dts - 7 * p.duration, out
                b.mux(p)
    whole = judge(tmp_path/"a.mp4")
    assert len(Video(tmp_path/"e.mp4")) == N - 7
    assert np.array_equal(read_video(tmp_path/"e.mp4"), whole[7:])
    assert all(np.array_equal(read_frames(tmp_path/"e.mp4", [n])[0], whole[7 + n]) for n in range(N - 7))


def test_jumps_save_decoding(tmp_path, monkeypatch):
    write_video(tmp_path/"a.mp4", film(), gop=10)
    converted, decoded = [], []
    upright, number = V._upright, V._number
    monkeypatch.setattr(V, "_upright", lambda *a: (converted.append(1), upright(*a))[1])
    monkeypatch.setattr(V, "_number", lambda *a: (decoded.append(1), number(*a))[1])
    read_frames(tmp_path/"a.mp4", [35, 35, 1])
    assert len(converted) == 2 and len(decoded) <= 15  # frames 0, 1 and 30 to 35, and B-frames before them


def packets(path):
    "Place in the file, bytes and time of each packet of a film."
    with av.open(str(path)) as container: return [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_that_nobody_needs_are_not_decoded(tmp_path, monkeypatch, suffix):
    "The same pictures, B-frames among them, from fewer packets."
    write_video(tmp_path/f"a.{suffix}", film(80), gop=40, bframes=3)
    truth, video, sent = judge(tmp_path/f"a.{suffix}"), Video(tmp_path/f"a.{suffix}"), []
    spare = np.flatnonzero(video._index.spare)
    assert 10 < len(spare) < 70 and not set(spare) & {int(np.searchsorted(video._index.pts, pts)) for pts, _ in video._index.keys}
    frames = V._frames
    monkeypatch.setattr(V, "_frames", lambda *a: (sent.append(1) or f for f in frames(*a)))
    for wanted in ([79], [int(spare[3]), int(spare[-2])], [5, 6, 7, 60], range(80)):
        assert np.array_equal(video.read(wanted), truth[list(wanted)])
    del sent[:]
    video.read([39])
    assert len(sent) <= 40 - (spare < 39).sum()


def test_damage_in_what_is_not_needed_does_no_harm(tmp_path):
    "Behind a wiped packet: a frame that is asked for is told, one that is not makes no difference."
    path = tmp_path/"a.mp4"
    write_video(path, film(60), bframes=3)
    truth, video = judge(path), Video(path)
    spare = int(np.flatnonzero(video._index.spare)[2])
    place, size, _ = next(p for p in packets(path) if p[2] == video._index.pts[spare])
    data = bytearray(path.read_bytes())
    data[place + 5:place + size] = bytes(size - 5)
    path.write_bytes(data)
    others = [n for n in range(60) if n != spare]
    assert np.array_equal(Video(path).read([50]), truth[[50]]) and np.array_equal(Video(path).read(others), truth[others])


def test_a_container_that_seeks_too_far(tmp_path, monkeypatch):
    write_video(tmp_path/"a.mp4", film(), gop=10)
    truth, opened, far = judge(tmp_path/"a.mp4"), V._opened, []

    class Imprecise:
        def __init__(self, container): self.container = container
        def decode(self, stream): return self.container.decode(stream)
        def demux(self, stream): return self.container.demux(stream)

        def seek(self, pts, stream):
            far.append(pts)
            self.container.seek(pts + 10 * 512, stream=stream)

    @contextlib.contextmanager
    def imprecise(path):
        with opened(path) as (container, stream):
            yield Imprecise(container), stream

    video = Video(tmp_path/"a.mp4")
    monkeypatch.setattr(V, "_opened", imprecise)
    assert np.array_equal(video.read([2, 25]), truth[[2, 25]]) and far


def remux(source, target, **options):
    with av.open(str(source)) as a, av.open(str(target), "w", options=options) as b:
        out = b.add_stream_from_template(a.streams.video[0])
        for p in a.demux(video=0):
            if p.dts is not None:
                p.stream = out
                b.mux(p)


def audio(path, codec, cover=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        size = 1024 if codec == "aac" else 1152
        for start in range(0, 44100, size):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def faults(folder):
    "Each broken file with what its message must say."
    write_video(folder/"good.mp4", film(), gop=10)
    data = (folder/"good.mp4").read_bytes()
    yield "gone.mp4", None, "not found"
    yield "empty.mp4", b"", "empty file"
    yield "text.mp4", b"<html>404</html>" * 40, "not a video"
    yield "noise.avi", np.random.default_rng(0).bytes(5000), "not a video"
    yield "ansi.txt", b"hello\n" * 99, "not a video"
    yield "list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n", "not a video"
    yield "index_lost.mp4", data[:len(data) // 2], "truncated"
    remux(folder/"good.mp4", folder/"f.mp4", movflags="faststart")
    fast = (folder/"f.mp4").read_bytes()
    yield "cut.mp4", fast[:len(fast) * 6 // 10], "truncated"
    yield "last_byte.mp4", fast[:-1], "truncated"
    yield "damaged.mp4", fast[:len(fast) // 2] + bytes(400) + fast[len(fast) // 2 + 400:], "damaged"
    remux(folder/"good.mp4", folder/"fragments.mp4", movflags="frag_keyframe+empty_moov")
    pieces = (folder/"fragments.mp4").read_bytes()
    yield "cut_fragments.mp4", pieces[:pieces.rindex(b"mdat") + 50], "truncated"
    remux(folder/"good.mp4", folder/"f.mkv")
    mkv = (folder/"f.mkv").read_bytes()
    yield "cut.mkv", mkv[:len(mkv) // 2], "truncated"
    write_video(folder/"f.avi", film(), codec="mjpeg")
    avi = (folder/"f.avi").read_bytes()
    yield "cut.avi", avi[:len(avi) // 2], "truncated"
    audio(folder/"sound.mp4", "aac")
    yield "sound.mp4", (folder/"sound.mp4").read_bytes(), "no video stream"


def test_faults_are_named(tmp_path):
    seen = []
    for name, data, words in faults(tmp_path):
        path = tmp_path/name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(VideoError) as e:
            read_video(path)
        message = str(e.value)
        assert str(path) in message and words in message and "\n" not in message, (name, message)
        seen.append(name)
    assert len(seen) == 14


def test_numbers_out_of_range(tmp_path):
    write_video(tmp_path/"a.mp4", film(5))
    for numbers in ([5], [-1], [0, 99], []):
        with pytest.raises(VideoError, match="a.mp4"):
            read_frames(tmp_path/"a.mp4", numbers)
    assert list(iter_frames(tmp_path/"a.mp4", 5)) == []


def test_nothing_half_written(tmp_path):
    def dies():
        yield film(1)[0]
        raise RuntimeError("killed")
    (tmp_path/"a.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_video(tmp_path/"a.mp4", dies())
    with pytest.raises(PvnbError, match="frame 1 is uint8"):
        write_video(tmp_path/"a.mp4", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)])
    assert (tmp_path/"a.mp4").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_writing_is_repeatable(tmp_path):
    for name in "ab":
        write_video(tmp_path/f"{name}.mp4", film())
    assert (tmp_path/"a.mp4").read_bytes() == (tmp_path/"b.mp4").read_bytes()
