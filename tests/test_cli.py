"""The command `pvnb`: dispatch, errors, exit codes, speed, and the doctor."""
import ast
import os
import re
import subprocess
import sys
import time
import types

import pytest

from paddlevideo_nb import cli
from paddlevideo_nb.core import PvnbError


def pvnb(*argv, before="", **options):
    "Run the command in a process of its own."
    code = f"import sys\n{before}\nfrom paddlevideo_nb.cli import main\nsys.exit(main({list(argv)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def use(monkeypatch, function):
    "Put `function` behind `pvnb doctor`."
    module = types.ModuleType("paddlevideo_nb.fake")
    module.run = function
    monkeypatch.setitem(sys.modules, "paddlevideo_nb.fake", module)
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("fake", "run", "a stand-in"))


def test_help_is_quick_and_loads_nothing_heavy(repo):
    best = 9
    for _ in range(3):
        start = time.perf_counter()
        done = pvnb("--help", cwd=repo)
        best = min(best, time.perf_counter() - start)
    assert done.returncode == 0 and "reproduce" in done.stdout and not done.stderr
    assert best < 0.5, f"pvnb --help took {best:.2f} s"


def test_help_names_every_command_and_no_more():
    listed = re.findall(r"^  (\w+(?: \w+)?)  ", cli.usage(), re.M)
    assert listed == list(cli.COMMANDS)


def test_every_command_exists(repo):
    for name, (module, function, _) in cli.COMMANDS.items():
        path = repo / "paddlevideo_nb" / f"{module.replace('.', '/')}.py"
        assert path.is_file(), f"pvnb {name}: {path.name} is not there"
        tree = ast.parse(path.read_text())
        assert function in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], f"pvnb {name}: no {function}"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, repo):
    done = pvnb(*name.split(), "--help", cwd=repo)
    assert done.returncode == 0 and "usage: pvnb" in done.stdout, done.stderr


def test_no_command_prints_help_and_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "usage: pvnb" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"paddlevideo_nb \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("argv, said", [(["trian"], "did you mean 'train'?"), (["data", "kinetic"], "did you mean 'data kinetics'?"), (["data"], "data mini")])
def test_unknown_command_names_the_nearest(argv, said, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("pvnb: error: ") and said in err and err.count("\n") == 1


def test_exit_code_of_a_command_is_passed_on(monkeypatch):
    seen = []
    use(monkeypatch, lambda argv: seen.append(argv) or 3)
    assert cli.main(["doctor", "a", "--b"]) == 3 and seen == [["a", "--b"]]
    use(monkeypatch, lambda argv: None)
    assert cli.main(["doctor"]) == 0


def raising(error):
    def run(argv):
        raise error
    return run


def test_mendable_errors_are_one_line(monkeypatch, capsys):
    use(monkeypatch, raising(PvnbError("list file not found: a.list")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "pvnb: error: list file not found: a.list\n"
    use(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_missing_paddle_is_one_line_and_other_modules_are_not_hidden(monkeypatch, capsys):
    use(monkeypatch, raising(ModuleNotFoundError("No module named 'paddle'", name="paddle")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"pvnb: error: {cli.NO_PADDLE}\n"
    use(monkeypatch, raising(ModuleNotFoundError("No module named 'colour'", name="colour")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_a_bug_keeps_its_traceback(repo):
    done = pvnb("doctor", before="import paddlevideo_nb.cli as c\nc.doctor_command = lambda argv: 1 / 0", cwd=repo)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_closed_pipe_is_quiet(repo):
    code = ("import sys, paddlevideo_nb.cli as c\n"
            "def chatter(argv):\n    for i in range(100000): print('line', i)\n"
            "c.doctor_command = chatter\nsys.exit(c.main(['doctor']))")
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=repo)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141 and err == ""


# --- the doctor


@pytest.fixture
def well(monkeypatch):
    "Every needed check passes, whatever this machine lacks; a test then breaks one."
    monkeypatch.setattr(cli, "check_paddle", lambda: ("paddlepaddle 9.9", ""))
    monkeypatch.setattr(cli, "check_gpu", lambda: ("none", "buy one"))


def test_doctor_is_content_where_only_optional_things_lack(well, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "All that is needed is here" in out and "GPU: buy one" in out
    for check in ("Python", "PaddlePaddle", "threads", "decode H.264", "decode AV1", "encode H.264", "cache folder", "data folder", "golden data"):
        assert f"| {check} " in out


def test_doctor_says_what_to_install_without_paddle(repo):
    hide = "import importlib.metadata as m\nv = m.version\ndef version(n):\n    if n.startswith('paddlepaddle'): raise m.PackageNotFoundError(n)\n    return v(n)\nm.version = version\nsys.modules['paddle'] = None"
    done = pvnb("doctor", before=hide, cwd=repo)
    assert done.returncode == 1 and not done.stderr
    assert re.search(r"\| PaddlePaddle +\| yes +\| gap +\| not installed", done.stdout)
    assert "pip install 'paddlevideo_nb[cpu]'" in done.stdout and done.stdout.endswith("Missing: PaddlePaddle\n")


def test_doctor_sees_two_paddles(monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda name: "2.6.2")
    assert "overwrite each other" in cli.check_paddle()[1]


def test_doctor_sees_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(cli.cpu_count()))
    assert cli.check_threads()[1] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", str(cli.cpu_count() + 1))
    assert "export OMP_NUM_THREADS" in cli.check_threads()[1]


def test_doctor_sees_a_folder_that_cannot_be_written(tmp_path, monkeypatch, well, capsys):
    (tmp_path / "file").write_text("not a folder")
    found, todo = cli.check_folder(tmp_path / "file" / "cache")
    assert "cannot be written" in found and "PVNB_HOME" in todo
    monkeypatch.setenv("PVNB_HOME", str(tmp_path / "file"))
    assert cli.main(["doctor"]) == 1
    assert "Missing: cache folder" in capsys.readouterr().out


def test_doctor_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PVNB_GOLDEN", raising=False)
    assert cli.check_notebooks()[1] and cli.check_golden()[1]
