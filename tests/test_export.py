"""Programs of paddle.inference: equal to the dynamic network, built only where that pays, and never a reason to stop."""
import contextlib
import io
import json
import time

import numpy as np
import paddle
import pytest
from helpers import jitter

from paddlevideo_nb import export
from paddlevideo_nb.cli import main
from paddlevideo_nb.core import PvnbError
from paddlevideo_nb.export import FastNetwork, Predictor, difference, example_inputs, fast, put_tensors, save_static, take_tensors
from paddlevideo_nb.tasks import create_model, get_task
from paddlevideo_nb.zoo import save_weights

MINI = {"TSN": "tsn_mini", "TSM": "tsm_mini", "STNET": "stnet_mini", "NONLOCAL": "nonlocal_mini", "CTCN": "ctcn_mini", "BMN": "bmn_mini", "BsnTem": "bsn_tem_mini", "BsnPem": "bsn_pem_mini",
        "AttentionCluster": "attention_cluster_mini", "AttentionLSTM": "attention_lstm_mini", "NEXTVLAD": "nextvlad_mini", "ETS": "ets_mini", "TALL": "tall_mini", "EfficientNetLite0": "efficientnet_lite0"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Verdicts of other runs shall not decide; within this file they may."
    monkeypatch.setenv("PVNB_HOME", str(tmp_path_factory.getbasetemp()/"home"))


@pytest.fixture
def trusting(monkeypatch):
    "No trial run in a process of its own, which takes seconds."
    monkeypatch.setattr(export, "survives", lambda *args: "")


def small(name="TSN", batch=4):
    "A network with parameters that nothing cancels out, and its inputs as tensors."
    network = jitter(create_model(name, MINI[name]), size=.05)
    return network, [paddle.to_tensor(v) for v in example_inputs(get_task(MINI[name]), batch).values()]


def flat(value):
    found = []
    take_tensors(value, found)
    return [t.numpy() for t in found]


@pytest.mark.parametrize("name", MINI)
def test_every_network_is_equal_as_a_program(name, features, tmp_path):  # NEXTVLAD's configuration names a file of `features`
    network, tensors = small(name, 2)
    with paddle.no_grad(): expected = flat(network(*tensors))
    assert all(np.abs(e).max() > 0 for e in expected)
    program, form = save_static(network, tmp_path/"net", *tensors)
    found = Predictor(program)([t.numpy() for t in tensors])
    assert difference(found, expected) < 1e-4
    assert difference(flat(put_tensors(form, [paddle.to_tensor(f) for f in found])), expected) < 1e-4
    with paddle.no_grad(): assert difference(flat(network(*tensors)), expected) < 1e-6  # writing left nothing behind


def test_a_batch_norm_without_scale(tmp_path):
    "I3D's kind: without the mending, oneDNN's kernel kills the process."
    from paddlevideo_nb.models.i3d import Unit3D
    network = jitter(Unit3D(3, 8, 3, 2), size=.3)
    x = paddle.randn([1, 3, 8, 12, 12])
    with paddle.no_grad(): expected = network(x).numpy()
    program, _ = save_static(network, tmp_path/"net", x)
    assert network.norm.weight is None and network.norm.bias is None
    assert difference(Predictor(program)([x.numpy()]), [expected]) < 1e-4


def test_lengths_and_none_pass(tmp_path, trusting):
    network, (rgb,) = small("AttentionCluster", 3)
    audio, lengths = None, paddle.to_tensor(np.array([rgb.shape[1], 5, 1]))
    quick = fast(network, patience=0.0)
    with paddle.no_grad():
        for given in (None, lengths):
            expected = network(rgb, audio, given).numpy()
            for _ in range(2): assert difference([quick(rgb, audio, given).numpy()], [expected]) < 1e-4
        shorter = paddle.to_tensor(np.array([2, 2, 2]))
        assert difference([quick(rgb, audio, shorter).numpy()], [network(rgb, audio, shorter).numpy()]) < 1e-4  # lengths are an input, not a constant


def test_a_smaller_last_batch(trusting):
    network, (image,) = small()
    quick = fast(network, patience=0.0)
    quick.patience, calls = 0.0, []
    with paddle.no_grad():
        quick(image)
        if not quick.built: pytest.skip(f"not built here: {quick.refused}")
        network.register_forward_pre_hook(lambda *args: calls.append(1))
        for n in (4, 3, 1):
            found = quick(image[:n])
            assert found.shape[0] == n and not calls
        del calls[:]
        assert difference([quick(image[1:3]).numpy()], [network(image[1:3]).numpy()]) < 1e-4
        quick(paddle.concat([image, image]))  # a larger one is another shape
        assert len(calls) >= 1


def test_waits_until_it_pays(trusting):
    network, (image,) = small()
    quick = FastNetwork(network, patience=1e9)
    with paddle.no_grad():
        for _ in range(3): quick(image)
        assert not quick.built and not quick.refused
        quick.patience = 0.0
        quick(image)
    assert quick.built or quick.refused


def test_other_methods_too(trusting):
    network, (image,) = small()
    quick = fast(network, patience=0.0)
    with paddle.no_grad():
        for method in ("features", "maps"):
            expected = getattr(network, method)(image).numpy()
            for _ in range(2): assert difference([getattr(quick, method)(image).numpy()], [expected]) < 1e-4
    assert {key[0] for key in [*quick.built, *quick.refused]} == {"features", "maps"} and quick.fc is network.fc and not hasattr(quick, "nothing")


def test_gradients_and_training_use_the_network():
    network, (image,) = small()
    quick = FastNetwork(network, patience=0.0)
    image.stop_gradient = False
    quick(image).sum().backward()
    assert not quick.built and float(image.grad.abs().sum()) > 0
    quick.train()
    with paddle.no_grad(): quick(image)
    assert network.training and not quick.built


def test_new_weights_after_training_count(trusting):
    network, (image,) = small()
    quick = FastNetwork(network, patience=0.0)
    with paddle.no_grad():
        before = quick(image).numpy()
        quick.train()
        network.fc.bias.set_value(network.fc.bias + 1)
        quick.eval()
        for _ in range(2): assert difference([quick(image).numpy()], [before + 1]) < 1e-4


def gradients(network, inputs):
    network.train()
    network(*inputs).square().mean().backward()
    found = [p.grad.numpy() for p in network.parameters() if not p.stop_gradient]
    network.clear_gradients()
    network.eval()
    return found


def test_training_afterwards_is_as_before(tmp_path):
    network, inputs = small(batch=8)
    before = gradients(network, inputs)
    Predictor(save_static(network, tmp_path/"net", *inputs)[0])([i.numpy() for i in inputs])
    assert all(np.array_equal(a, b) for a, b in zip(before, gradients(network, inputs), strict=True))


def test_no_program_means_the_dynamic_graph(monkeypatch, capfd):
    network, (image,) = small()
    monkeypatch.setattr(export, "save_static", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("no such\noperator")))
    quick = FastNetwork(network, patience=0.0)
    with paddle.no_grad():
        for _ in range(3): assert difference([quick(image).numpy()], [network(image).numpy()]) == 0
    said = capfd.readouterr().err
    assert said.count("stays in the dynamic graph") == 1 and "operator" in said


