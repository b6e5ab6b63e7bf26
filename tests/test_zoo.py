"Weights in every form: read to the last bit, refused in one line, fetched over a bad line."
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import zlib
from collections import OrderedDict

import numpy as np
import pytest

import paddlevideo_nb.zoo as Z
from paddlevideo_nb.core import PvnbError


def regenerated(case):
    "name -> array, by the rule in the README of the recordings."
    values = {}
    for p in case["parameters"]:
        z = np.random.RandomState(zlib.crc32(f"{case['salt']}/{p['name']}".encode()) & 0xFFFFFFFF).standard_normal(p["shape"]).astype("float32")
        scale = np.float32(p["scale"])
        values[p["name"]] = {"normal": scale * z, "one_plus": 1 + scale * z, "one_plus_abs": 1 + scale * np.abs(z)}[p["kind"]]
    return values


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in b)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"b.w_0": rng.normal(size=(3, 200)).astype("float32"), "a.b_0": np.arange(5, dtype="int64"), "c": np.zeros((0, 4), "float32"),
            "scalar": np.array(2.5, "float64"), "mask": np.array([True, False]), "half": np.ones((2, 1, 2), "float16"), "u": np.array([255], "uint8")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PVNB_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


# ---- the table

def test_the_table():
    files = {r.file: r.url for r in Z.ZOO if r.file}
    assert len(files) == 13 and len({r.model for r in Z.ZOO}) == 13
    assert all(u.startswith("https://paddlemodels.bj.bcebos.com/video_") and u.endswith(".pdparams") for u in files.values())
    assert Z.published("bsn-pem", "auc").value == 66.64 and Z.published("Attention_LSTM", "Hit@1").value == .8885
    assert [r.value for r in Z.ZOO if r.model == "TSN"] == [.67, .66]
    assert all(0 < r.value < (1 if r.unit == "fraction" else 100) for r in Z.ZOO)
    assert len(Z.zoo_table()) == len(Z.ZOO)
    with pytest.raises(PvnbError, match="did you mean 'TSN'"):
        Z.published("TSNN")
    with pytest.raises(PvnbError, match="GAP, Hit@1, PERR"):
        Z.published("NEXTVLAD", "top1")


def test_models_are_those_of_the_configurations(repo):
    import yaml
    names = {yaml.safe_load(p.read_text())["MODEL"]["name"] for p in (repo/"paddlevideo_nb"/"configs").glob("*.yaml")}
    assert {r.model for r in Z.ZOO} <= names


def test_markers_tell_every_published_model(golden):
    found = {}
    for path in golden.glob("*/published_parameters.json"):
        case = json.loads(path.read_text())
        found[case["model_name"]] = Z.guess_model(v["name"] for v in case["variables"])
    if not found:
        pytest.skip("this copy of the recordings holds no published_parameters.json")
    for model, guess in found.items():
        assert guess == ("TSN or TSM" if model in ("TSN", "TSM") else Z.published(model).model)
    assert Z.guess_model(["conv1_weights", "x"]) is None


# ---- the forms

def golden_files(golden):
    for case in sorted(golden.glob("*/checkpoint")):
        own = case/"case.json"
        expected = regenerated(json.loads((own if own.is_file() else case.parent/"reduced.json").read_text()))
        for path in [*sorted(case.rglob("*.pdparams")), case/"one_file_per_variable"]:
            if path.exists():
                yield path, expected


def test_golden_files(golden):
    files = list(golden_files(golden))
    assert {"pickle", "streams", "folder"} == {Z.weights_form(p) for p, _ in files}
    for path, expected in files:
        found = Z.read_weights(path, {n: a.shape for n, a in expected.items()})
        assert found.keys() - expected.keys() <= {"sample_mask"}, path
        assert same({n: found[n] for n in expected}, expected), path


def test_writer_gives_the_original_bytes(golden, tmp_path):
    "Forms 2 and 3, byte for byte what the original wrote."
    case = golden/"bsn_pem"/"checkpoint"
    values = Z.read_weights(case/"one_file_per_variable")
    assert Z.save_legacy(tmp_path/"c", values, 2).read_bytes() == (case/"combined"/"BsnPem.pdparams").read_bytes()
    for p in Z.save_legacy(tmp_path/"f", values, 3).iterdir():
        assert p.read_bytes() == (case/"one_file_per_variable"/p.name).read_bytes()


