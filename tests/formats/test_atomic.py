import errno
import fcntl
import json
import os
import platform
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from formats import atomic
from formats.atomic import (
    _exchange,
    check_file,
    check_leavings,
    check_target,
    claimed,
    claimed_in_place,
    has_content,
    partial_path,
    recover,
    replace_folder,
    unreplaced,
    write_file,
)
from formats.disk_errors import explain_full_disk, final_path
from formats.errors import BusyError, InputError
from formats.locks import Lock


def fill(folder: Path, tag: str) -> None:
    """Write three files that all carry the same tag."""
    (folder / "config.json").write_text(tag)
    (folder / "model.safetensors").write_text(tag)
    (folder / "fisher").mkdir()
    (folder / "fisher" / "fisher.json").write_text(tag)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole(tag: str) -> dict[str, str]:
    return {"config.json": tag, "fisher/fisher.json": tag, "model.safetensors": tag}


def build(target: Path, tag: str, then=lambda staging: None) -> None:
    with replace_folder(target, overwrite=True) as staging:
        fill(staging, tag)
        then(staging)


def write_much(staging: Path) -> None:
    (staging / "big").write_bytes(bytes(2 << 20))


def refused(target: Path, why: str, *, overwrite: bool = True) -> None:
    with pytest.raises(InputError, match=why), replace_folder(target, overwrite=overwrite):
        pytest.fail("the block must not run")


HOLD = """
import pathlib, sys, time
from formats.atomic import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_claim_is_one_process_s_until_it_ends_or_dies(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, target], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        claim = target.with_name(".out.consolidate-claim")
        why = rf"{target} is in use by process {holder.pid} on \S+, which has locked {claim}"
        with pytest.raises(InputError, match=why), claimed(target):
            pytest.fail("the block must not run")
    finally:
        holder.kill()
        holder.communicate()
    assert claim.exists()
    with claimed(target), replace_folder(target) as staging:
        fill(staging, "new")
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="in use by"), claimed(target), claimed(target):
        pytest.fail("the block must not run")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of one mebibyte, where root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_new_folder_with_parents(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with replace_folder(target) as staging:
        assert staging.is_dir()
        assert not list(staging.iterdir())
        assert staging.parent == target.parent
        fill(staging, "new")
        assert not target.exists()
    assert content(target) == whole("new")
    assert os.listdir(target.parent) == ["out"]


def test_empty_folder_counts_as_new(tmp_path):
    (tmp_path / "out").mkdir()
    with replace_folder(tmp_path / "out") as staging:
        fill(staging, "new")
    assert content(tmp_path / "out") == whole("new")
    assert os.listdir(tmp_path) == ["out"]


def test_content_is_refused_without_overwrite(tmp_path):
    fill(tmp_path, "old")
    refused(tmp_path, r"is not empty: found 'config.json'.*--overwrite", overwrite=False)
    assert content(tmp_path) == whole("old")


def test_content_that_appears_meanwhile_is_refused(tmp_path):
    target = tmp_path / "out"

    def write_meanwhile():
        with replace_folder(target) as staging:
            fill(staging, "new")
            target.mkdir()
            (target / "precious").write_text("kept")

    with pytest.raises(InputError, match="is not empty: found 'precious'"):
        write_meanwhile()
    assert content(target) == {"precious": "kept"}
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_replaces_the_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    (target / "stray").write_text("old")
    with replace_folder(target, overwrite=True) as staging:
        fill(staging, "new")
        assert content(target)["config.json"] == "old"
    assert content(target) == whole("new")
    assert os.listdir(tmp_path) == ["out"]


def test_open_file_of_the_old_folder_stays_readable(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    with open(target / "config.json") as file:
        build(target, "new")
        assert file.read() == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, FileNotFoundError])
def test_exception_leaves_the_old_state(tmp_path, error):
    old, new = tmp_path / "old", tmp_path / "parent" / "new"
    old.mkdir()
    fill(old, "old")

    def stop(staging):
        raise error("stop")

    for target in (old, new):
        with pytest.raises(error, match="stop"):
            build(target, "new", stop)
    assert content(old) == whole("old")
    assert os.listdir(tmp_path) == ["old"]


def test_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        refused(target, r"file is a file|file/out cannot be written")
    assert (tmp_path / "file").read_text() == "kept"


def test_link_to_a_folder_is_followed(tmp_path):
    real, link = tmp_path / "real" / "folder", tmp_path / "link"
    real.mkdir(parents=True)
    fill(real, "old")
    link.symlink_to(real)
    with replace_folder(link, overwrite=True) as staging:
        assert staging.parent == real.parent
        fill(staging, "new")
    assert link.is_symlink()
    assert content(real) == whole("new")


def test_home_and_current_folder_are_not_replaced(tmp_path, monkeypatch):
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    (work / "thesis.tex").write_text("kept")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(work)
    for target, what in ((Path("."), "the current"), (tmp_path / "home", "your home")):
        refused(target, what)
    refused(Path("/"), "root of the file system")
    assert content(work) == {"thesis.tex": "kept"}
    (work / "thesis.tex").unlink()
    refused(Path("."), "the current")  # a process would be left in a folder that is gone


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replace_folder(tmp_path / "out") as staging:
            fill(staging, "new")
        write_file(tmp_path / "file", "text")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes[tmp_path / "out"] == modes[tmp_path / "out" / "fisher"] == 0o777 & ~umask
    assert modes[tmp_path / "out" / "config.json"] == modes[tmp_path / "file"] == 0o666 & ~umask


def test_private_folder_stays_private(tmp_path):
    target = tmp_path / "out"
    target.mkdir(mode=0o700)
    fill(target, "old")
    build(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_second_writer_is_refused(tmp_path):
    with replace_folder(tmp_path / "out") as staging:
        fill(staging, "first")
        refused(tmp_path / "out", "another process is writing this folder", overwrite=False)
        recover(tmp_path / "out")
    assert content(tmp_path / "out") == whole("first")
    assert os.listdir(tmp_path) == ["out"]


RACE = """
import os, sys, time
from pathlib import Path
from formats.atomic import recover, replace_folder
from formats.errors import BusyError, InputError
from formats.locks import Lock

