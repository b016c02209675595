"""What went wrong, for programs too; odd streams, empty values, long names; what lies where a bundle should."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cm_export.base import environment
from cm_export.base.errors import BundleError, InputError
from cm_export.base.units import size
from cm_export.bundle import not_a_bundle
from cm_export.cli import main, tables
from cm_export.cli.console import emit_json

COMMAND = (sys.executable, "-c", "import sys; from cm_export.cli import main; sys.exit(main())")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """fails(error): exit code, stdout as JSON (None if empty) and stderr of `inspect --json` when that is raised in it."""

    def run(error: BaseException | None, *args: str, printed: object = None) -> tuple:
        def describe(_path):
            if printed:
                emit_json(printed)
            if error:
                raise error
            return {"a": 1}

        module = ModuleType("cm_export.bundle.inspect")
        module.describe = describe
        monkeypatch.setitem(sys.modules, "cm_export.bundle.inspect", module)
        code = main(["inspect", str(tmp_path), *args])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


# ---------------------------------------------------------------- errors


def test_with_json_an_error_is_an_object_and_the_line_stays(fails):
    code, out, err = fails(BundleError("edited", where=Path("b"), fix="build again"), "--json")
    assert out == {"error": {"what": "edited", "where": "b", "fix": "build again", "exit_code": 2}} and code == 2
    assert err == "cm-export: error: b: edited; build again\n"
    assert fails(BundleError("edited"))[1] is None, "without --json stdout stays empty"
    assert fails(None, "--json")[:2] == (0, {"a": 1})


@pytest.mark.parametrize(
    ("error", "what", "code"),
    [
        (ZeroDivisionError("x"), "ZeroDivisionError: x", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (MemoryError(), "out of memory", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk", 1),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "permission denied", 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "f" * 300), "file name too long", 2),
        (OSError(errno.EIO, "Input/output error", "f"), "input/output error", 1),
    ],
)
def test_every_kind_of_error_has_its_object(fails, error, what, code):
    found, out, err = fails(error, "--json")
    assert (found, out["error"]["what"], out["error"]["exit_code"]) == (code, what, code)
    assert err.count("\n") == 1 and ("bug" in err) == isinstance(error, ZeroDivisionError)


def test_a_disk_or_memory_that_ended_gives_1_whatever_was_made_of_it(fails):
    full = caused(InputError("cannot be written", where="f"), OSError(errno.ENOSPC, "No space left on device"))
    assert fails(full)[0] == 1
    assert fails(caused(InputError("outer"), full))[0] == 1
    assert fails(caused(InputError("x"), MemoryError()))[0] == 1
    assert fails(caused(InputError("x"), PermissionError(errno.EACCES, "no")))[0] == 2


@pytest.mark.parametrize("args", [["run", "none.plan", "-p", "x"], ["nope"], ["build"], ["inspect", "--nope"], ["run"]])
def test_what_click_refuses_is_an_object_too(args, capsys):
    assert main([*args, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"what", "where", "fix", "exit_code"} and error["exit_code"] == 2 and error["fix"]
    assert err.count("\n") == 1


def test_stdout_holds_one_object_where_the_result_was_printed_before_the_error(fails):
    code, out, err = fails(InputError("none holds"), "--json", printed={"refusal": "none holds"})
    assert (code, out) == (2, {"refusal": "none holds"}) and "none holds" in err


# ---------------------------------------------------------------- streams


def shell(line: str, *args: object) -> subprocess.CompletedProcess:
    """A line of sh in which "$@" is cm-export with these arguments."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60
    )


def test_a_closed_stdout_is_told_and_no_bug():
    done = shell('exec "$@" >&-', "doctor")
    assert done.returncode == 2 and done.stderr == (
        "cm-export: error: stdout: is closed, so there is no place for the result; send it to /dev/null\n"
    )


def test_a_closed_stderr_sends_nothing_to_stdout():
    done = shell('exec "$@" 2>&-', "inspect", "none.plan")
    assert (done.returncode, done.stdout) == (2, "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os, sys; from cm_export.cli import streams; streams.open_all();"
        "sys.exit(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) < 3)"
    )
    line = '"$@" <&- 2>&-'
    args = [sys.executable, "-c", code, str(tmp_path / "f")]
    assert subprocess.run(["sh", "-c", line, "sh", *args], capture_output=True, timeout=60).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_one_line(flag):
    done = shell('exec "$@" >/dev/full', "doctor", *flag)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no space left" in done.stderr


def test_a_chat_without_stdin_is_refused(tmp_path, monkeypatch, capsys):
    from cm_export.cli.verbs import run

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no stdin"):
        next(run._questions())