def test_every_form_gives_back_what_was_written(tmp_path, arrays):
    for form in (2, 3):
        assert same(Z.read_weights(Z.save_legacy(tmp_path/str(form), arrays, form), arrays), arrays)
    filled = {n: a for n, a in arrays.items() if a.size}
    assert same(Z.read_weights(Z.save_legacy(tmp_path/"1", filled, 1)), filled)
    assert same(Z.read_weights(Z.save_weights(tmp_path/"x.pdparams", arrays, {"a": "b"})), arrays)
    assert Z.read_metadata(tmp_path/"x") == {"a": "b"}  # and a prefix
    np.savez(tmp_path/"y.npz", **arrays)
    assert same(Z.read_weights(tmp_path/"y.npz"), arrays) and Z.read_metadata(tmp_path/"y.npz") == {}
    np.savez(tmp_path/"z.npz", f=np.asfortranarray(arrays["b.w_0"]))
    assert np.array_equal(Z.read_weights(tmp_path/"z.npz")["f"], arrays["b.w_0"])


def test_what_other_versions_of_paddle_leave(tmp_path, arrays):
    big = {"UnpackBigParamInfor@@": {"big": {"OriginShape": (2, 3), "slices": ["big@@.0", "big@@.1"]}}, "big@@.0": np.arange(4), "big@@.1": np.arange(4, 6)}
    entry = {**arrays, **big, "StructuredToParameterName@@": {"fc.weight": "b.w_0"}, "pair": ("pair", np.ones(2))}
    (tmp_path/"a").write_bytes(pickle.dumps(OrderedDict(entry), protocol=4))
    assert same(Z.read_weights(tmp_path/"a"), {**arrays, "pair": np.ones(2), "big": np.arange(6).reshape(2, 3)})
    del entry["big@@.1"]
    (tmp_path/"a").write_bytes(pickle.dumps(entry, protocol=4))
    with pytest.raises(PvnbError, match="sliced arrays do not join: KeyError: 'big@@.1'"):
        Z.read_weights(tmp_path/"a")


def test_files_of_todays_paddle(tmp_path):
    import paddle
    net = paddle.nn.Sequential(paddle.nn.Linear(3, 2), paddle.nn.BatchNorm1D(2))
    paddle.save(net.state_dict(), str(tmp_path/"net.pdparams"))
    assert same(Z.read_weights(tmp_path/"net"), {k: v.numpy() for k, v in net.state_dict().items()})


def test_levels_and_packed_axes(tmp_path):
    "Streams as other writers may lay them out: with levels, with axes packed."
    data = np.arange(6, dtype="<f4")
    described = b"\x08\x05\x12\x02\x02\x03"
    stream = struct.pack("<IQQ16sIi", 0, 1, 16, bytes(16), 0, len(described)) + described + data.tobytes()
    (tmp_path/"s").write_bytes(stream)
    assert np.array_equal(Z.read_weights(tmp_path/"s", ["x"])["x"], data.reshape(2, 3))


# ---- faults

def test_every_cut_is_noticed(tmp_path, arrays):
    whole = Z.save_legacy(tmp_path/"whole", arrays, 2).read_bytes()
    starts = np.cumsum([0] + [sum(len(p) for _, p in Z.tensor_fields(arrays[n])) for n in sorted(arrays)])
    for n in [*range(0, 90), *range(len(whole) - 40, len(whole))]:
        (tmp_path/"cut").write_bytes(whole[:n])
        with pytest.raises(PvnbError) as e:
            Z.read_weights(tmp_path/"cut", arrays)
        assert "cut" in str(e.value) and "\n" not in str(e.value)
        if n in starts[1:]:
            assert "names were given" in str(e.value)
    with pytest.raises(PvnbError, match=r"tensor 6 at byte \d+: .* needs \d+ bytes, \d+ are left"):
        Z.read_weights(tmp_path/"cut", arrays)
    (tmp_path/"long").write_bytes(whole + b"\0\0\0")
    with pytest.raises(PvnbError, match=f"tensor 7 at byte {len(whole)}: the version needs 4 bytes, 3 are left"):
        Z.read_weights(tmp_path/"long", arrays)


