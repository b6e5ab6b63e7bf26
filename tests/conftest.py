"""What several tests need: a core for each process that runs them, the checkout, the recordings of the original program, the mini world."""
import fcntl
import os
from pathlib import Path

import pytest

from paddlevideo_nb.core import cpu_count, environment, golden_dir

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...; '' where one process runs all tests
if WORKER and CORES:  # before Paddle is imported: each process, and what it starts, keeps to a core of its own
    os.sched_setaffinity(0, {sorted(CORES)[int(WORKER[2:]) % len(CORES)]})
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs notebooks or makes an environment; -m 'not slow' is the fast part")
    config.addinivalue_line("markers", "alone: compares speeds, so it has all cores to itself")


def pytest_xdist_auto_num_workers(config):
    return cpu_count()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "What takes longest comes first, so that no core ends up idle, and what has to wait for the others last. The quick tests of a file share what it sets up, so they stay together."
    def place(item): return 2 if item.get_closest_marker("alone") else 0 if item.get_closest_marker("slow") else 1
    items.sort(key=place)
    for item in items:
        if place(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem + " alone"*(place(item) == 2)))


@pytest.fixture(autouse=True)
def room(request, tmp_path_factory):
    "Where several processes run tests: a test marked `alone` waits until the others have none, and they wait for it."
    if not WORKER or not CORES:
        yield
        return
    alone, own = request.node.get_closest_marker("alone"), os.sched_getaffinity(0)
    with open(tmp_path_factory.getbasetemp().parent/"room", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)  # held until the file is closed
        os.sched_setaffinity(0, CORES if alone else own)
        with environment(OMP_NUM_THREADS=str(cpu_count())):  # of what the test starts
            yield
        os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def repo():
    "The checkout that these tests belong to (Path)."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden():
    "The folder of golden cases (Path); skips where it is missing."
    found = golden_dir()
    if found is None:
        pytest.skip("no golden data: neither $PVNB_GOLDEN nor ../shared/golden nor tests/golden holds any")
    return found


@pytest.fixture(scope="session")
def mini():
    "The clips of the digit theatre, made where they are not there yet: what `theatre.make_clips` returns."
    from paddlevideo_nb.datasets.theatre import make_clips

    return make_clips()


@pytest.fixture(scope="session")
def features():
    "The feature sets of the digit theatre, made where they are not there yet: their folder (Path)."
    from paddlevideo_nb.datasets.features import make_features

    return make_features(progress=False)