def test_where_onednn_fails_the_other_kernels_may_run(monkeypatch, capfd):
    network, (image,) = small()
    monkeypatch.setattr(export, "survives", lambda *args: "a trial run was killed by signal 11")
    made, init = [], Predictor.__init__
    monkeypatch.setattr(Predictor, "__init__", lambda self, program, precision="fp32", onednn=True: (made.append(onednn), init(self, program, precision, onednn))[1])
    quick = FastNetwork(network, patience=0.0)
    with paddle.no_grad():
        for _ in range(3): assert difference([quick(image).numpy()], [network(image).numpy()]) < 1e-4
    assert made == [False]  # a process that dies is not tried again here
    assert quick.built or "killed by signal 11" in capfd.readouterr().err
    brief = FastNetwork(network, "bf16")
    with paddle.no_grad(): brief(image)
    assert not brief.built and "killed by signal 11" in capfd.readouterr().err and made == [False]


def test_wrong_results_are_not_used(trusting, monkeypatch, capfd):
    network, (image,) = small()
    monkeypatch.setattr(Predictor, "__call__", lambda self, arrays, run=Predictor.__call__: [a*1.001 for a in run(self, arrays)])
    quick = FastNetwork(network, patience=0.0)
    with paddle.no_grad():
        for _ in range(2): assert difference([quick(image).numpy()], [network(image).numpy()]) == 0
    assert "the results differ by 1.0e-03" in capfd.readouterr().err


def test_a_slow_program_is_not_used(trusting, monkeypatch, capfd):
    def slowly(self, arrays, run=Predictor.__call__):
        time.sleep(0.5)
        return run(self, arrays)
    monkeypatch.setattr(Predictor, "__call__", slowly)
    network, (image,) = small()
    with paddle.no_grad():
        network(image)
        quick = FastNetwork(network, patience=0.0)
        quick(image)
    assert not quick.built and "where the dynamic graph needs" in capfd.readouterr().err


def test_a_trial_run_is_asked_for_once(tmp_path, monkeypatch):
    network, tensors = small("BsnPem", 2)
    arrays = [t.numpy() for t in tensors]
    program, _ = save_static(network, tmp_path/"net", *tensors)
    monkeypatch.setenv("PVNB_HOME", str(tmp_path/"home"))
    assert export.survives(program, "fp32", arrays) == ""
    monkeypatch.setattr(export, "_try_command", lambda *args: pytest.fail("asked again"))
    assert export.survives(program, "fp32", arrays) == ""
    program.write_bytes(program.read_bytes() + b" ")  # another program
    monkeypatch.setattr(export, "_try_command", lambda *args: ["python", "-c", "import os; os.kill(os.getpid(), 11)"])
    assert export.survives(program, "fp32", arrays) == "a trial run was killed by signal 11" == export.survives(program, "fp32", arrays)


