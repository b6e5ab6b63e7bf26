"""What several tests need: the checkout, the recordings of the original program, the mini world."""
from pathlib import Path

import pytest

from paddlevideo_nb.core import golden_dir


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs notebooks or makes an environment; -m 'not slow' is the fast part")


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