def test_every_flipped_byte_is_survived(tmp_path):
    "Any header byte may be anything: a PvnbError or an array no larger than the file, never another exception."
    stream = b"".join(p for _, p in Z.tensor_fields(np.ones((2, 3), "float32")))
    for at in range(len(stream) - 24):
        for value in (0, 1, 5, 16, 127, 128, 255):
            (tmp_path/"f").write_bytes(stream[:at] + bytes([value]) + stream[at + 1:])
            try:
                found = Z.read_weights(tmp_path/"f", ["x"])
            except PvnbError:
                continue
            assert found["x"].nbytes <= len(stream)


@pytest.mark.parametrize("at, value, text", [
    (0, b"\x02", "tensor 0 at byte 0: the version is 2, expected 0"), (12, b"\x01", "at byte 12: the tensor version is 1, expected 0"),
    (4, b"\xff", "the size of a level|a level needs"), (16, b"\xff\xff\xff\xff", "needs -1 bytes"), (21, b"\x16", "element type 22"),
    (20, b"\x18", "field tag 24"), (23, b"\xff\xff", "does not end|field tag|needs")])
def test_damaged_headers(tmp_path, at, value, text):
    stream = b"".join(p for _, p in Z.tensor_fields(np.ones((2, 3), "float32")))
    (tmp_path/"f").write_bytes(stream[:at] + value + stream[at + len(value):])
    with pytest.raises(PvnbError, match=text):
        Z.read_weights(tmp_path/"f", ["x"])


def test_huge_claims_are_not_believed(tmp_path):
    described = b"\x08\x05" + (b"\x10" + Z._varint(2**31 - 1)) * 4
    (tmp_path/"f").write_bytes(struct.pack("<IQIi", 0, 0, 0, len(described)) + described + bytes(24))
    with pytest.raises(PvnbError, match="24 are left"):
        Z.read_weights(tmp_path/"f", ["x"])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,), }".ljust(117) + b"\n"
    import zipfile
    with zipfile.ZipFile(tmp_path/"g.npz", "w") as z:
        z.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8))
    with pytest.raises(PvnbError, match="needs more than"):
        Z.read_weights(tmp_path/"g.npz")


def test_names_must_fit(tmp_path, arrays):
    path = Z.save_legacy(tmp_path/"f", arrays, 2)
    with pytest.raises(PvnbError, match="7 tensors and no names"):
        Z.read_weights(path)
    with pytest.raises(PvnbError, match="holds 7 tensors, 2 names"):
        Z.read_weights(path, ["a", "b"])
    shapes = {n: a.shape for n, a in arrays.items()}
    with pytest.raises(PvnbError, match=r"b.w_0: \[3, 200\] in the file, expected \[3, 9\]"):
        Z.read_weights(path, {**shapes, "b.w_0": (3, 9)})


def test_not_weights(tmp_path, arrays):
    with pytest.raises(PvnbError, match="weight file not found"):
        Z.read_weights(tmp_path/"none")
    for name, data in {"empty": b"", "text": b"hello, world", "html": b"<html><body>404"}.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(PvnbError, match=f"{name} is no weight file"):
            Z.read_weights(tmp_path/name, ["x"])
    (tmp_path/"folder").mkdir()
    with pytest.raises(PvnbError, match="is empty"):
        Z.read_weights(tmp_path/"folder")
    Z.save_legacy(tmp_path/"folder"/"two", {"a": np.ones(1), "b": np.ones(1)}, 2)
    with pytest.raises(PvnbError, match="holds 2 tensors, expected one"):
        Z.read_weights(tmp_path/"folder")
    Z.save_legacy(tmp_path/"other"/"X.pdparams", arrays, 1)
    with pytest.raises(PvnbError, match="is a pickle, expected one tensor stream"):
        Z.read_weights(tmp_path/"other")
    for value, text in (([1], "list"), ({"a": "text"}, "'a' is str"), ({"a": np.array([None])}, "object")):
        (tmp_path/"p").write_bytes(pickle.dumps(value, protocol=2))
        with pytest.raises(PvnbError, match=text):
            Z.read_weights(tmp_path/"p")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pickle"])
