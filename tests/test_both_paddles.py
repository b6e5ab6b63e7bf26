"""The other Paddle: 2.6.2 is the newest that PyPI has for GPUs. The recordings of the original must agree on it too."""
import os
import shutil
import subprocess
import sys
import venv

import pytest

from paddlevideo_nb.core import import_paddle, repo_dir

OTHER = "2.6.2"


@pytest.fixture(scope="session")
def other_pvnb(tmp_path_factory):
    "The command `pvnb` of a fresh virtual environment with the other Paddle (Path); skips where no package index can be reached."
    if import_paddle().__version__ == OTHER:
        pytest.skip(f"this is Paddle {OTHER}")
    folder = tmp_path_factory.mktemp("other")/"venv"
    venv.create(folder, with_pip=True)
    words = [folder/"bin"/"python", "-m", "pip", "install", "-q", "-e", repo_dir(), f"paddlepaddle=={OTHER}", "numpy<2"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and ("Could not find a version" in done.stderr or "connection" in done.stderr.lower()):
        pytest.skip(f"no Paddle {OTHER}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder/"bin"/"pvnb"


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason=f"there is no Paddle {OTHER} for this Python")
def test_parity_on_the_other_paddle(other_pvnb, golden, tmp_path):
    "All processing, and every network at reduced size; the published sizes take minutes and say no more of the framework."
    cases = shutil.copytree(golden, tmp_path/"golden", ignore=shutil.ignore_patterns("published.*"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    version = subprocess.run([other_pvnb.with_name("python"), "-c", "import paddle; print(paddle.__version__)"], capture_output=True, text=True, env=env)
    assert version.stdout.strip() == OTHER, version.stderr
    done = subprocess.run([other_pvnb, "parity", cases], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " ok" in done.stdout and "FAIL" not in done.stdout
