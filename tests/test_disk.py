"""A run on a disk that is full, read-only or forbidden, under a clock set back, and with a second process."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from llama import checkpoint, metrics
from llama.journal import Journal, allowed_to_fail
from llama.lock import InUse, Lock
from tests.mutants import kills

pytestmark = pytest.mark.usefixtures("small_groups")

ROOT = Path(__file__).parent.parent


def start(args, **env):
    return subprocess.Popen(
        [sys.executable, "train.py", *args],
        cwd=ROOT, env=os.environ | env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own, where the machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_in_between(command, small_disk, tmp_path, capfd, monkeypatch):
    """Saves and rows are refused, said once each, and made up for when there is room again."""
    filler, real = small_disk / "filler", train.Run.step

    def step(self, step, batch, valid):
        if step == 4:
            self.saver.poll(wait=True)
            with open(filler, "wb", buffering=0) as f, allowed_to_fail(filler):
                while True:
                    f.write(bytes(4096))
        if step == 34:
            self.saver.poll(wait=True)
            assert self.saver.newest == 2
            filler.unlink()
        real(self, step, batch, valid)

    monkeypatch.setattr(train.Run, "step", step)
    monkeypatch.setattr(metrics.Metrics, "due", lambda self: True)
    assert train.main(command(small_disk, "steps=40", "save_every=2", "eval_every=20", "keep_last=1")) == 0
    said = capfd.readouterr().err
    assert said.count("metrics.jsonl: No space left on device; its rows wait in memory") == 1
    assert "step 6 is not saved:" in said and "the newest save is step 2, the run goes on" in said
    assert "loss.png: No space left on device" in said or "samples.txt: No space left on device" in said
    rows = metrics.read(small_disk / "r" / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 41))
    assert checkpoint.latest(small_disk / "r").name == "step_00000040"


def test_a_disk_that_is_full_at_the_end(command, small_disk, capfd, monkeypatch):
    real = train.Run.step

    def step(self, step, batch, valid):
        if step == 5:
            self.saver.poll(wait=True)
            with open(small_disk / "filler", "wb", buffering=0) as f, allowed_to_fail(small_disk):
                while True:
                    f.write(bytes(4096))
        real(self, step, batch, valid)

    monkeypatch.setattr(train.Run, "step", step)
    assert train.main(command(small_disk, "save_every=2")) == 3
    said = capfd.readouterr().err
    assert "stopped: step 6 is not saved:" in said and "the newest save is step 4" in said
    assert "Free some space" in said and "Traceback" not in said
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    assert train.main(command(small_disk, "save_every=2")) == 0
    rows = metrics.read(small_disk / "r" / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 7))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", [".lock", "config.yaml.tmp", "checkpoints"])
def test_a_run_folder_that_may_not_be_written_is_one_line(command, tmp_path, capfd, monkeypatch, name, code):
    """Before anything is built; root may write anywhere, so the refusal is made here."""
    folder = tmp_path / "r"
    folder.mkdir()
    real_open, real_mkdir = open, Path.mkdir

    def refuse(path):
        if Path(str(path)) == folder / name:
            raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("builtins.open", lambda p, *a, **k: refuse(p) or real_open(p, *a, **k))
    monkeypatch.setattr("io.open", lambda p, *a, **k: refuse(p) or real_open(p, *a, **k))
    monkeypatch.setattr(Path, "mkdir", lambda p, *a, **k: refuse(p) or real_mkdir(p, *a, **k))
    assert train.main(command(tmp_path)) == 2
    said = capfd.readouterr().err
    assert f"run.dir={tmp_path}: {folder / name}: {os.strerror(code)}" in said and said.count("\n") == 1


def test_a_folder_made_read_only_during_the_run(command, tmp_path, capfd, monkeypatch):
    """The file system is mounted anew as read-only, as kernels do after errors."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    real = train.Run.step

    def step(self, step, batch, valid):
        if step == 3:
            self.saver.poll(wait=True)
            self.book.flush()
            os.close(self.book.journal._fd)  # an open file would forbid it
            lock.release()
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            self.book.journal._fd = os.open(self.book.journal.path, os.O_RDONLY)
        real(self, step, batch, valid)

    lock = Lock()
    monkeypatch.setattr(train, "Lock", lambda: lock)
    monkeypatch.setattr(train.Run, "step", step)
    try:
        assert train.main(command(place, "save_every=2")) == 3
    finally:
        said = capfd.readouterr().err
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert "step 4 is not saved: Read-only file system" in said
    assert "stopped: step 6 is not saved: Read-only file system; the newest save is step 2" in said


