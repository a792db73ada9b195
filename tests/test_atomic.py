"""Saving files that belong together: whenever the process dies, the last complete set is there."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fused_lora import atomic
from fused_lora.atomic import write_directory

NAMES = ("adapter_config.json", "adapter_model.safetensors")
KILLS = 60
posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")

# run without importing torch, which would take seconds per process
PRELUDE = f"""
import importlib.util, itertools, os, signal, sys
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)

def save(directory, number, sizes=(7, 20_000)):
    files = {{n: b"%08d" % number * s for n, s in zip({NAMES!r}, sizes)}}
    atomic.write_directory(directory, files)

def saved(directory):
    numbers = set()
    for name in {NAMES!r}:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                content = file.read()
            assert content == content[:8] * (len(content) // 8), "a torn file"
            numbers.add(int(content[:8]))
        else:
            numbers.add(None)
    assert len(numbers) == 1, f"files of different saves: {{numbers}}"
    return numbers.pop()
"""


@pytest.fixture
def saved():
    reader = {}
    exec(PRELUDE, reader)
    return reader["saved"]


def program(body: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", PRELUDE + textwrap.dedent(body)]


def contents(folder: Path) -> dict[str, bytes]:
    assert not any(path.is_symlink() for path in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_missing_directory_is_made_and_holds_the_plain_files_alone(tmp_path):
    folder = tmp_path / "a" / "b"
    for files in ({"one": b"1", "two": b""}, {"two": b"22", "one": b"11"}):
        write_directory(folder, files)
        assert contents(folder) == files


def test_what_else_is_in_the_directory_stays(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "one").write_bytes(b"old")
    write_directory(tmp_path, {"one": b"new", "two": b"2"})
    assert contents(tmp_path) == {"optimizer.pt": b"state", "one": b"new", "two": b"2"}


def test_a_name_that_was_a_link_becomes_a_file_and_its_target_is_not_written_to(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "one").symlink_to(blob)
    write_directory(folder, {"one": b"own"})
    assert contents(folder) == {"one": b"own"} and blob.read_bytes() == b"shared"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".saving"])
def test_a_name_leading_elsewhere_is_refused_unwritten(tmp_path, name):
    with pytest.raises(ValueError, match=r"is not the name of a file in .*give plain names"):
        write_directory(tmp_path / "folder", {"one": b"1", name: b"2"})
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("failing", ["write", "switch"])
def test_a_save_that_fails_leaves_the_old_files_and_nothing_beside_them(
    tmp_path, monkeypatch, failing
):
    old = {"one": b"1", "two": b"2"}
    write_directory(tmp_path, old)
    calls, replace = [], os.replace

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            full()
        replace(source, target)

    if failing == "write":
        monkeypatch.setattr(atomic.os, "fsync", full)
        monkeypatch.setattr(atomic, "_sync", lambda path: None)
    else:
        monkeypatch.setattr(atomic.os, "replace", second_fails)
    with pytest.raises(OSError, match="No space left"):
        write_directory(tmp_path, {"one": b"11", "two": b"22"})
    assert contents(tmp_path) == old


@pytest.mark.parametrize("missing", ["symlink", "link"])
def test_file_systems_without_links_get_the_files_too(tmp_path, monkeypatch, missing):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    write_directory(tmp_path, {"one": b"1", "two": b"2"})
    monkeypatch.setattr(atomic.os, missing, refuse)
    write_directory(tmp_path, {"one": b"11", "two": b"22"})
    assert contents(tmp_path) == {"one": b"11", "two": b"22"}


@posix
@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_any_step_it_leaves_one_complete_set_and_the_next_save_works(tmp_path, earlier):
    """Every operation on the file system in turn is the one before which the process dies."""
    body = f"""
    directory, seen = {str(tmp_path / "adapter")!r}, []
    events = ("open", "os.mkdir", "os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir")
    for step in itertools.count():
        if {earlier}:
            save(directory, 1)
        child = os.fork()
        if child == 0:
            left = step

            def hook(event, arguments):
                global left
                if event in events:
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1

            sys.addaudithook(hook)
            save(directory, 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        seen.append(saved(directory))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not {earlier}:
            save(directory, 3)
            assert saved(directory) == 3 and sorted(os.listdir(directory)) == sorted({NAMES!r})
            for name in {NAMES!r}:
                os.unlink(os.path.join(directory, name))
    first = 1 if {earlier} else None
    switch = seen.index(2)
    assert seen == [first] * switch + [2] * (len(seen) - switch), seen
    assert switch > 10 and len(seen) - switch > 5
    """
    done = subprocess.run(program(body), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@posix
def test_killed_at_random_moments_it_leaves_the_last_complete_save(tmp_path, saved):
    body = f"""
    for number in itertools.count(int(sys.argv[1])):
        save({str(tmp_path)!r}, number)
        os.write(1, b"%d\\n" % number)
    """
    rng, last = random.Random(0), 0
    for _ in range(KILLS):
        child = subprocess.Popen([*program(body), str(last + 1)], stdout=subprocess.PIPE)
        done = child.stdout.readline()  # the first save is complete
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        finished = (done + child.stdout.read()).split()
        child.stdout.close()
        child.wait(timeout=30)
        last = saved(tmp_path)
        assert last in (int(finished[-1]), int(finished[-1]) + 1)


@posix
def test_processes_saving_into_one_directory_take_turns(tmp_path, saved):
    body = f"""
    for number in range(40):
        save({str(tmp_path)!r}, number + 100 * int(sys.argv[1]))
    """
    children = [subprocess.Popen([*program(body), str(i)]) for i in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert saved(tmp_path) % 100 == 39
    assert sorted(contents(tmp_path)) == sorted(NAMES)