def test_truncated(tmp_path, arrays, kind):
    path = tmp_path/"f"
    if kind == "safetensors":
        Z.save_weights(path, arrays)
    elif kind == "npz":
        np.savez(open(path, "wb"), **arrays)
    else:
        Z.save_legacy(path, arrays, 1)
    data = path.read_bytes()
    for n in range(1, len(data) - 1, 61):
        path.write_bytes(data[:n])
        with pytest.raises(PvnbError):
            Z.read_weights(path)


class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.mark.parametrize("where", ["value", "key bookkeeping", "top"])
def test_malicious_pickles(tmp_path, where):
    bad = Call(os.system, f"touch {tmp_path}/sprung")
    value = {"value": {"fc_0.w_0": bad}, "key bookkeeping": {"StructuredToParameterName@@": bad}, "top": bad}[where]
    (tmp_path/"evil.pdparams").write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(PvnbError, match=r"evil.pdparams refused: it names posix.system"):
        Z.read_weights(tmp_path/"evil.pdparams")
    assert not (tmp_path/"sprung").exists()


def test_malicious_arrays(tmp_path):
    np.savez(tmp_path/"o.npz", x=np.array([Call(os.system, "true")], dtype=object))
    with pytest.raises(PvnbError, match="Python objects"):
        Z.read_weights(tmp_path/"o.npz")
    with pytest.raises(PvnbError, match="'x' is object"):
        Z.save_weights(tmp_path/"o", {"x": np.array([None])})


def interrupted(arrays, path, metadata=None):
    with open(path, "wb") as f:
        f.write(b"half")
    raise KeyboardInterrupt


def test_saving_is_whole_or_not_at_all(tmp_path, arrays):
    path = Z.save_weights(tmp_path/"w.safetensors", arrays)
    before = path.read_bytes()
    with pytest.raises(PvnbError, match="metadata 'a' is not text"):
        Z.save_weights(path, arrays, {"a": 1})
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("safetensors.numpy.save_file", interrupted)
        Z.save_weights(path, {"other": np.ones(3)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# ---- networks

def small(classes=3, named_as="fc_0"):
    from paddle import nn

    from paddlevideo_nb.layers.naming import named, named_batch_norm
    return nn.Sequential(named(nn.Conv2D(3, 4, 3, bias_attr=False), weight="conv1_weights"), named_batch_norm(nn.BatchNorm2D(4), "bn_conv1"),
                         nn.AdaptiveAvgPool2D(1), nn.Flatten(), named(nn.Linear(4, classes), weight=f"{named_as}.w_0", bias=f"{named_as}.b_0"))


@pytest.fixture
def old():
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=s).astype("float32") for n, s in Z.network_parameters(small()).items()}


def state(net):
    return {k: v.numpy() for k, v in net.state_dict().items()}


def test_load_weights_from_every_form(tmp_path, old):
    from paddlevideo_nb.layers.naming import original_names
    names = original_names(small())
    paths = [Z.save_legacy(tmp_path/str(f), old, f) for f in (1, 2, 3)] + [Z.save_weights(tmp_path/"s", old)]
    for path in paths:
        net = small()
        assert Z.load_weights(net, path) is net
        assert all(np.array_equal(v, old[names[k]]) for k, v in state(net).items())
    own = Z.save_weights(tmp_path/"own", state(net))
    assert same(state(Z.load_weights(small(), own)), state(net))
    checkpoint = {**{f"network.{k}": v for k, v in state(net).items()}, "optimizer.0.weight|velocity_0": np.ones(9, "float32")}
    path = Z.save_weights(tmp_path/"ckpt", checkpoint, {"format": "paddlevideo_nb training checkpoint 1", "model": "X"})
    assert same(state(Z.load_weights(small(), path)), state(net))


def test_loaded_values_are_used(tmp_path, old):
    "Moving statistics too: the output follows from the file by hand."
    import paddle
    old["bn_conv1_variance"] = np.abs(old["bn_conv1_variance"]) + 1
    net = Z.load_weights(small(), Z.save_legacy(tmp_path/"f", old, 1))
    net.eval()
    x = np.random.default_rng(2).normal(size=(2, 3, 3, 3)).astype("float32")
    h = np.einsum("nchw,ochw->no", x, old["conv1_weights"])
    h = (h - old["bn_conv1_mean"]) / np.sqrt(old["bn_conv1_variance"] + 1e-5) * old["bn_conv1_scale"] + old["bn_conv1_offset"]
    assert np.abs(net(paddle.to_tensor(x)).numpy() - (h @ old["fc_0.w_0"] + old["fc_0.b_0"])).max() < 1e-4


