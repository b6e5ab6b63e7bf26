"""`pvnb parity`: passes on recordings of the original, fails on anything else."""
import json
import shutil
import zlib

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import PvnbError, import_paddle, repo_dir
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.parity import parity, parity_command
from paddlevideo_nb.tasks import get_task

paddle = import_paddle()
SMALL = repo_dir()/"tests"/"golden"


@pytest.mark.parametrize("part", ["tsn", "tsm", "stnet", "nonlocal", "metrics"])
def test_recordings_pass(part, golden):
    if part in ("stnet", "nonlocal") and (golden/part/"published.json").is_file(): pytest.skip("all its recordings are checked below")
    assert main(["parity", str(SMALL/part)]) == 0


@pytest.mark.parametrize("part", ["tsn", "tsm", "stnet", "nonlocal"])
def test_all_recordings_pass(part, golden):
    if not (golden/part/"published.json").is_file(): pytest.skip("only the small golden copy is here")
    assert main(["parity", str(golden/part)]) == 0


def test_checkpoint_forms_pass():
    assert main(["parity", str(SMALL/"bsn_pem"/"checkpoint")]) == 0
    assert main(["parity", str(SMALL/"bsn_pem")]) == 0


def test_unknown_networks_and_recordings_fail(tmp_path, capsys, monkeypatch):
    from paddlevideo_nb import tasks
    monkeypatch.delitem(tasks.TASKS, "BsnPem")
    assert main(["parity", str(SMALL/"bsn_pem")]) == 1
    assert "no model 'BSNPEM'" in capsys.readouterr().out
    np.savez(tmp_path/"nobody_knows.npz", x=np.zeros(3))
    assert main(["parity", str(tmp_path)]) == 1
    assert "no check is known for recordings like nobody_knows.npz" in capsys.readouterr().out


def test_no_case_and_no_folder(tmp_path):
    assert main(["parity", str(tmp_path)]) == 2
    assert main(["parity", str(tmp_path/"none")]) == 2


@pytest.fixture
def unseen(tmp_path):
    "A case of other dimensions and another salt, written by code of its own."
    config = load_config("tsn", MODEL={"num_classes": 5, "seg_num": 2}, TRAIN={"target_size": 64})
    network = get_task(config).network()
    network.eval()
    state, rules = network.state_dict(), []
    for key, name in original_names(network).items():
        kind = "one_plus_abs" if name.endswith("variance") else "one_plus" if name.endswith("scale") else "normal"
        shape = list(state[key].shape)
        scale = 0.1 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5
        z = np.random.RandomState(zlib.crc32(f"other/{name}".encode())).standard_normal(shape).astype("float32")
        value = np.float32(scale) * (np.abs(z) if kind == "one_plus_abs" else z) + np.float32(kind != "normal")
        state[key].set_value(value.astype("float32"))
        rules.append({"name": name, "shape": shape, "kind": kind, "scale": scale})
    image = (np.random.RandomState(zlib.crc32(b"other/input:image")).standard_normal([3, 2, 3, 64, 64]) * 1.0).astype("float32")
    with paddle.no_grad(): out = paddle.nn.functional.softmax(network(paddle.to_tensor(image))).numpy()
    case = {"case": "unseen", "model_name": "TSN", "config_file": "tsn.yaml", "overrides": {"MODEL": {"num_classes": 5, "seg_num": 2}, "TRAIN": {"target_size": 64}},
            "salt": "other", "parameters": rules, "infer_inputs": {"image": {"kind": "normal", "shape": [3, 2, 3, 64, 64], "arg": 1.0, "sequence_lengths": None}},
            "infer_outputs": [{"key": "infer_0", "shape": list(out.shape), "stride": None, "sum": float(out.sum()), "l2": float(np.linalg.norm(out))}]}
    def write(case=case, out=out):
        (tmp_path/"unseen.json").write_text(json.dumps(case))
        np.savez(tmp_path/"unseen.npz", infer_0=out)
        return main(["parity", str(tmp_path)])
    return write, case, out


def test_unseen_case(unseen):
    write, case, out = unseen
    assert write() == 0
    assert write(out=out * 1.001) == 1
    renamed = json.loads(json.dumps(case))
    renamed["parameters"][0]["name"] += "_x"
    assert write(case=renamed) == 1


def test_changed_processing_fails(tmp_path):
    shutil.copy(SMALL/"metrics"/"kinetics.npz", tmp_path/"kinetics.npz")
    arrays = dict(np.load(tmp_path/"kinetics.npz"))
    np.savez(tmp_path/"kinetics.npz", **{**arrays, "top1": arrays["top1"] + .025})
    assert main(["parity", str(tmp_path)]) == 1


def test_unseen_case_fails_for_one_number_one_name_one_shape(unseen, capsys):
    write, case, out = unseen
    one = out.copy()
    one[1, 2] += 1e-3*out.max()
    assert write(out=one) == 1
    assert "FAIL" in capsys.readouterr().out
    reshaped = json.loads(json.dumps(case))
    rule = next(p for p in reshaped["parameters"] if p["name"] == "fc_0.b_0")
    rule["shape"] = [6]
    assert write(case=reshaped) == 1
    assert "fc_0.b_0 has shape [5], recorded [6]" in capsys.readouterr().out
    fewer = {**case, "parameters": [p for p in case["parameters"] if p["name"] != "fc_0.b_0"]}
    assert write(case=fewer) == 1
    assert "fc_0.b_0" in capsys.readouterr().out
    assert write(case={**case, "salt": "another"}) == 1  # other weights than those recorded
    assert write() == 0


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(PvnbError, match="nowhere"):
        parity_command([str(tmp_path/"nowhere")])


def test_published_schedule_of_tsn(golden, tmp_path):
    if not (golden/"schedules.json").is_file():
        pytest.skip("only the small golden copy is here")
    rows = {r["case"].rpartition("/")[2]: r["verdict"] for r in parity(golden/"schedules.json", progress=False)}
    assert rows["tsn"] == "ok"
    changed = json.loads((golden/"schedules.json").read_text())
    changed["schedules"] = {"tsn": changed["schedules"]["tsn"]}
    changed["schedules"]["tsn"]["learning_rate_of_update"][-1][1] *= 1.01
    (tmp_path/"schedules.json").write_text(json.dumps(changed))
    assert [r["verdict"] for r in parity(tmp_path, progress=False)] == ["FAIL"]
