import multiprocessing
import os
import signal
import time

import pytest

from unlearnlib import cache


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path / "elsewhere"))
    assert cache.cache_folder() == tmp_path / "elsewhere"
    assert cache.cache_folder().is_dir()


def test_hashes_against_known_values(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example 1
    assert cache.file_hash(tmp_path / "file") == known
    assert cache.json_hash({"a": 1, "b": [2]}) == cache.json_hash({"b": [2], "a": 1})
    assert cache.json_hash({"a": 1}) != cache.json_hash({"a": 2})


def test_atomic_file_keeps_the_old_content_when_the_block_fails(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), cache.atomic_file(target) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half-way")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with cache.atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == [target / "new"]


def test_a_new_folder_replaces_nothing(tmp_path):
    target = tmp_path / "out"
    with cache.new_folder(target) as temporary:
        (temporary / "mine").write_text("")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [target]  # no lock is left
    with pytest.raises(FileExistsError, match="never overwritten"), cache.new_folder(target):
        pytest.fail("it must not come to this")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="never overwritten"), cache.new_folder(tmp_path / "link"):
        pytest.fail("it must not come to this")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_stays_and_so_does_the_work(tmp_path, kind):
    target = tmp_path / "out"
    with pytest.raises(FileExistsError, match="left as it is"), cache.new_folder(target) as temporary:
        (temporary / "mine").write_text("")
        if kind == "folder":
            target.mkdir()
        (target / "theirs" if kind == "folder" else target).write_text("precious")
    assert (target / "theirs" if kind == "folder" else target).read_text() == "precious"
    [spare] = [path for path in tmp_path.iterdir() if path != target]
    assert spare.name.startswith("out-")
    assert [path.name for path in spare.iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["out", "new/newer/out"])
def test_a_failing_block_leaves_no_new_folder(tmp_path, place):
    with pytest.raises(RuntimeError, match="half-way"), cache.new_folder(tmp_path / place) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []
    with cache.new_folder(tmp_path / place):
        pass
    assert (tmp_path / place).is_dir()


def _make_and_hang(target, started):
    with cache.new_folder(target) as temporary:
        (temporary / "weights").write_text("half")
        started.set()
        time.sleep(60)


def test_one_new_folder_is_made_once_and_the_dead_are_tidied_away(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = [context.Event(), context.Event()]
    targets = [tmp_path / "one", tmp_path / "two"]
    processes = [context.Process(target=_make_and_hang, args=pair) for pair in zip(targets, started, strict=True)]
    for process in processes:
        process.start()
    try:
        assert all(event.wait(60) for event in started)
        with pytest.raises(BlockingIOError, match="another run is making"), cache.new_folder(targets[0]):
            pytest.fail("it must not come to this")
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join()
        assert len(list(tmp_path.glob(".*.tmp"))) == 2
        with cache.new_folder(tmp_path / "three"):  # of another name: the dead one goes, the living one stays
            assert len(list(tmp_path.glob(".*.tmp"))) == 2
        [left] = tmp_path.glob(".*.tmp")
        assert (left / "weights").read_text() == "half"
        with cache.new_folder(targets[0]):
            pass
        assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["one", "three"]
    finally:
        processes[1].kill()
        processes[1].join()


def _write_and_hang(target, started):
    with cache.lock(target), cache.atomic_folder(target) as temporary:
        (temporary / "weights").write_text("half")
        started.set()
        time.sleep(60)


def test_killed_while_writing_leaves_nothing_and_frees_the_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, target = context.Event(), tmp_path / "model"
    process = context.Process(target=_write_and_hang, args=(target, started))
    process.start()
    assert started.wait(60)
    with pytest.raises(cache.Busy):
        cache.lock(target).acquire(timeout=0)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    with cache.lock(target).acquire(timeout=5):
        pass
