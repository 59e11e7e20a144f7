"""A folder that is whole or not there: killed at every write and rename, full disks, two programs at once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from bakeout.editor.errors import InputError
from bakeout.export import workplace as module
from bakeout.export.workplace import Workplace, recover, workplace

FILES = ("a", "b", "sub/c")


def ours(folder: Path) -> str | None:
    return None if (folder / "a").exists() else "it is of another kind"


def fill(place: Workplace, text: str) -> None:
    for name in FILES:
        path = place.new / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    (place.calibration / "kept").write_text(text)
    place.finish()


def make(folder: Path, text: str, *, force: bool = False) -> None:
    with workplace(folder, ours, force=force) as place:
        fill(place, text)


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in FILES}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_at(call: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that kills itself before its `call`-th fsync, rename or removal; False if it ends."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*arguments: object, **keywords: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return wrapper

        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:  # noqa: BLE001 - a child must never return into pytest
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("inside", ["", "sub"])
def test_the_folder_in_which_one_stands_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    make(tmp_path / "made", "first")
    monkeypatch.chdir(tmp_path / "made" / inside)
    with pytest.raises(InputError, match="you are in it; go to another folder first"):
        make(tmp_path / "made", "second", force=True)
    assert content(tmp_path / "made") == {"first"}
    assert entries(tmp_path) == ["made"]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "made", "second", force=True)
    assert content(tmp_path / "made") == {"second"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_moment_nothing_half_written_is_there_and_a_rerun_completes(tmp_path: Path, force: bool) -> None:
    call, seen = 0, set()
    while True:
        call += 1
        parent = tmp_path / str(call)
        parent.mkdir()
        folder = parent / "made"
        if force:
            make(folder, "old")
        if not killed_at(call, lambda folder=folder: make(folder, "new", force=force)):  # type: ignore[misc]
            break
        assert set(entries(parent)) <= {"made", ".made.baking"}
        if folder.exists():
            assert len(content(folder)) == 1
            seen |= content(folder)
        else:
            seen.add("none")
        if content(folder) != {"new"} if folder.exists() else True:
            make(folder, "new", force=force)
            assert entries(parent) == ["made"]
        assert content(folder) == {"new"}
    assert call > 10
    assert seen == ({"old", "new", "none"} if force else {"new", "none"})


def test_a_refused_rerun_puts_back_what_was_being_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    make(folder, "old")
    (tmp_path / ".made.baking").mkdir()
    folder.rename(tmp_path / ".made.baking" / "old")
    with pytest.raises(InputError, match="exists already"):
        make(folder, "new")
    assert content(folder) == {"old"}
    assert entries(tmp_path) == ["made"]


def test_what_was_being_replaced_is_put_back_unless_a_program_is_at_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    recover(folder)
    assert entries(tmp_path) == []
    make(folder, "old")
    with workplace(folder, ours, force=True) as place:
        folder.rename(place.new.parent / "old")
        with pytest.raises(InputError, match="is being made by another program"):
            recover(folder)
        (place.new.parent / "old").rename(folder)
    (tmp_path / ".made.baking").mkdir()
    shutil.copytree(folder, tmp_path / ".made.baking" / "old")
    recover(folder)
    assert entries(tmp_path) == [".made.baking", "made"]
    shutil.rmtree(folder)
    recover(folder)
    assert content(folder) == {"old"}
    assert entries(tmp_path) == ["made"]


def test_an_interrupted_calibration_is_kept_and_the_rest_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "made"

    def interrupted() -> None:
        with workplace(folder, ours, force=False) as place:
            (place.calibration / "sums").write_text("half")
            (place.new / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert entries(tmp_path) == [".made.baking"]
    assert entries(tmp_path / ".made.baking") == ["calibration"]
    with workplace(folder, ours, force=False) as place:
        assert (place.calibration / "sums").read_text() == "half"
        assert entries(place.new) == []
        fill(place, "new")
    assert entries(tmp_path) == ["made"]


def test_nothing_is_left_of_a_run_that_failed_before_it_calibrated(tmp_path: Path) -> None:
    with pytest.raises(InputError), workplace(tmp_path / "made", ours, force=False):
        raise InputError("no")
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("force", "what", "message"),
    [
        (False, "made", "exists already; choose another folder, or replace it with --force"),
        (False, "foreign", "never overwritten, because it is of another kind"),
        (True, "foreign", "never overwritten, because it is of another kind"),
    ],
)
def test_what_is_there_is_refused(tmp_path: Path, force: bool, what: str, message: str) -> None:
    make(tmp_path / "made", "old")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious").touch()
    with pytest.raises(InputError, match=message):
        make(tmp_path / what, "new", force=force)
    assert content(tmp_path / "made") == {"old"}
    assert entries(tmp_path / "foreign") == ["precious"]
    assert entries(tmp_path) == ["foreign", "made"]


def test_what_somebody_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "made"

    def overtaken() -> None:
        with workplace(folder, ours, force=False) as place:
            folder.mkdir()
            (folder / "precious").touch()
            fill(place, "new")

    with pytest.raises(InputError, match="exists"):
        overtaken()
    assert entries(folder) == ["precious"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    make(folder, "old")
    replace = os.replace

    def refuse(source: str | Path, target: str | Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        make(folder, "new", force=True)
    assert content(folder) == {"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_one_program_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    program = (
        "import sys\nfrom pathlib import Path\nfrom bakeout.export.workplace import workplace\n"
        f"with workplace(Path({str(folder)!r}), lambda _: None, force=False):\n"
        "    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="is being made by another program"):
            make(folder, "new")
        assert (tmp_path / ".made.baking" / "new").is_dir(), "the other's files were touched"
        other.kill()
    make(folder, "new")
    assert content(folder) == {"new"}


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[int], None]]:
    """What happens just before a lock is taken, first to last; it is given the handle."""
    fcntl = pytest.importorskip("fcntl")
    flock, before = fcntl.flock, []

    def counted(stream: IO[bytes], how: int) -> None:
        if before:
            before.pop(0)(stream.fileno())
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", counted)
    return before


@pytest.mark.skipif(os.name == "nt", reason="has no modes of folders")
def test_who_may_look_into_a_folder_stays_when_it_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with workplace(tmp_path / "made", ours, force=True) as place:
            fill(place, text)
        if text == "one":
            (tmp_path / "made").chmod(0o700)
    assert (tmp_path / "made" / "a").read_text() == "two"
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700


def test_what_is_locked_is_a_file_open_for_writing(tmp_path: Path, locks: list[Callable[[int], None]]) -> None:
    import fcntl

    seen = []
    locks.append(lambda handle: seen.append((fcntl.fcntl(handle, fcntl.F_GETFL), os.fstat(handle).st_mode)))
    make(tmp_path / "made", "new")
    ((flags, mode),) = seen
    assert flags & os.O_ACCMODE == os.O_RDWR
    assert stat.S_ISREG(mode)


def test_a_lock_that_its_last_holder_removed_is_not_taken(tmp_path: Path, locks: list[Callable[[int], None]]) -> None:
    lock = tmp_path / ".made.baking" / "lock"
    locks += [lambda _: shutil.rmtree(lock.parent), lambda _: lock.unlink() or lock.touch()]  # type: ignore[func-returns-value]
    with workplace(tmp_path / "made", ours, force=False) as place:
        assert not locks
        with pytest.raises(InputError, match="is being made by another program"):
            make(tmp_path / "made", "other")
        fill(place, "new")
        with pytest.raises(InputError, match="is being made by another program"):
            make(tmp_path / "made", "other", force=True)
    assert content(tmp_path / "made") == {"new"}
    assert entries(tmp_path) == ["made"]


def test_a_file_system_without_locks_is_an_error_and_no_handle_is_left(
    tmp_path: Path, locks: list[Callable[[int], None]]
) -> None:
    handles = []

    def refuse(handle: int) -> None:
        handles.append(handle)
        raise OSError(errno.ENOLCK, "No locks available")

    locks.append(refuse)
    with pytest.raises(OSError, match="No locks available"):
        make(tmp_path / "made", "new")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "_sync", lambda folder: calls.append(f"sync {folder.name}"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"rename {Path(a).name}"), replace(a, b))[1])
    make(tmp_path / "made", "new")
    assert calls == ["sync sub", "sync new", "rename new", f"sync {tmp_path.name}"]