target, done = Path(sys.argv[1]), Path(sys.argv[2])
children = []
for tag in "abcd":
    child = os.fork()
    if child == 0:
        written = 0
        while written < 20:
            try:
                with replace_folder(target, overwrite=True) as staging:
                    for name in ("1", "2", "3"):
                        (staging / name).write_text(tag)
                        time.sleep(0.0005)
                written += 1
            except InputError as error:
                assert "another process is writing" in str(error), error
        os._exit(0)
    children.append(child)
recovering = os.fork()
if recovering == 0:
    while not done.exists():
        recover(target)
    os._exit(0)
codes = [os.waitpid(child, 0)[1] for child in children]
done.touch()
codes.append(os.waitpid(recovering, 0)[1])
sys.exit(any(codes))
"""


def test_many_writers_never_mix(tmp_path):
    target = tmp_path / "out"
    run = [sys.executable, "-c", RACE, str(target), str(tmp_path / "done")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(content(target).values())) == 1
    assert sorted(content(target)) == ["1", "2", "3"]
    assert sorted(os.listdir(tmp_path)) == ["done", "out"]


STOPPED = """
import json, os, shutil, signal, sys
from pathlib import Path
import formats.atomic as atomic

# Stop at the n-th system call that changes the disk, for every n until a run gets through.
how, exchange, start, work = sys.argv[1], sys.argv[2] == "exchange", sys.argv[3], Path(sys.argv[4])
target = work if sys.argv[2] == "mounted" else work / "out"