def test_all_faults_at_once_and_nothing_is_changed(tmp_path, old):
    bad = {**old, "fc_0.w_0": np.zeros((4, 5), "float32"), "extra": np.zeros(2, "float32")}
    del bad["bn_conv1_mean"]
    net = small()
    before = state(net)
    with pytest.raises(PvnbError) as e:
        Z.load_weights(net, Z.save_legacy(tmp_path/"bad", bad, 1))
    text = str(e.value)
    assert "fc_0.w_0 [4, 5] instead of [4, 3]" in text and "1 missing: bn_conv1_mean [4]" in text and "1 surplus: extra [2]" in text
    assert "bad does not fit Sequential" in text and "\n" not in text and same(state(net), before)


def test_another_model_is_named(tmp_path, golden):
    files = list(golden_files(golden))
    for path, expected in files:
        with pytest.raises(PvnbError) as e:
            Z.load_weights(small(), Z.save_weights(tmp_path/"x", expected))
        assert f"the names are those of {Z.guess_model(expected)}" in str(e.value), path
    assert files


def test_own_file_of_another_network(tmp_path):
    from paddle import nn
    path = Z.save_weights(tmp_path/"x", state(nn.Linear(2, 2)))
    with pytest.raises(PvnbError, match=r"7 missing: 0.weight .*, and 4 more; 2 surplus: bias \[2\], weight \[2, 2\]"):
        Z.load_weights(small(), path)
    with pytest.raises(PvnbError, match="weight"):
        Z.load_weights(nn.Linear(2, 3), path)  # a network without original names
    Z.load_weights(nn.Linear(2, 2), path)


def test_adapt_original(tmp_path, old):
    net = small()
    old["fc_0.w_0"] = np.ascontiguousarray(old["fc_0.w_0"].T)
    net.adapt_original = lambda name, a: a.T if name == "fc_0.w_0" else a
    for form in (1, 2):
        Z.load_weights(net, Z.save_legacy(tmp_path/str(form), old, form))
    assert np.array_equal(net[4].weight.numpy(), old["fc_0.w_0"].T)
    assert same(state(Z.load_weights(net, Z.save_weights(tmp_path/"own", state(net)))), state(net))  # own files are not adapted


