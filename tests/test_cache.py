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
