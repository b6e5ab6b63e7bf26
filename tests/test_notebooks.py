"""The notebooks: they are the package, they are clean, they keep to their form, and they run."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from paddlevideo_nb.house import imports, readme_text, wrong_imports

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and not p.name.endswith(".tmp.ipynb"))
PAPERS = [p for p in NOTEBOOKS if p.parent.name == "papers"]
OTHERS = [p for p in NOTEBOOKS if p.parent.name in ("foundations", "system", "guides")]


def named(path):
    return str(path.relative_to(REPO / "nbs"))


def cells(path, kind=None):
    "[(cell type, source, cell)] of a notebook."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"]), c) for c in found if kind in (None, c["cell_type"])]


def prose(path):
    return "\n".join(source for _, source, _ in cells(path, "markdown"))


def tree(folder):
    "{relative path: bytes} of the files below a folder, without byte code."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The checkout as git would have it (tracked files, and new ones that are not ignored), copied to a temporary folder."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, check=True).stdout
    target = tmp_path_factory.mktemp("copy")
    for name in filter(None, listed.decode().split("\0")):
        if (REPO / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)
    return target


def tool(name, *arguments, cwd):
    "Run one of nbdev's commands, which lie beside this Python, on a copy of the checkout."
    env = {**os.environ, "PYTHONPATH": str(cwd)}
    done = subprocess.run([Path(sys.executable).parent / name, *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


# --- the package is what the notebooks say


def test_package_and_notebooks_agree(copy):
    committed = tree(copy / "paddlevideo_nb")
    for path in (copy / "paddlevideo_nb").rglob("*.py"):
        path.unlink()  # an orphan, which no notebook exports any more, does not come back
    (copy / "paddlevideo_nb" / "__init__.py").write_bytes(committed["__init__.py"])  # holds the version; nbdev only amends it
    tool("nbdev_export", cwd=copy)
    exported = tree(copy / "paddlevideo_nb")
    orphans = sorted(set(committed) - set(exported))
    missing = sorted(set(exported) - set(committed))
    changed = sorted(n for n in set(committed) & set(exported) if committed[n] != exported[n])
    assert not (orphans or missing or changed), f"run nbdev_export; without a notebook: {orphans}, not exported: {missing}, not as their notebook: {changed}"


def test_readme_is_the_index_notebook():
    assert (REPO / "README.md").read_text(encoding="utf-8") == readme_text(REPO), "run python -m paddlevideo_nb.house"


def test_imports_run_one_way():
    assert wrong_imports(imports(REPO / "paddlevideo_nb")) == []


# --- the README


def test_readme_opens_with_the_two_commands():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```bash\n(.*?)\n```", text, re.M | re.S)[:2]
    assert first.endswith("pvnb reproduce") and second.endswith("pytest -q tests")
    assert text.index(first) < text.index(second) < text.index("\n## "), "the commands come before the first section"


def test_readme_tells_the_state_of_the_lessons():
    rows = re.findall(r"^\| .*? \| .*? \| `.*?` \| (.*?) \|$", (REPO / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 12
    linked = {match[1] for row in rows if (match := re.search(r"\((.*?)\)", row))}
    assert all(row == "planned" or "(" in row for row in rows)
    assert linked == {f"nbs/papers/{p.name}" for p in PAPERS}


def test_links_lead_somewhere():
    for page in (REPO / "README.md", REPO / "data" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target} is not there"


# --- every notebook is clean


def test_nbdev_clean_changes_nothing(copy):
    before = tree(copy / "nbs")
    tool("nbdev_clean", cwd=copy)
    after = tree(copy / "nbs")
    assert [n for n in before if before[n] != after[n]] == [], "run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_outputs_are_fit_to_be_kept(path):
    assert path.stat().st_size < 3_000_000
    for number, (_, _, cell) in enumerate(cells(path, "code")):
        where = f"code cell {number}"
        assert cell["execution_count"] is None, f"{where} has an execution count"
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"{where} ended in an error"
            assert output.get("execution_count") is None, f"{where}: an output has an execution count"
            for picture in (v for k, v in output.get("data", {}).items() if k.startswith("image/png")):
                assert len("".join(picture)) * 3 / 4 < 150 * 1024, f"{where}: a picture of more than 150 KB"


MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|farm|var/folders|home/\w+|Users/\w+)/[\w.]")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_no_machine_paths(path):
    for _, source, cell in cells(path):
        shown = [v for o in cell.get("outputs", []) for k, v in [("text", o.get("text", "")), *o.get("data", {}).items()] if not k.startswith("image/")]
        text = source + "".join("".join(v) if isinstance(v, list) else str(v) for v in shown)
        found = MACHINE_PATH.search(text)
        assert not found, f"a path of one machine: {text[max(0, found.start() - 40):found.end() + 60]!r}"


def test_machine_paths_are_recognised():
    assert all(MACHINE_PATH.search(f"saved to {'/'.join(['', *parts])}") for parts in (("tmp", "x.png"), ("root", ".cache"), ("home", "me", "a")))
    assert not MACHINE_PATH.search("nbs/work/a") and not MACHINE_PATH.search("~/tmp/a") and not MACHINE_PATH.search("a/tmp/b")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_code_cells_are_short(path):
    long = {i: n for i, (_, source, _) in enumerate(cells(path, "code")) if (n := len([line for line in source.splitlines() if line.strip()])) > 40}
    assert not long, f"code cells (number: lines) of more than 40: {long}"


# --- the form of a paper notebook


@pytest.mark.parametrize("path", PAPERS, ids=named)
def test_paper_notebook_has_its_parts(path):
    text = prose(path)
    assert len(text) >= 5000, f"only {len(text)} characters of prose"
    assert "导读" in text and len(re.findall(r"[\u4e00-\u9fff]", text)) >= 80, "no Chinese reading guide"
    tagged = [source for _, source, cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells tagged parameters"
    for name in ("mode", "seed", "weights", "data_root", "out"):
        assert re.search(rf"^{name}\s*=", tagged[0], re.M), f"no parameter {name}"
    assert len(re.findall(r"<details", text)) >= 3, "fewer than 3 folded solutions"
    assert re.search(r"^record\(", "\n".join(source for _, source, _ in cells(path, "code")), re.M), "no record(...)"


def equations(path):
    "(numbers in the prose, numbers in `# Eq. n` comments) of a notebook, as sets of str."
    number = r"Eqs?\.\s*\(?([A-Z]?\d+[a-z]?)\)?"
    comments = "\n".join(line[line.index("#"):] for _, source, _ in cells(path, "code") for line in source.splitlines() if re.search(r"#.*Eq", line))
    return set(re.findall(number, prose(path))), set(re.findall(number, comments))


@pytest.mark.parametrize("path", PAPERS, ids=named)
def test_equations_stand_in_prose_and_code(path):
    written, coded = equations(path)
    assert written and written == coded, f"in the prose only: {sorted(written - coded)}, in the code only: {sorted(coded - written)}"


# --- every notebook runs


TIMED = {"bench", "benchmark", "training_speed", "what_an_epoch_costs"}  # they compare speeds


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.alone) if p.stem in TIMED else p for p in OTHERS], ids=named)
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    command = [sys.executable, "-m", "papermill", path, tmp_path/path.name, "--cwd", REPO, "--no-progress-bar", "--execution-timeout", "600"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}, timeout=1200)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).splitlines()[-25:]
    assert done.returncode == 0, "\n".join([f"exit status {done.returncode}", *said])


def test_no_two_notebooks_export_the_same_module():
    exported = Counter(m for p in NOTEBOOKS for _, source, _ in cells(p, "code") for m in re.findall(r"^#\| default_exp (\S+)", source, re.M))
    assert [m for m, n in exported.items() if n > 1] == []