def test_start_weights(tmp_path, old, home):
    start = {**old, "fc_0.w_0": np.zeros((4, 1000), "float32"), "fc_0.b_0": np.zeros(1000, "float32")}
    folder = Z.save_legacy(tmp_path/"ResNet50_pretrained", start, 3)
    with tarfile.open(tmp_path/"R.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in (folder, tmp_path/"R.tar.gz", Z.save_legacy(tmp_path/"x.pdparams", start, 1)):
        net = small()
        before = state(net)
        report = Z.load_pretrained(net, path)
        assert sorted(report["loaded"]) == ["bn_conv1_mean", "bn_conv1_offset", "bn_conv1_scale", "bn_conv1_variance", "conv1_weights"]
        assert sorted(report["unused"]) == sorted(report["missing"]) == ["fc_0.b_0", "fc_0.w_0"]
        assert np.array_equal(state(net)["0.weight"], old["conv1_weights"]) and np.array_equal(state(net)["4.weight"], before["4.weight"])
    with pytest.raises(PvnbError, match=r"wrong shape: fc_0.w_0 \[4, 1000\] instead of \[4, 3\]"):
        Z.load_pretrained(small(), folder, skip=())
    with pytest.raises(PvnbError, match="none of its 1 names"):
        Z.load_pretrained(small(), Z.save_legacy(tmp_path/"n", {"q": np.ones(1)}, 1))
    net.adapt_pretrained = lambda name, a: None if "bn" in name else a * 2
    assert Z.load_pretrained(net, folder)["loaded"] == ["conv1_weights"] and np.array_equal(state(net)["0.weight"], 2 * old["conv1_weights"])


def test_archives_cannot_escape(tmp_path, home):
    (tmp_path/"x").write_bytes(b"x")
    for name, member in {"up": "../../../escaped", "absolute": str(tmp_path/"escaped")}.items():
        with tarfile.open(tmp_path/f"{name}.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo(member)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        try:
            Z.unpack(tmp_path/f"{name}.tar.gz")
        except PvnbError:
            pass
        assert not (tmp_path/"escaped").exists() and not list(tmp_path.parent.glob("escaped"))
    with tarfile.open(tmp_path/"link.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(PvnbError, match="link.tar.gz cannot be unpacked"):
        Z.unpack(tmp_path/"link.tar.gz")
    with pytest.raises(PvnbError, match="more than 0"):
        Z.unpack(tmp_path/"up.tar.gz", limit=0)
    whole = (tmp_path/"up.tar.gz").read_bytes()
    (tmp_path/"cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(PvnbError, match="cannot be unpacked"):
        Z.unpack(tmp_path/"cut.tar.gz")
    assert not list(home.rglob(".unpack*"))


# ---- converting

def test_convert(tmp_path, old):
    source = Z.save_legacy(tmp_path/"a.pdparams", old, 1)
    assert Z.convert(source, tmp_path/"b") == tmp_path/"b.safetensors" and same(Z.read_weights(tmp_path/"b.safetensors"), old)
    Z.load_weights(small(), tmp_path/"b.safetensors")
    with pytest.raises(PvnbError, match="should end in .safetensors"):
        Z.convert(source, tmp_path/"b.npz")
    with pytest.raises(PvnbError, match="is the old file"):
        Z.convert(tmp_path/"b.safetensors", tmp_path/"b.safetensors")


def test_convert_command(tmp_path, old, capsys):
    from paddlevideo_nb.cli import main
    assert main(["convert", str(Z.save_legacy(tmp_path/"a", old, 3)), str(tmp_path/"b.safetensors")]) == 0
    assert "7 arrays" in capsys.readouterr().out
    assert main(["convert", str(Z.save_legacy(tmp_path/"c", old, 2)), str(tmp_path/"d")]) == 2
    assert "--model NAME" in capsys.readouterr().err and not (tmp_path/"d.safetensors").exists()


# ---- fetching

CONTENT = np.random.default_rng(5).bytes(700_000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s, at = self.server, self.headers.get("Range")
        s.log.append(at)
        if s.missing:
            return self.send_error(404)
        same = self.headers.get("If-Range") == s.tag
        at = int(at[6:-1]) if at and same and s.ranges else 0
        if at >= len(s.content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if at else 200)
        self.send_header("Content-Length", str(len(s.content) - at))
        if s.tag:
            self.send_header("ETag", s.tag)
        if at:
            self.send_header("Content-Range", f"bytes {at}-{len(s.content) - 1}/{len(s.content)}")
        self.end_headers()
        end = at + s.cuts.pop(0) if s.cuts else None
        self.wfile.write(s.content[at:end])

    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.content, s.tag, s.ranges, s.missing, s.cuts, s.log = CONTENT, '"v1"', True, False, [], []
    s.url = f"http://127.0.0.1:{s.server_port}/w.pdparams"
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()


def fetch(server, path, **kw):
    return Z.fetch(server.url, path/"w.pdparams", **kw)


def only(path): return [p.name for p in path.iterdir()]


def test_fetch_whole(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(server, tmp_path, sha256=digest.upper()).read_bytes() == CONTENT and only(tmp_path) == ["w.pdparams"]
    fetch(server, tmp_path, sha256=digest)
    assert len(server.log) == 1  # what is there is not asked for again
    with pytest.raises(PvnbError, match=f"SHA-256 is {digest}, expected 00"):
        fetch(server, tmp_path, sha256="00")


def test_fetch_goes_on(server, tmp_path):
    server.cuts = [300_000, 200_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT and only(tmp_path) == ["w.pdparams"]
    asked = [int(r[6:-1]) for r in server.log[1:]]
    assert server.log[0] is None and len(asked) == 2 and 200_000 < asked[0] <= 300_000 < asked[1] <= 500_000


def test_fetch_goes_on_later(server, tmp_path):
    server.cuts = [300_000, 0, 0]
    with pytest.raises(PvnbError, match="run this again to go on") as e:
        fetch(server, tmp_path)
    assert server.url in str(e.value) and str(tmp_path/"w.pdparams") in str(e.value) and not (tmp_path/"w.pdparams").exists()
    server.log.clear()
    assert fetch(server, tmp_path).read_bytes() == CONTENT and server.log[0].startswith("bytes=") and only(tmp_path) == ["w.pdparams"]


def test_fetch_from_a_server_without_ranges(server, tmp_path):
    server.ranges, server.cuts = False, [300_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT and len(server.log) == 2


def test_fetch_a_file_that_changed(server, tmp_path):
    server.cuts = [300_000]
    with pytest.raises(PvnbError):
        fetch(server, tmp_path, attempts=1)
    server.content, server.tag = CONTENT[::-1], '"v2"'
    assert fetch(server, tmp_path).read_bytes() == CONTENT[::-1]


def test_fetch_a_part_of_unknown_origin(server, tmp_path):
    (tmp_path/"w.pdparams.part").write_bytes(b"rubbish" * 1000)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    (tmp_path/"w.pdparams").unlink()
    (tmp_path/"w.pdparams.part").write_bytes(CONTENT + b"more")
    (tmp_path/"w.pdparams.part.tag").write_text('"v1"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT and only(tmp_path) == ["w.pdparams"]


def test_fetch_wrong_checksum(server, tmp_path):
    with pytest.raises(PvnbError, match=rf"{server.url}: SHA-256 is .*, expected 0123"):
        fetch(server, tmp_path, sha256="0123")
    assert only(tmp_path) == []


def test_fetch_what_is_not_there(server, tmp_path):
    server.missing = True
    with pytest.raises(PvnbError, match="answers 404") as e:
        fetch(server, tmp_path)
    assert server.url in str(e.value) and str(tmp_path/"w.pdparams") in str(e.value) and len(server.log) == 1


def test_fetch_offline(home, monkeypatch):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setattr(Z, "SERVER", f"http://127.0.0.1:{port}")
    for what, file in (("TSN", "TSN.pdparams"), ("BsnTem.pdparams", "BsnTem.pdparams"), ("ResNet50_pretrained.tar.gz",) * 2):
        with pytest.raises(PvnbError) as e:
            Z.fetch(what)
        text = str(e.value)
        assert f"127.0.0.1:{port}/video_" in text and str(home/"weights"/file) in text and "no connection" in text and "\n" not in text
    (home/"weights"/"TSN.pdparams").write_bytes(b"put there by hand")
    assert Z.fetch("tsn") == home/"weights"/"TSN.pdparams"
    with pytest.raises(PvnbError, match="no published model"):
        Z.fetch("nothing")


# ---- what a network may say about its file

def test_missing_ok(tmp_path, old):
    del old["bn_conv1_mean"], old["bn_conv1_variance"]
    path = Z.save_legacy(tmp_path/"x", old, 1)
    with pytest.raises(PvnbError, match="2 missing"):
        Z.load_weights(small(), path)
    with pytest.raises(PvnbError, match=r"1 missing: bn_conv1_variance"):
        Z.load_weights(small(), path, missing_ok=["bn_conv1_mean"])
    net = Z.load_weights(small(), path, missing_ok=["bn_*"])
    assert (state(net)["1._mean"] == 0).all() and np.array_equal(state(net)["0.weight"], old["conv1_weights"])


def test_original_ignored(tmp_path, old):
    extra = {**old, "sample_mask": np.ones((2, 3), "float32")}
    for form in (1, 2, 3):
        path, net = Z.save_legacy(tmp_path/str(form), extra, form), small()
        with pytest.raises(PvnbError):
            Z.load_weights(net, path)
        net.original_ignored = ("sample_mask",)
        assert np.array_equal(state(Z.load_weights(net, path))["4.bias"], old["fc_0.b_0"])


def test_wrong_type(tmp_path, old):
    path = Z.save_legacy(tmp_path/"x", {**old, "fc_0.b_0": np.arange(3)}, 1)
    with pytest.raises(PvnbError, match="1 wrong type: fc_0.b_0 int64 instead of float32"):
        Z.load_weights(small(), path)
    half = {n: a.astype("float64" if "fc" in n else "float16") for n, a in old.items()}  # precision may differ
    assert state(Z.load_weights(small(), Z.save_legacy(tmp_path/"y", half, 1)))["4.bias"].dtype == np.float32


def test_start_weights_by_name():
    assert Z._source("ResNet50_pretrained")[:2] == Z._source("ResNet50_pretrained.tar.gz")[:2]