def fill(folder, tag):
    for name in ("config.json", "fisher/fisher.json", "model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(tag)

def clear():
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

def stopping(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return call(*args, **kwargs)
    return wrapped

if not exchange:
    atomic._exchange = lambda one, other: False
outcomes = []
for n in range(1, 200):
    clear()
    if start == "old":
        target.mkdir(exist_ok=True)
        fill(target, "old")
    child = os.fork()
    if child == 0:
        left = n
        for name in ("rename", "fsync", "mkdir", "rmdir", "unlink", "open"):
            setattr(os, name, stopping(getattr(os, name)))
        atomic._exchange = stopping(atomic._exchange)
        try:
            with atomic.replace_folder(target, overwrite=True) as staging:
                fill(staging, "new")
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    atomic.recover(target)
    found = sorted({path.read_text() for path in target.rglob("*") if path.is_file()})
    count = sum(path.is_file() for path in target.rglob("*"))
    outcomes.append([ended == 0, found, count, sorted(os.listdir(work))])
    if ended == 0:
        break
print(json.dumps(outcomes))
"""


def stop_everywhere(how: str, way: str, start: str, work: Path) -> list:
    run = [sys.executable, "-c", STOPPED, how, way, start, str(work)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("way", ["exchange", "two renames"])
@pytest.mark.parametrize("start", ["old", "nothing"])
def test_stopped_at_any_moment_is_wholly_old_or_new(tmp_path, how, way, start):
    outcomes = stop_everywhere(how, way, start, tmp_path)
    before = [[], 0, []] if start == "nothing" else [["old"], 3, ["out"]]
    after = [["new"], 3, ["out"]]
    assert all(rest in (before, after) for _, *rest in outcomes)
    assert outcomes[0][1:] == before
    assert outcomes[-1] == [True, *after]
    assert len(outcomes) > 10
    # Once it is in place it stays.
    first_new = next(i for i, (_, *rest) in enumerate(outcomes) if rest == after)
    assert all(rest == after for _, *rest in outcomes[first_new:])
    assert first_new < len(outcomes) - 1


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("start", ["old", "nothing"])
def test_stopped_on_a_mount_point(small_disk, how, start):
    outcomes = stop_everywhere(how, "mounted", start, small_disk)
    names = ["config.json", "fisher", "model.safetensors"]
    before = [[], 0, []] if start == "nothing" else [["old"], 3, names]
    after = [["new"], 3, names]
    assert all(rest in (before, after) for _, *rest in outcomes)
    assert outcomes[0][1:] == before
    assert outcomes[-1] == [True, *after]


def test_mount_point(small_disk):
    with replace_folder(small_disk) as staging:
        assert staging.parent == small_disk
        assert final_path(staging / "file") == small_disk / "file"
        fill(staging, "old")
    refused(small_disk, "is not empty", overwrite=False)
    with replace_folder(small_disk, overwrite=True) as staging:
        fill(staging, "new")
        assert content(small_disk)["config.json"] == "old"
    assert content(small_disk) == whole("new")
    assert sorted(os.listdir(small_disk)) == ["config.json", "fisher", "model.safetensors"]


def test_bind_mount_of_the_same_file_system(small_disk, tmp_path):
    real, place = small_disk / "real", small_disk / "a place"
    real.mkdir()
    place.mkdir()
    subprocess.run(["mount", "--bind", str(real), str(place)], check=True)
    try:
        with replace_folder(place) as staging:
            fill(staging, "new")
        assert content(place) == content(real) == whole("new")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(small_disk):
    target = small_disk / "out"
    target.mkdir()
    fill(target, "old")
    with pytest.raises(InputError, match=r"out: the disk or the quota is full"):
        build(target, "new", write_much)
    assert content(target) == whole("old")
    assert os.listdir(small_disk) == ["out"]


def test_full_disk_says_how_much_was_needed(small_disk):
    with pytest.raises(InputError, match=r"/file.*2,097,152 bytes needed, 1,0\d\d,\d\d\d were"):
        write_file(small_disk / "file", bytes(2 << 20))
    assert os.listdir(small_disk) == []

    def write_counted(staging):
        with explain_full_disk(staging, 5):
            write_much(staging)

    with pytest.raises(InputError, match=r"disk/out: .*5 bytes needed"):
        build(small_disk / "out", "new", write_counted)
    assert os.listdir(small_disk) == []


def test_read_only_file_system(small_disk):
    fill(small_disk, "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(small_disk / "out", "cannot be written: Read-only", overwrite=False)
    with pytest.raises(InputError, match="cannot be written: Read-only"):
        write_file(small_disk / "file", "x")
    recover(small_disk / "out")
    assert content(small_disk) == whole("old")


def test_exchange_swaps_two_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not _exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    assert content(tmp_path) == {"a/file": "b", "b/file": "a"}
    with pytest.raises(FileNotFoundError):
        _exchange(tmp_path / "a", tmp_path / "missing")


def test_recover_leaves_a_clean_place_alone(tmp_path):
    fill(tmp_path, "old")
    before = sorted(os.listdir(tmp_path))
    recover(tmp_path)
    recover(tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == before


def test_recover_without_permission_leaves_leavings_alone(small_disk):
    target = small_disk / "out"
    target.mkdir()
    fill(target, "old")
    (small_disk / ".out.consolidate-new").mkdir()
    (small_disk / ".gone.consolidate-old").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    recover(target)
    assert content(target) == whole("old")
    with pytest.raises(InputError, match="gone: a run was killed while it replaced this folder"):
        recover(small_disk / "gone")


def test_leaving_that_cannot_be_removed_is_named(tmp_path):
    (tmp_path / ".out.consolidate-new").write_text("someone's file")
    refused(tmp_path / "out", r"\.out\.consolidate-new was left by another run", overwrite=False)


def test_write_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    write_file(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(tmp_path) == ["file"]


def test_write_file_makes_the_folders_above(tmp_path):
    write_file(tmp_path / "a" / "b" / "file", "x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_folders_need_not_be_synced_where_the_file_system_does_not(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_file(tmp_path / "file", "x")
    with replace_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
    assert (tmp_path / "out/a").read_text() == "a"


@pytest.mark.parametrize("left", [".out.consolidate-new", ".out.consolidate-old"])
def test_what_cannot_be_settled_is_refused_before_the_work(tmp_path, monkeypatch, left):
    (tmp_path / "out").mkdir()
    (tmp_path / left).mkdir()
    check_leavings(tmp_path / "out")  # a killed run left it, which the lock shows
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / left).mkdir()
    with open(tmp_path / ".out.consolidate-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="another process is writing this folder"):
            check_leavings(tmp_path / "out")
    monkeypatch.setattr(atomic, "lock_soon", lambda path, cleanup: Lock.UNKNOWN)
    with pytest.raises(InputError, match=f"{left} was left by another run; remove it"):
        check_leavings(tmp_path / "out")


def test_what_a_file_system_keeps_of_a_removed_file_is_no_content(tmp_path):
    (tmp_path / ".nfs0000000000a1b2c300000001").write_text("")
    (tmp_path / ".fuse_hidden0000000100000002").write_text("")
    assert not has_content(tmp_path)
    (tmp_path / ".nfs-export.conf").write_text("a person's")
    assert has_content(tmp_path)


def test_the_claim_of_another_user_is_named(tmp_path, monkeypatch):
    def denied(path, cleanup):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    claim = tmp_path / ".out.consolidate-claim"
    claim.touch()
    monkeypatch.setattr(atomic, "lock_soon", denied)
    with (
        pytest.raises(InputError, match=f"{claim} was left by another user"),
        claimed(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")


def test_a_mounted_folder_need_not_have_a_parent_that_can_be_written(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr(atomic, "is_mount", lambda path: path == target)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    check_target(target)
    monkeypatch.setattr(os, "access", lambda path, mode: path != target)
    with pytest.raises(InputError, match="out is not a writable folder"):
        check_target(target)


def test_a_file_that_could_not_be_written_is_refused_before(tmp_path):
    (tmp_path / "file").touch()
    check_file(tmp_path / "a" / "b" / "new")
    check_file(tmp_path / "file")
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="file is not a writable folder"):
        check_file(tmp_path / "file" / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]
    os.mkfifo(tmp_path / "pipe")  # a rename would put a file in its place
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match="is a device or a pipe; name a file"):
            check_file(place)


def test_write_file_removes_what_killed_commands_left(tmp_path):
    path, left = tmp_path / "a[1].json", tmp_path / ".a[1].json.01234567.consolidate-tmp"
    left.write_text("cut sho")
    other = tmp_path / ".a1.json.01234567.consolidate-tmp"
    other.write_text("of another file")
    busy = tmp_path / ".a[1].json.89abcdef.consolidate-tmp"
    with open(busy, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as long as its writer runs
        write_file(path, "{}")
        assert sorted(tmp_path.iterdir()) == sorted([path, other, busy])
    assert path.read_text() == "{}"


def test_write_file_follows_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_write_file_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_final_path(tmp_path):
    with replace_folder(tmp_path / "my.out") as staging:
        assert final_path(staging / "fisher" / "x") == tmp_path / "my.out" / "fisher" / "x"
    assert final_path(Path("plain/.hidden")) == Path("plain/.hidden")


def test_a_target_that_is_a_link_to_itself_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(InputError, match="out is a link that leads to itself; remove it"):
        check_target(tmp_path / "out")


def test_a_name_that_safetensors_cannot_open_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"bad\\xff: the path is not UTF-8"):
        check_target(tmp_path / os.fsdecode(b"bad\xff"))


def test_a_name_too_long_for_its_hidden_siblings_is_refused_before_the_work(tmp_path):
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    for size in (most, most - 20, most + 10):
        with pytest.raises(InputError, match=rf"the name has {size} bytes: expected at most \d+"):
            check_target(tmp_path / "a" / ("n" * size))
        with pytest.raises(InputError, match=rf"the name has {size} bytes: expected at most \d+"):
            check_file(tmp_path / ("n" * size))
    assert os.listdir(tmp_path) == []
    longest = tmp_path / ("n" * (most - 48))
    check_target(longest)
    failed = longest.with_name(f"{longest.name}.failed-forgetting")
    partial = partial_path(failed, 9999)
    partial.with_name(f"{partial.name}-new").touch()
    with replace_folder(longest) as new:
        (new / "file").touch()
    with claimed(longest):
        pass
    check_file(tmp_path / ("f" * (most - 26)))
    write_file(tmp_path / ("f" * (most - 26)), "x")


def test_claims_that_killed_commands_left_are_removed_by_the_next(tmp_path):
    stale, other = tmp_path / ".dead.consolidate-claim", tmp_path / ".dead.consolidate-lock"
    stale.write_text("1")
    other.write_text("")
    with claimed(tmp_path / "held"):
        with claimed(tmp_path / "out"):
            found = {path.name for path in tmp_path.iterdir()}
        names = {".held.consolidate-claim", ".out.consolidate-claim", other.name}
        assert found == names  # a claim that somebody holds stays
    assert os.listdir(tmp_path) == [other.name]


def test_a_claim_waits_for_who_removes_stale_ones(tmp_path):
    path = tmp_path / ".out.consolidate-claim"
    path.touch()
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with claimed(tmp_path / "out"):
            assert path.read_text() == f"{os.getpid()} on {platform.node()}"
        timer.join()


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path):
    target = tmp_path / "out"
    build(target, "old")
    reads = []

    def read():
        reads.append(content(target))
        if len(reads) < 3:
            build(target, "new")
            raise InputError("the files do not belong together")
        return reads[-1]

    assert unreplaced(target, read) == whole("new")
    assert len(reads) == 3

    def damaged():
        reads.append({})
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        unreplaced(target, damaged)
    assert len(reads) == 4  # nothing was replaced: once is enough

    def always():
        build(target, "new")
        damaged()

    with pytest.raises(InputError, match="damaged"):
        unreplaced(target, always)
    assert len(reads) == 9


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("claim", lambda folder: claimed_in_place(folder, "fisher").__enter__()),
        ("lock", lambda folder: recover(folder / "fisher")),
    ],
)
def test_a_link_in_place_of_a_claim_or_lock_is_refused(
    tmp_path: Path, kind: str, use: Callable[[Path], object], hard: bool
) -> None:
    name = f".fisher.consolidate-{kind}"
    theirs, checkpoint = tmp_path / "theirs", tmp_path / "checkpoint"
    theirs.write_text("what the user has")
    (checkpoint / ".fisher.consolidate-old").mkdir(parents=True)
    if hard:
        (checkpoint / name).hardlink_to(theirs)
    else:
        (checkpoint / name).symlink_to(theirs)
    with pytest.raises(InputError, match="is a link"):
        use(checkpoint)
    assert theirs.read_text() == "what the user has"
