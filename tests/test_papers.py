"""Every paper notebook through the command that the README names: its claims hold, and its figures stay near their baselines."""
import csv

import pytest

from paddlevideo_nb.cli import main
from paddlevideo_nb.core import repo_dir

PAPERS = sorted(p.stem for p in (repo_dir()/"nbs"/"papers").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_reproduces(paper, tmp_path):
    code = main(["reproduce", paper, "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path/"results.csv").open()))
    assert rows and all(row["verdict"] == "ok" for row in rows), rows
    assert code == 0
