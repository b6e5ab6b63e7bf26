"""`pvnb parity`: passes on recordings of the original, fails on anything else."""
import json
import shutil
import zlib

import numpy as np
import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.config import load_config
from paddlevideo_nb.core import import_paddle, repo_dir
from paddlevideo_nb.layers.naming import original_names
from paddlevideo_nb.tasks import get_task

paddle = import_paddle()
SMALL = repo_dir()/"tests"/"golden"


@pytest.mark.parametrize("part", ["tsn", "metrics"])
def test_recordings_pass(part): assert main(["parity", str(SMALL/part)]) == 0


def test_all_of_tsn(golden):
    if not (golden/"tsn"/"published.json").is_file(): pytest.skip("only the small golden copy is here")
    assert main(["parity", str(golden/"tsn")]) == 0


def test_checkpoint_forms_pass_and_networks_to_come_fail(capsys):
    assert main(["parity", str(SMALL/"bsn_pem"/"checkpoint")]) == 0
    assert main(["parity", str(SMALL/"bsn_pem")]) == 1
    assert "not built" in capsys.readouterr().out


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
