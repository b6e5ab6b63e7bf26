"The names of the original: every tensor has one, and only one."
import json

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, import_paddle
from paddlevideo_nb.layers.naming import named, named_batch_norm, original_names

nn = import_paddle().nn


def test_named_returns_the_layer_and_adds_up():
    layer = nn.Linear(2, 3)
    assert named(named(layer, weight="w"), bias="b") is layer
    assert original_names(layer) == {"weight": "w", "bias": "b"}


def test_batch_norm():
    assert original_names(named_batch_norm(nn.BatchNorm3D(2), "bn2a_branch1")) == {
        "weight": "bn2a_branch1_scale", "bias": "bn2a_branch1_offset", "_mean": "bn2a_branch1_mean", "_variance": "bn2a_branch1_variance"}


def test_shared_layers_and_shared_tensors():
    head = named(nn.Linear(2, 2), weight="w", bias="b")
    assert original_names(nn.LayerList([head, head])) == {"0.weight": "w", "0.bias": "b", "1.weight": "w", "1.bias": "b"}
    other = named(nn.Linear(2, 2), weight="w", bias="b2")
    other.weight = head.weight
    assert original_names(nn.Sequential(head, other)) == {"0.weight": "w", "0.bias": "b", "1.weight": "w", "1.bias": "b2"}


def test_state_that_the_original_lacks():
    net = named(nn.Linear(2, 2, bias_attr=False), weight="w")
    net.register_buffer("seen", import_paddle().zeros([1]))
    with pytest.raises(PvnbError, match=r"no original name for seen \(1 in all\)"):
        original_names(net)
    assert original_names(named(net, seen=None)) == {"weight": "w"}


def test_buffers_that_are_not_saved_need_no_name():
    net = named(nn.Linear(2, 2, bias_attr=False), weight="w")
    net.register_buffer("grid", import_paddle().zeros([1]), persistable=False)
    assert original_names(net) == {"weight": "w"}


@pytest.mark.parametrize("names, text", [
    ({"weight": "w"}, r"no original name for 0.bias \(1 in all\)"), ({"weight": "w", "bias": "w"}, "0.weight and 0.bias are both called 'w'"),
    ({"weight": "w", "bias": "b", "wieght": "w"}, "names 'wieght' 'w', but has no such tensor")])
def test_faults_are_named(names, text):
    with pytest.raises(PvnbError, match=text):
        original_names(nn.Sequential(named(nn.Linear(2, 2), **names)))


def test_one_tensor_with_two_names():
    a, b = (named(nn.Linear(2, 2, bias_attr=False), weight=n) for n in ("u", "v"))
    b.weight = a.weight
    with pytest.raises(PvnbError, match="1.weight is called both 'u' and 'v'"):
        original_names(nn.Sequential(a, b))


def test_tsn_has_the_names_and_shapes_of_the_recorded_program(repo):
    from paddlevideo_nb.config import load_config
    from paddlevideo_nb.tasks import get_task
    case = json.loads((repo/"tests"/"golden"/"tsn"/"reduced.json").read_text())
    config = load_config("tsn", **{f"{section}.{key}": value for section, keys in case["overrides"].items() for key, value in keys.items()})
    network = get_task(config).network()
    state = network.state_dict()
    found = {name: list(state[key].shape) for key, name in original_names(network).items()}
    assert found == {p["name"]: p["shape"] for p in case["parameters"]}
    assert np.prod(found["conv1_weights"]) == state[next(k for k, n in original_names(network).items() if n == "conv1_weights")].size
