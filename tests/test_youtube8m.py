"YouTube-8M shards: three forms, damage, sampling, padding, conversion."
import os
import pickle
import signal
import struct
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, golden_dir
from paddlevideo_nb.datasets import youtube8m as y8
from paddlevideo_nb.datasets.loader import Skipped, make_loader
from paddlevideo_nb.datasets.youtube8m import (YouTube8MDataset, convert_shards, decode_video, dequantise, find_shards, make_video, open_shard, pad_collate,
                                               quantise, read_record, scan_records, segment_frames, shard_order, write_h5, write_pickle, write_records,
                                               youtube8m_command)

FORMS = {"tfrecord": write_records, "h5": write_h5, "pkl": write_pickle}


def clip(k, n=None, rgb=16, audio=6, labels=None):
    rng = np.random.default_rng(k)
    n = n or int(rng.integers(1, 40))
    return make_video(f"vid{k}", [k % 5, 7] if labels is None else labels, rng.integers(0, 256, (n, rgb), np.uint8), rng.integers(0, 256, (n, audio), np.uint8))


def equal(a, b):
    return a["id"] == b["id"] and all(np.array_equal(a[k], b[k]) for k in ("labels", "rgb", "audio"))


@pytest.fixture
def shards(tmp_path):
    "12 videos in each form: name -> path."
    for name, write in FORMS.items():
        assert write(tmp_path/f"a.{name}", (clip(k) for k in range(12))) == 12
    return {name: tmp_path/f"a.{name}" for name in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_back_what_was_written(tmp_path, form):
    videos = [clip(k) for k in range(70)] + [clip(70, labels=[]), clip(71, n=300), clip(72, n=1, labels=[3861])]  # 70: more than one group of 64
    FORMS[form](tmp_path/"x", videos)
    shard = open_shard(tmp_path/"x")  # by content: the name has no ending
    assert len(shard) == 73 and not shard.damage and all(equal(shard[i], v) for i, v in enumerate(videos))
    with pytest.raises(PvnbError, match="no video to write"):
        FORMS[form](tmp_path/"y", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_records_agree_with_the_protobuf_and_the_tfrecord_package(tmp_path):
    "Written by the package, read by us, and the other way round."
    from tfrecord import TFRecordWriter, tfrecord_loader

    videos = [clip(k) for k in range(3)]
    writer = TFRecordWriter(str(tmp_path/"theirs"))
    for v in videos:
        writer.write({"video_id": (v["id"].encode(), "byte"), "labels": (v["labels"].tolist(), "int")},
                     {name: ([row.tobytes() for row in v[name]], "byte") for name in ("rgb", "audio")})
    writer.close()
    shard = open_shard(tmp_path/"theirs")
    assert all(equal(shard[i], v) for i, v in enumerate(videos))
    write_records(tmp_path/"ours", videos)
    read = tfrecord_loader(str(tmp_path/"ours"), None, {"id": "byte", "labels": "int"}, sequence_description={"rgb": "byte", "audio": "byte"})
    for v, (context, features) in zip(videos, read, strict=True):
        assert context["id"] == v["id"].encode() and np.array_equal(context["labels"], v["labels"])
        assert [bytes(row) for row in features["rgb"]] == [row.tobytes() for row in v["rgb"]]


def test_checksum_by_definition():
    "CRC-32C bit by bit (polynomial 0x82f63b78), then the mask of the TFRecord format."
    data = bytes(range(40))
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    crc ^= 0xffffffff
    assert y8.masked_crc(data) == ((crc >> 15 | crc << 17) + 0xa282ead8) % 2**32


def test_every_cut_and_every_wrong_bit_is_found(tmp_path):
    write_records(tmp_path/"s", [clip(k, n=3) for k in range(4)])
    data = (tmp_path/"s").read_bytes()
    offsets, _ = scan_records(tmp_path/"s")
    ends = [*offsets[1:], len(data)]
    bad = tmp_path/"bad.tfrecord"
    for cut in (1, 11, 12, 40, int(offsets[1]), int(offsets[1]) + 5, len(data) - 1):
        bad.write_bytes(data[:cut])
        found, damage = scan_records(bad)
        whole = sum(end <= cut for end in ends)
        assert len(found) == whole
        assert damage == ("" if cut in ends else f"{bad} is cut short after record {whole}")
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1
        bad.write_bytes(changed)
        found, damage = scan_records(bad)
        record = int(np.searchsorted(offsets, at, "right")) - 1
        if at - offsets[record] < 12:  # its length, or the checksum of it
            assert len(found) == record and str(bad) in damage
            continue
        assert len(found) == 4 and not damage
        for i, offset in enumerate(found):
            if i == record:
                with pytest.raises(PvnbError, match="checksum"):
                    read_record(bad, offset, "it")
            else:
                read_record(bad, offset, "it")


def test_damage_is_named_and_skipped_and_the_rest_is_kept(tmp_path, shards):
    data = bytearray(shards["tfrecord"].read_bytes())
    offsets, _ = scan_records(shards["tfrecord"])
    data[offsets[2] + 30] ^= 8
    (tmp_path/"bit").write_bytes(data)
    (tmp_path/"cut").write_bytes(shards["tfrecord"].read_bytes()[:offsets[5] + 99])
    (tmp_path/"none.tfrecord").write_bytes(b"")
    (tmp_path/"text").write_text("bit\ncut\nnone.tfrecord\na.tfrecord\n")
    dataset = YouTube8MDataset(tmp_path/"text", num_classes=10)
    assert len(dataset) == 12 + 6 + 1 + 12
    for workers in (0, 2):
        batches = list(make_loader(dataset, 7, shuffle=True, workers=workers))
        skipped = sorted(m for b in batches for m in b["skipped"])
        assert skipped == [f"{tmp_path/'bit'}, record 2 is damaged (its checksum is wrong)", f"{tmp_path/'cut'} is cut short after record 5", f"{tmp_path/'none.tfrecord'} is empty"]
        assert sum(len(b["name"]) for b in batches if "name" in b) == 11 + 5 + 12
    with pytest.raises(PvnbError, match="cut short"):
        YouTube8MDataset(tmp_path/"cut", "infer")
    infer = YouTube8MDataset(tmp_path/"bit", "infer")
    with pytest.raises(PvnbError, match="record 2"):
        infer[2]
    with pytest.raises(PvnbError, match="no video can be read.*is empty"):
        YouTube8MDataset(tmp_path/"none.tfrecord")


def test_damaged_hdf5(tmp_path, shards):
    data = shards["h5"].read_bytes()
    (tmp_path/"cut").write_bytes(data[:len(data) // 2])
    with pytest.raises(PvnbError, match="cut.*damaged or cut short"):
        open_shard(tmp_path/"cut")
    with h5py.File(shards["h5"]) as f:
        at = f["rgb"].id.get_chunk_info(0).byte_offset
    changed = bytearray(data)
    changed[at + 5] ^= 1
    (tmp_path/"bit").write_bytes(changed)
    shard = open_shard(tmp_path/"bit")
    with pytest.raises(PvnbError, match="video 0 is damaged"):
        shard[0]
    assert equal(shard[11], clip(11))  # in another chunk
    with h5py.File(tmp_path/"other.h5", "w") as f:
        f["x"] = 1
    with pytest.raises(PvnbError, match="something else"):
        open_shard(tmp_path/"other.h5")


def test_what_is_not_a_shard_is_refused_by_name(tmp_path, shards):
    (tmp_path/"noise").write_bytes(bytes(range(1, 101)))
    (tmp_path/"zip").write_bytes(b"\x1f\x8b" + bytes(30))
    (tmp_path/"evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nU\x04true\x85R.")
    (tmp_path/"dict.pkl").write_bytes(pickle.dumps([{"video": "x"}], protocol=2))
    (tmp_path/"number.pkl").write_bytes(pickle.dumps(3, protocol=2))
    (tmp_path/"part.pkl").write_bytes(shards["pkl"].read_bytes()[:500])
    for name, words in {"noise": "neither a TFRecord", "zip": "gunzip", "evil.pkl": "os.system", "number.pkl": "list of YouTube-8M", "part.pkl": "truncated", "gone": "not found"}.items():
        with pytest.raises(PvnbError, match=words) as e:
            open_shard(tmp_path/name)
        assert name in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(PvnbError, match="no 'feature'"):
        open_shard(tmp_path/"dict.pkl")[0]


def record_of(**lists):
    from tfrecord import TFRecordWriter
    return TFRecordWriter.serialize_tf_sequence_example({"id": (b"x", "byte"), "labels": ([1], "int")}, {k: (v, "byte") for k, v in lists.items()})


def test_records_of_another_kind_are_refused():
    assert decode_video(record_of(rgb=[b"ab", b"cd"], audio=[b"e", b"f"]))["rgb"].tolist() == [[97, 98], [99, 100]]
    for lists, words in (({"rgb": [b"ab"]}, "no audio"), ({"rgb": [b"ab", b"c"], "audio": [b"a", b"b"]}, "frames of"), ({"rgb": [], "audio": []}, "0 frames"),
                         ({"rgb": [b"ab", b"cd"], "audio": [b"a"]}, "2 frames of rgb, 1 of audio"), ({}, "no rgb and no audio")):
        with pytest.raises(PvnbError, match=words):
            decode_video(record_of(**lists), "that record")
    with pytest.raises(PvnbError, match="not a SequenceExample"):
        decode_video(b"\xff" * 20)


def test_pickle_as_the_original_reads_it_and_as_python_2_wrote_it(tmp_path):
    video = clip(0, n=320)
    write_pickle(tmp_path/"p", [video])
    data = (tmp_path/"p").read_bytes()
    assert b"numpy._core" not in data and b"_codecs" not in data and len(data) < video["rgb"].nbytes + video["audio"].nbytes + 1000
    record = pickle.loads(data, encoding="bytes")[0]
    assert record[b"nframes"] == 300 and record[b"feature"].shape == (320, 16) and record[b"label"] == [0, 7] and record[b"video"] == b"vid0"
    assert len(open_shard(tmp_path/"p")[0]["rgb"]) == 300
    python2 = b"\x80\x02]q\x01}q\x02(U\x07nframesq\x03K\x02U\x05videoq\x04U\x01zq\x05U\x05labelq\x06]q\x07K\x03a"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x10cnumpy\nndarray\nq\x11K\x00\x85U\x01b\x87R(K\x01K\x03K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06abcdeftb"
    (tmp_path/"q").write_bytes(python2 + b"U\x07feature" + array + b"U\x05audio" + array + b"ua.")
    video = open_shard(tmp_path/"q")[0]
    assert video["id"] == "z" and video["rgb"].tolist() == [[97, 98], [99, 100]] and video["labels"].tolist() == [3]


def test_quantisation():
    every = np.arange(256, dtype=np.uint8)
    exact = every.astype(float)*4/255 + 4/512 - 2
    assert np.array_equal(dequantise(every), exact.astype(np.float32)) and dequantise(every).dtype == np.float32 and np.array_equal(quantise(exact), every)
    x = np.random.default_rng(0).normal(0, 1.5, 5000)
    assert np.array_equal(quantise(x), np.abs(x[:, None] - exact).argmin(1))  # the nearest of the 256
    with pytest.raises(PvnbError, match="NaN"):
        quantise([0, np.nan])


def test_segment_frames_for_every_length():
    for n in range(1, 350):
        low, high = segment_frames(n, 100, 0.0), segment_frames(n, 100, np.full(100, np.nextafter(1, 0)))
        assert low[0] == 0 and high[-1] == n - 1 and (np.diff(low) >= 0).all() and (high >= low).all() and (high - low <= np.ceil(n/100)).all()
        assert (segment_frames(n, 100) >= low).all() and (segment_frames(n, 100) <= high).all()


def test_sampling_modes(shards):
    def names(mode, sampling, seed=0, epoch=0):
        data = YouTube8MDataset(shards["h5"], mode, sampling, seg_num=9, num_classes=10, seed=seed, dequantise=False)
        data.set_epoch(epoch)
        return np.concatenate([data[i]["rgb"].ravel() for i in range(12)])
    train = names("train", "segments")
    assert np.array_equal(train, names("train", "segments")) and not np.array_equal(train, names("train", "segments", epoch=1)) and not np.array_equal(train, names("train", "segments", seed=1))
    middle = names("test", "segments")
    assert np.array_equal(middle, names("valid", "segments", seed=4, epoch=3)) and np.array_equal(middle, names("train", "uniform"))
    drawn = names("test", "random")
    assert np.array_equal(drawn, names("test", "random", epoch=5)) and not np.array_equal(drawn, names("test", "random", seed=1)) and not np.array_equal(drawn, middle)
    capped = YouTube8MDataset(shards["h5"], "test", "all", num_classes=10, max_frames=5)
    assert max(len(capped[i]["rgb"]) for i in range(12)) == 5


def test_all_forms_and_any_number_of_workers_give_identical_batches(shards):
    def batches(source, workers, **settings):
        data = YouTube8MDataset(source, num_classes=10, **settings)
        return [{k: np.asarray(v) for k, v in b.items()} for b in make_loader(data, 5, shuffle=True, seed=3, epoch=1, workers=workers)]
    for settings in ({"sampling": "segments", "seg_num": 4}, {"sampling": "all", "dequantise": False}, {"mode": "infer"}):
        first = batches(shards["tfrecord"], 0, **settings)
        assert sum(len(b["name"]) for b in first) == 12 and ("label" in first[0]) == (settings.get("mode") != "infer")
        for form, workers in (("h5", 0), ("pkl", 0), ("h5", 2), ("pkl", 2), ("tfrecord", 2)):
            other = batches(shards[form], workers, **settings)
            for a, b in zip(first, other, strict=True):
                assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a), (form, workers, settings)


def test_padding_keeps_every_frame_and_adds_nothing_else():
    samples = [{"rgb": np.ones((n, 3), np.float32), "audio": np.full((n, 2), 2, np.float32), "label": np.zeros(4), "name": str(n)} for n in (2, 5, 1)]
    batch = pad_collate([samples[0], Skipped("bad"), *samples[1:]])
    assert batch["lengths"].tolist() == [2, 5, 1] and batch["lengths"].dtype == np.int64 and batch["skipped"] == ["bad"] and batch["name"] == ["2", "5", "1"]
    assert batch["rgb"].shape == (3, 5, 3) and batch["rgb"].sum() == 8*3 and batch["audio"].sum() == 8*2*2 and batch["rgb"][0, 2:].sum() == 0
    assert pad_collate([Skipped("a"), Skipped("b")]) == {"skipped": ["a", "b"]}
    assert samples[0]["rgb"].shape == (2, 3) and "lengths" not in samples[0]


def test_labels_outside_of_the_classes_and_unknown_settings_are_errors(shards):
    with pytest.raises(PvnbError, match=r"vid0.*\[0, 7\].*0 to 6"):
        list(make_loader(YouTube8MDataset(shards["h5"], num_classes=7), 4))
    for settings, words in (({"mode": "eval"}, "mode 'eval'"), ({"sampling": "best"}, "sampling 'best'"), ({"seg_num": 0}, "seg_num 0"), ({"num_classes": 0}, "num_classes 0")):
        with pytest.raises(PvnbError, match=words):
            YouTube8MDataset(shards["h5"], **settings)


def test_find_shards(tmp_path, shards, monkeypatch):
    (tmp_path/"list").write_text("\ufeffa.h5\n\n  a.pkl \n", encoding="utf-8")
    assert find_shards(tmp_path/"list") == [str(shards["h5"]), str(shards["pkl"])]
    assert find_shards(str(tmp_path/"a.*")) == sorted(map(str, shards.values()))
    assert find_shards([shards["pkl"]]) == [str(shards["pkl"])] and find_shards(str(shards["tfrecord"])) == [str(shards["tfrecord"])]
    (tmp_path/"empty").write_text("\n")
    (tmp_path/"missing").write_text("a.h5\nb.h5\n")
    for source, words in ((tmp_path/"empty", "lists no shard"), (tmp_path/"missing", "b.h5"), (tmp_path/"z*.h5", "no file is called"), (tmp_path/"nothing", "not found")):
        with pytest.raises(PvnbError, match=words):
            find_shards(str(source))


def test_order_is_shard_by_shard_and_complete():
    order = shard_order([5, 1, 7], True, seed=2, epoch=3)
    assert sorted(order) == list(range(13)) and np.array_equal(order, shard_order([5, 1, 7], True, 2, 3)) and not np.array_equal(order, shard_order([5, 1, 7], True, 2, 4))
    shard = np.searchsorted([5, 6, 13], order, "right")
    assert (np.diff(shard) != 0).sum() == 2  # it changes twice: each shard stays in one piece
    assert shard_order([5, 1, 7]).tolist() == list(range(13))


def test_a_replaced_file_is_read_anew(tmp_path):
    for form, write in FORMS.items():
        write(tmp_path/form, [clip(0)])
        assert equal(open_shard(tmp_path/form)[0], clip(0))
        write(tmp_path/form, [clip(1, n=50)])
        assert equal(open_shard(tmp_path/form)[0], clip(1, n=50))


def test_scans_of_large_shards_are_noted(tmp_path, monkeypatch, shards):
    monkeypatch.setenv("PVNB_HOME", str(tmp_path/"home"))
    calls = []
    def find():
        calls.append(1)
        return {"offsets": np.arange(3)}
    for _ in range(3):
        assert y8._noted(shards["h5"], find, least=1)["offsets"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    note = next((tmp_path/"home").rglob("*.npz"))
    note.write_bytes(b"damaged")
    y8._noted(shards["h5"], find, least=1)
    os.utime(shards["h5"], (1, 1))
    y8._noted(shards["h5"], find, least=1)
    y8._noted(shards["h5"], find)  # small: not noted
    assert len(calls) == 4


def test_conversion_and_back(tmp_path, shards, capsys):
    assert youtube8m_command([str(shards["pkl"]), str(tmp_path/"one"), "--workers", "1"]) == 0
    assert "1 shards made with 12 videos, 0 kept, 0 failed" in capsys.readouterr().out
    for form in ("tfrecord", "pkl", "h5"):
        counts = convert_shards(tmp_path/"one"/"h5.list", tmp_path/form, form, workers=1, progress=False)
        assert counts == {"made": 1, "kept": 0, "failed": 0, "videos": 12, "faults": 0}
        (path,) = find_shards(tmp_path/form/f"{form}.list")
        assert all(equal(open_shard(path)[k], clip(k)) for k in range(12))
    assert all(equal(open_shard(tmp_path/"pkl"/"a.pkl")[k], clip(k)) for k in range(12))
    with pytest.raises(PvnbError, match="written over"):
        convert_shards(shards["h5"], tmp_path, "h5")
    with pytest.raises(PvnbError, match="written over"):
        convert_shards(str(tmp_path/"a.*"), tmp_path/"two", "h5")
    with pytest.raises(PvnbError, match="unknown form"):
        convert_shards(shards["h5"], tmp_path/"two", "npz")
    with pytest.raises(PvnbError, match="compression"):
        youtube8m_command([str(shards["h5"]), str(tmp_path/"two"), "--form", "pkl", "--compression", "gzip"])
    (tmp_path/"bad.tfrecord").write_bytes(b"nothing of the kind")
    with pytest.raises(PvnbError, match="none of the 1 shards"):
        convert_shards([tmp_path/"bad.tfrecord"], tmp_path/"two", workers=1, progress=False)


def test_conversion_resumes_and_remembers_faults(tmp_path, shards):
    data = shards["tfrecord"].read_bytes()
    source = tmp_path/"in"
    source.mkdir()
    for k in range(3):
        (source/f"s{k}.tfrecord").write_bytes(data)
    (source/"s3.tfrecord").write_bytes(data[:-10])
    (source/"s4.tfrecord").write_bytes(b"")
    first = convert_shards(str(source/"*"), tmp_path/"out", workers=2, progress=False)
    assert first == {"made": 4, "kept": 0, "failed": 1, "videos": 47, "faults": 2}
    assert (tmp_path/"out"/"h5.list").read_text() == "s0.h5\ns1.h5\ns2.h5\ns3.h5\n"
    failures = (tmp_path/"out"/"failures.txt").read_text()
    assert "cut short after record 11" in failures and "is empty" in failures and len(failures.splitlines()) == 2
    (tmp_path/"out"/"s1.h5").unlink()
    second = convert_shards(str(source/"*"), tmp_path/"out", workers=2, progress=False)
    assert second == {"made": 1, "kept": 3, "failed": 1, "videos": 12, "faults": 2} and (tmp_path/"out"/"failures.txt").read_text() == failures
    (source/"s3.tfrecord").write_bytes(data)  # the download was completed
    os.utime(source/"s3.tfrecord", (time.time() + 5,)*2)
    third = convert_shards(str(source/"*"), tmp_path/"out", workers=2, progress=False)
    assert third["made"] == 1 and third["kept"] == 3 and len(open_shard(tmp_path/"out"/"s3.h5")) == 12
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["failures.txt", "h5.list", "s0.h5", "s1.h5", "s2.h5", "s3.h5"]


def test_conversion_killed_in_the_middle_leaves_whole_files_only(tmp_path):
    source = tmp_path/"in"
    source.mkdir()
    for s in range(12):
        write_records(source/f"s{s:02}.tfrecord", [clip(100*s + k, n=200, rgb=1024, audio=128) for k in range(20)])
    program = f"from paddlevideo_nb.datasets.youtube8m import convert_shards; convert_shards({str(source/'*')!r}, {str(tmp_path/'out')!r}, workers=1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.time() + 60
    while len(list((tmp_path/"out").glob("s*.h5"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted((tmp_path/"out").glob("s*.h5"))
    assert 2 <= len(done) and all(len(open_shard(p)) == 20 for p in done)
    counts = convert_shards(str(source/"*"), tmp_path/"out", workers=2, progress=False)
    assert counts["kept"] == len(done) and counts["made"] == 12 - len(done) and len(YouTube8MDataset(tmp_path/"out"/"h5.list", num_classes=10)) == 240


def test_golden_reader(golden, tmp_path):
    case = dict(np.load(golden/"metrics"/"youtube8m_reader.npz"))
    for (n, k, *theirs), draws in zip(case["random_index_rows"], case["random_index_draws"], strict=True):
        assert segment_frames(n, k, draws[:k]).tolist() == theirs[:k]
    state = np.random.RandomState(int(case["attentioncluster_numpy_seed"]))
    for i, n in enumerate(case["nframes"]):
        frames = segment_frames(n, int(case["attentioncluster_seg_num"]), state.random_sample(int(case["attentioncluster_seg_num"])))
        for k in ("rgb", "audio"):
            assert np.array_equal(dequantise(case[k][i, :n][frames]), case[f"attentioncluster_{k}_{i}"].astype(np.float32))


def test_a_real_record_reads_the_same_in_every_form(tmp_path):
    path = golden_dir() and golden_dir().parent/"data"/"youtube8m_one_record.pkl"
    if not path or not path.is_file():
        pytest.skip("no real YouTube-8M record here")
    video = open_shard(path)[0]
    assert video["rgb"].shape == (170, 1024) and video["audio"].shape == (170, 128) and video["labels"].tolist() == [11]
    for form, write in FORMS.items():
        write(tmp_path/form, [video])
        assert equal(open_shard(tmp_path/form)[0], video)
    sample = YouTube8MDataset(path)[0]
    assert abs(sample["rgb"].mean()) < .05 and abs(sample["rgb"].std() - 1) < .1 and sample["label"].shape == (3862,) and sample["label"].sum() == 1
    assert struct.unpack("<Q", (tmp_path/"tfrecord").read_bytes()[:8])[0] == (tmp_path/"tfrecord").stat().st_size - 16


@pytest.mark.parametrize("name", ["AttentionCluster", "AttentionLSTM", "NEXTVLAD"])
def test_real_record_through_the_published_networks(name):
    from paddlevideo_nb.core import import_paddle
    from paddlevideo_nb.datasets.loader import make_loader
    from paddlevideo_nb.tasks import get_task, published_config
    path = golden_dir() and golden_dir().parent/"data"/"youtube8m_one_record.pkl"
    if not (path and path.is_file()): pytest.skip("no real YouTube-8M record beside the golden data")
    paddle = import_paddle()
    paddle.seed(0)
    task = get_task(published_config(name))
    network, data = task.network(), task.dataset("infer", video_path=str(path))
    network.eval()
    (batch,) = make_loader(data, 1)
    with paddle.no_grad(): outputs = task.forward(network, batch, "infer")
    (found,) = task.predictions(outputs, batch, 20)
    assert outputs["probabilities"].shape == [1, 3862] and len(found["classes"]) == 20 and np.isfinite(found["scores"]).all() and 0 < min(found["scores"]) <= max(found["scores"]) < 1