def test_bfloat16(trusting, capfd):
    if not export.bf16_unit(): pytest.skip("this CPU multiplies no bfloat16")
    network, (image,) = small()
    quick = fast(network, "bf16")
    with paddle.no_grad():
        found, expected = quick(image).numpy(), network(image).numpy()
        if not quick.built: pytest.skip(f"not built here: {quick.refused}")
        assert 1e-6 < difference([found], [expected]) < 0.1 and quick.agreement == (int((found.argmax(1) == expected.argmax(1)).sum()), 4)
        assert difference([quick(image).numpy()], [found]) == 0
    assert "the best class is the same for" in capfd.readouterr().err


def test_bfloat16_elsewhere_is_float32(monkeypatch, capfd):
    monkeypatch.setattr(export, "bf16_unit", lambda: "")
    assert fast(create_model("BsnPem", "bsn_pem_mini"), "bf16").precision == "fp32" and "neither AMX nor AVX512-BF16" in capfd.readouterr().err


def test_choices():
    network = create_model("BsnPem", "bsn_pem_mini")
    assert fast(network, dynamic=True) is network
    for words, message in ((dict(precision="fp16"), "did you mean"), (dict(precision="bf16", dynamic=True), "dynamic=True")):
        with pytest.raises(PvnbError, match=message): fast(network, **words)


def test_exported_files(tmp_path):
    task, network = get_task("tsn_mini"), small()[0]
    record = export.export(task, network, tmp_path/"new", batch=3)
    written = json.loads((tmp_path/"new"/"TSN_export.json").read_text())
    assert written == record and written["inputs"] == {"image": ["float32", *example_inputs(task, 3)["image"].shape]} and written["outputs"] == [["float32", 3, 10]]
    x = np.random.default_rng(5).standard_normal(written["inputs"]["image"][1:], "float32")
    with paddle.no_grad(): expected = network(paddle.to_tensor(x)).numpy()
    assert difference(Predictor(tmp_path/"new"/record["program"])([x]), [expected]) < 1e-4
    if record["onnx"]: assert record["onnx_difference"] < 1e-4 and (tmp_path/"new"/"TSN.onnx").is_file()
    else: assert record["onnx_missing"].startswith("no ONNX: ") and "\n" not in record["onnx_missing"]


def test_a_failed_conversion_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_CONVERT", "raise ValueError('operator x is not supported')")
    with pytest.raises(PvnbError, match="^no ONNX: the conversion failed: ValueError: operator x is not supported$"):
        export.save_onnx(tmp_path/"net.json", tmp_path/"net.onnx", {}, [])
    assert not list(tmp_path.iterdir())


def test_wrong_program_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "__call__", lambda self, arrays, run=Predictor.__call__: [a*1.001 for a in run(self, arrays)])
    with pytest.raises(PvnbError, match="differ by 1.0e-03"): export.export(get_task("tsn_mini"), small()[0], tmp_path/"new", onnx=False)
    assert not (tmp_path/"new").exists()


def test_unknown_shapes():
    class Task: name = "XYZ"
    with pytest.raises(PvnbError, match="example"): example_inputs(Task())
    Task.example = lambda self, batch: {"x": np.zeros((batch, 2), "float32")}
    assert example_inputs(Task(), 3)["x"].shape == (3, 2)


def test_eval_is_the_same_either_way(tmp_path, mini, monkeypatch):
    "The command with programs and without; bf16 where the CPU has it."
    monkeypatch.setattr("paddlevideo_nb.evaluate.fast", lambda network, precision, dynamic: fast(network, precision, dynamic, patience=0.0))
    save_weights(tmp_path/"w.safetensors", {k: v.numpy() for k, v in small()[0].state_dict().items()})
    words = ["eval", "TSN", "--config", "tsn_mini", f"weights={tmp_path}/w.safetensors", f"filelist={mini}/moments/val.txt", f"--save_dir={tmp_path}", "--workers=0"]
    results = {}
    for more in ("dynamic=True", "dynamic=False", "precision=bf16"):
        with contextlib.redirect_stdout(io.StringIO()): assert main([*words, more]) == 0
        results[more] = json.loads((tmp_path/"TSN_metrics.json").read_text())
    assert results["dynamic=True"]["top1"] == results["dynamic=False"]["top1"] and abs(results["dynamic=True"]["loss"] - results["dynamic=False"]["loss"]) < 1e-3
    assert abs(results["dynamic=True"]["top5"] - results["precision=bf16"]["top5"]) < 0.1