def test_tables_in_a_pipe_end_without_blanks(capsys):
    tables.print_rows(
        {"rows": [{"a": "x", "b": "long enough"}, {"a": "long enough", "b": "y"}], "notes": ["n"]}, "title"
    )
    out = capsys.readouterr().out
    assert "long enough\n" in out and not [line for line in out.splitlines() if line.endswith(" ")]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["build", "--model", "demo", "--out", ""], "--out"),
        (["build", "--model", "", "--out", "o"], "--model"),
        (["run", "", "-p", "x"], "BUNDLE"),
        (["run", "x.plan", "-p", "x", "--image", ""], "--image"),
        (["eval", "x.plan", "--data="], "--data"),
        (["report", "x.plan", "--eval", ""], "--eval"),
    ],
)
def test_an_empty_value_is_no_path_and_no_name(args, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cm-export: error: {name}: is empty; give a value") and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "{name}"],
        ["build", "--model", "demo", "--out", "{name}"],
        ["build", "--model", "demo", "--out", "x.plan", "--recipe", "{name}.toml"],
        ["build", "--model", "./{name}", "--out", "x.plan"],
    ],
)
def test_a_name_that_no_file_can_have_is_told(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([a.format(name="x" * 260) for a in args]) == 2
    err = capsys.readouterr().err
    assert "bug" not in err and "Traceback" not in err and err.count("\n") == 1 and not os.listdir(tmp_path)


def test_a_name_has_room_for_the_temporary_one(tmp_path):
    from cm_export.bundle.directory import assemble, check_out
    from cm_export.host.overlay import check_output

    longest = tmp_path / ("x" * 200)
    check_out(longest)
    with assemble(longest) as folder:
        (folder / "f").touch()
    assert longest.is_dir()
    with pytest.raises(InputError, match="bytes long"):
        check_out(tmp_path / ("x" * 201))
    with pytest.raises(InputError, match="bytes long"):
        check_output(tmp_path / ("é" * 100 + ".json"), (".json",))


def test_few_bytes_are_not_told_as_0_gb():
    assert [size(n) for n in (0, 999, 36_400_000, 8e9)] == ["0 B", "999 B", "36.4 MB", "8.0 GB"]


# ---------------------------------------------------------------- processors


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "", 8),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"cpu.max": "10000 100000"}, "0::/", 1),
        ({"cpu.max": "300000 100000"}, "0::/docker/abc", 3),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/x\n1:cpuset:/", 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", 8),
        ({"cpu.max": "nonsense"}, "0::/", 8),
    ],
)
def test_a_container_allows_fewer_processors(files, own, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own)
    assert environment.processors(tmp_path / "groups", tmp_path / "own") == expected


def test_no_more_threads_are_used_than_processors_and_it_is_said(monkeypatch):
    monkeypatch.setattr(environment, "processors", lambda: 4)
    assert [environment.usable(n) for n in (0, 3, 1000)] == [0, 3, 4]
    assert (
        environment.threads_note(3) == [] and "1000 threads were asked, 4 are used" in environment.threads_note(1000)[0]
    )
    assert environment.describe(1000, {})["threads"] == 4
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 2)
    assert environment.default_threads() == 2


def test_sessions_get_the_threads_that_are_allowed(demo_bundle, monkeypatch):
    import onnxruntime

    from cm_export.bundle.bundle import Bundle
    from cm_export.host.runner import Runner

    seen, made = [], onnxruntime.InferenceSession
    monkeypatch.setattr(environment, "processors", lambda: 1)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda m, o, **k: seen.append(o.intra_op_num_threads) or made(m, o, **k)
    )
    for threads in (0, 1000):
        runner = Runner(Bundle(demo_bundle), threads)
        runner.backend.ready("decode")
    assert seen == [1, 1] and runner.backend.notes


# ---------------------------------------------------------------- what is no bundle


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with a bundle (as far as a look from outside goes), an archive, an unpacked one, a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo.plan/processor", "unpacked", "checkpoint", "empty"):
        Path(name).mkdir(parents=True)
    Path("demo.plan/manifest.json").write_text('{"seal": ""}')
    Path("demo.plan/processor/tokenizer.json").touch()
    Path("unpacked/manifest.json").write_text('{"format": 1, "probes": {}}')
    for name in ("unpacked/build_on_device.sh", "demo-orin.tar.gz", "notes.txt"):
        Path(name).touch()
    Path("checkpoint/config.json").write_text("{}")
    Path("link").symlink_to("gone")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("dmeo.plan", "no such bundle; did you mean demo.plan?"),
        ("other", "no such bundle; check the path, or make one with `cm-export build --model MODEL --out PATH`"),
        ("nowhere/demo.plan", "no directory nowhere"),
        ("link", "a link to gone, which is not there"),
        ("demo.plan/manifest.json", "not a bundle: it is a file of one; give the directory"),
        ("demo.plan/processor/tokenizer.json", "not a bundle: it is a file of one; give the directory"),
        ("demo-orin.tar.gz", "not a bundle: it is a file, an archive for a device; unpack it there"),
        ("unpacked", "not a bundle: it is an unpacked archive for a device; run its script"),
        ("checkpoint", "not a bundle: it is a checkpoint; build it first: cm-export build --model checkpoint"),
        ("notes.txt", "not a bundle: it is a file; give a directory"),
        ("empty", "not a bundle (no manifest.json)"),
        (".", "it holds demo.plan: give one of these"),
    ],
)
def test_what_lies_in_place_of_a_bundle_is_named(places, path, words, capsys):
    assert main(["run", path, "-p", "x", "-q"]) == 2
    err = capsys.readouterr().err
    assert words in err and "KeyError" not in err and "--model demo" not in err and err.count("\n") == 1
    assert not not_a_bundle.may_be(Path(path))