def test_a_clock_set_back(command, tmp_path, monkeypatch):
    """What is newest is told by the step, and time between saves by a clock that only runs forward."""
    times = iter(range(2_000_000_000, 0, -100_000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    monkeypatch.setattr(train.time, "monotonic", lambda: monotonic() * 1e4)
    real = train.Run.step

    def step(self, step, batch, valid):
        real(self, step, batch, valid)
        self.saver.poll(wait=True)
        time.sleep(0.02)

    monkeypatch.setattr(train.Run, "step", step)
    assert train.main(command(tmp_path, "save_minutes=0.1", "keep_last=9")) == 0
    saves = checkpoint.complete(tmp_path / "r")
    assert len(saves) > 3
    for age, path in enumerate(saves):
        os.utime(path, (age * 1e6, age * 1e6))
    assert checkpoint.latest(tmp_path / "r").name == "step_00000006"


monotonic = time.monotonic


@kills("llama/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")
def test_two_processes_in_one_run_folder(command, tmp_path, capfd):
    """The second ends with one line that names the first, and changes nothing; a killed one holds nothing."""
    first = start(command(tmp_path, "steps=100000", "save_every=100000"))
    try:
        while not metrics.read(tmp_path / "r" / "metrics.jsonl"):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.1)
        before = (tmp_path / "r" / "config.yaml").read_bytes()
        assert train.main(command(tmp_path, "steps=7")) == 2
        said = capfd.readouterr().err
        assert f"in use by process {first.pid} on " in said and "run.name=NEW" in said
        assert said.count("\n") == 1 and (tmp_path / "r" / "config.yaml").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    assert train.main(command(tmp_path, "steps=2")) == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert Lock().take(tmp_path) is False
    monkeypatch.undo()
    lock = Lock()
    assert lock.take(tmp_path)
    with pytest.raises(InUse, match=f"process {os.getpid()} on"):
        Lock().take(tmp_path)
    lock.release()
    assert Lock().take(tmp_path)


@kills("llama/journal.py", "if os.fstat(self._fd).st_size > self._size:", "if False:")
@kills("llama/journal.py", "self._size += len(self.waiting)", "pass")
@kills("llama/journal.py", 'self.waiting, self.refused = b"", False', "self.refused = False")
@kills(
    "llama/journal.py",
    "left = left[os.write(self._fd, left) :]",
    "left = left[len(left) * os.write(self._fd, left) :]",
)
def test_rows_wait_whole_for_a_disk_with_room(tmp_path, monkeypatch, caplog):
    """Half of a write may have happened when the disk says no."""
    j, real, room = Journal(tmp_path / "m"), os.write, [10]

    def write(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(room[0], len(data))
        room[0] -= taken
        return real(fd, data[:taken])

    monkeypatch.setattr(os, "write", write)
    lines = [json.dumps({"step": n}) + "\n" for n in range(6)]
    with caplog.at_level(logging.WARNING):
        for line in lines[:3]:
            j.write(line)
    assert caplog.text.count("wait in memory") == 1
    room[0] = 10**6
    for line in lines[3:5]:
        j.write(line)
    room[0] = 5
    j.write(lines[5])
    room[0] = 10**6
    j.close()
    assert (tmp_path / "m").read_text() == "".join(lines)
