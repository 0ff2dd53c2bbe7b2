"""The notebooks as they are in the repository, and the runner on tiny notebooks made up here."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import psutil
import pytest
import yaml
from bs4 import BeautifulSoup
from myst_parser.config.main import MdParserConfig
from myst_parser.mdit_to_docutils.sphinx_ import SphinxRenderer
from myst_parser.parsers.mdit import create_md_parser
from nbformat.v4 import new_code_cell, new_notebook

from unlearnlib.book import notebooks, pages, schedule
from unlearnlib.book.build import main
from unlearnlib.book.notebooks import is_done, listed_notebooks, plan
from unlearnlib.book.prose import OTHERWISE
from unlearnlib.book.schedule import run_notebooks
from unlearnlib.experiment.profiles import PROFILES
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.posts import addresses, load_posts

ROOT = Path(__file__).parents[2]
CHAPTERS = listed_notebooks(ROOT)
PARAMETERS = 'profile = "quick"\nresults = "results"'


def make_root(folder: Path, **codes: list[str]) -> Path:
    """A repository in miniature: notebooks of the given code cells, after one of parameters."""
    (folder / "notebooks").mkdir()
    for name, cells in codes.items():
        first = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[first, *map(new_code_cell, cells)])
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "language": "python",
            "display_name": "Python 3",
        }
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    chapters = [{"file": f"notebooks/{name}"} for name in codes]
    toc = {"format": "jb-book", "root": "book/index", "parts": [{"caption": "Part I", "chapters": chapters}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "_config.yml").write_text(
        "title: A small book\nonly_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\nhtml: {}\n"
    )
    (folder / "book").mkdir()
    (folder / "book" / "index.md").write_text("# A small book\n")
    return folder


# The chapters


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_defaults_are_the_quick_profile(path):
    parameters = papermill.inspect_notebook(str(path))
    assert {name: parameters[name]["default"] for name in ("profile", "results")} == {
        "profile": '"quick"',
        "results": '"results"',
    }


def test_outputs_are_stripped():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, CHAPTERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"run nbstripout on: {done.stdout}{done.stderr}"


def test_every_notebook_is_a_chapter():
    assert set((ROOT / "notebooks").glob("*.ipynb")) == set(CHAPTERS)


def test_every_chapter_ran(book_site):
    assert all(is_done(job) for job in plan(ROOT, "quick"))


def test_what_the_texts_say_of_outcomes_holds(book_site):
    """But for one sentence in twenty: on another processor training ends elsewhere, and the page then says so."""
    checks, corrections = 0, set()
    for job in plan(ROOT, "quick"):
        for cell in nbformat.read(job.output, as_version=4).cells:
            checks += cell.source.count("book.expect(")
            pages = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
            corrections |= {(job.output.stem, page) for page in pages if page.startswith(OTHERWISE)}
    assert checks > 100
    assert len(corrections) <= checks / 20, sorted(corrections)


def test_executed_notebooks_name_no_folder_of_this_machine(book_site):
    for job in plan(ROOT, "quick"):
        for cell in nbformat.read(job.output, as_version=4).cells:
            shown = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
            assert str(ROOT) not in str(shown)
            assert str(Path.home()) not in str(shown)


def test_no_address_of_the_real_texts_is_in_an_output_or_a_table(book_site):
    real = [*(row["text"] for row in load_posts()), *load_corpus("licences")["text"]]
    known = {address for text in real for address in addresses(text)}
    jobs = plan(ROOT, "quick")
    cells = [cell for job in jobs for cell in nbformat.read(job.output, 4).cells]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    tables = [path.read_text() for job in jobs for path in Path(job.parameters["results"]).glob("*.csv")]
    shown = "\n".join([*map(str, outputs), *tables])
    assert len(known) > 400
    assert sum(address in shown for address in known) == 0  # a count, for a failing test prints what it compares


def test_profiles_are_those_of_the_library():
    assert set(notebooks.PROFILES) == PROFILES.keys() == schedule.MEMORY.keys() == schedule.LIMIT_SECONDS.keys()
    assert schedule.FIRST.keys() <= PROFILES.keys()
    named = [name for table in (schedule.FIRST, schedule.LARGE) for names in table.values() for name in names]
    assert schedule.LARGE.keys() <= PROFILES.keys()
    assert set(named) <= {path.stem for path in CHAPTERS}


# The runner


def test_a_notebook_gets_its_parameters_and_runs_once(tmp_path):
    cell = "from pathlib import Path\nwith open(Path(results) / 'a.csv', 'a') as f:\n    f.write(profile)"
    root = make_root(tmp_path, a=[cell])
    assert run_notebooks(root, "cpu") == {}
    assert run_notebooks(root, "cpu") == {}
    assert (root / "_build" / "cpu" / "results" / "a.csv").read_text() == "cpu"


def test_the_longest_begin_first(tmp_path, monkeypatch, capsys):
    root = make_root(tmp_path, a=["1 + 1"], b=["1 + 1"], c=["1 + 1"])
    monkeypatch.setitem(schedule.FIRST, "cpu", ("c",))
    assert run_notebooks(root, "cpu", at_once=1) == {}
    assert re.findall(r"^(\w): started", capsys.readouterr().out, re.M) == ["c", "a", "b"]


def test_of_the_large_notebooks_one_at_a_time_runs(tmp_path, monkeypatch, capsys):
    root = make_root(tmp_path, a=["1 + 1"], b=["1 + 1"], c=["1 + 1"])
    monkeypatch.setitem(schedule.LARGE, "cpu", ("a", "b"))
    assert run_notebooks(root, "cpu", at_once=2) == {}
    said = re.findall(r"^(\w: \w+)", capsys.readouterr().out, re.M)
    assert said[:2] == ["a: started", "c: started"]
    assert said.index("b: started") > said.index("a: done")


def test_what_makes_a_notebook_run_again(tmp_path):
    root = make_root(tmp_path, a=["1 + 1"])
    run_notebooks(root, "quick")
    [job] = plan(root, "quick")
    assert is_done(job)
    assert not is_done(plan(root, "cpu")[0])
    whole = job.output.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"{}"):
        job.output.write_bytes(damaged)
        assert not is_done(job)
    run_notebooks(root, "quick")
    assert is_done(job)
    (root / "requirements.txt").write_text("changed")
    assert not is_done(plan(root, "quick")[0])
    (root / "requirements.txt").unlink()
    assert is_done(plan(root, "quick")[0])
    edited = nbformat.read(job.notebook, as_version=4)
    edited.cells.append(new_code_cell("2 + 2"))
    nbformat.write(edited, job.notebook)
    assert not is_done(plan(root, "quick")[0])


def test_a_chapter_that_fails_fails_alone(tmp_path, capsys, monkeypatch):
    root = make_root(
        tmp_path,
        broken=[
            "from myst_nb import glue\nx = glue('early', 1 + 1, display=False)\nprint('so far')",
            "# a comment first\nraise ArithmeticError('too hot')",
            "glue('late', 3)",
        ],
        sound=["print('all is well')"],
    )
    source = nbformat.read(root / "notebooks" / "broken.ipynb", as_version=4)
    prose = "# A title\n\nThe prose. Early: {glue:text}`early`. Late: {glue:text}`late:.2f`."
    source.cells.insert(0, nbformat.v4.new_markdown_cell(prose))
    nbformat.write(source, root / "notebooks" / "broken.ipynb")
    monkeypatch.chdir(root)
    assert main([]) == 1
    printed = capsys.readouterr()
    assert "broken: cell 4 (# a comment first) ArithmeticError: too hot" in printed.err
    assert re.search(r"minutes a chapter took.*\d  sound\n.*together", printed.out, re.DOTALL)
    broken, sound = plan(root, "quick")
    assert is_done(sound)
    assert not broken.output.exists()
    pages = root / "_build" / "quick" / "site" / "_build" / "html"
    assert "all is well" in (pages / "notebooks" / "sound.html").read_text()
    text = BeautifulSoup((pages / "notebooks" / "broken.html").read_text(), "html.parser").find("article").text
    for shown in (
        "could not be computed",
        "ArithmeticError: too hot",
        "The prose. Early: 2. Late: (not computed).",
        "so far",
    ):
        assert shown in text
    assert "Traceback" not in text


def test_the_reason_of_a_failure_is_shown_wherever_the_title_is(tmp_path):
    root = make_root(tmp_path, late=["1 / 0"], none=["1 / 0"])
    source = nbformat.read(root / "notebooks" / "late.ipynb", as_version=4)
    source.cells += map(
        nbformat.v4.new_markdown_cell, ["Before the title.", "# A title\n\nThe prose.", "# Another"]
    )
    nbformat.write(source, root / "notebooks" / "late.ipynb")
    late, none = (pages.failed_page(job, "too hot") for job in plan(root, "quick"))
    assert [cell.source for cell in late.cells if "too hot" in cell.source] == [
        "# A title" + pages.FAILED.format("too hot") + "\n\nThe prose."
    ]
    assert none.cells[0].source == "# none" + pages.FAILED.format("too hot")


def test_a_reason_cannot_end_the_box_it_is_in(tmp_path):
    [job] = plan(make_root(tmp_path, a=["1 / 0"]), "quick")
    page = pages.failed_page(job, "too hot\n:::\n ~~~~\nby far").cells[0].source
    tokens = create_md_parser(MdParserConfig(enable_extensions={"colon_fence"}), SphinxRenderer).parse(page)
    [box] = [token for token in tokens if token.type == "colon_fence"]
    assert "too hot\n    :::\n    ~~~~\nby far\n~~~~\n" in box.content
    assert 'read "(not computed)"' in box.content


@pytest.mark.parametrize(
    ("gib", "cores", "profile", "number"),
    [
        (24, 2, "cpu", 2),
        (24, 64, "cpu", 2),
        (16, 2, "cpu", 1),
        (8, 2, "quick", 1),
        (64, 4, "quick", 4),
        (512, 8, "gpu", 1),
    ],
)
def test_as_many_notebooks_run_at_a_time_as_the_machine_allows(monkeypatch, gib, cores, profile, number):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=gib * 2**30))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert schedule.notebooks_at_once(profile) == number


def test_a_notebook_named_twice_runs_once(tmp_path):
    root = make_root(tmp_path, a=["1"])
    assert [job.name for job in plan(root, "quick", ["a", "a"])] == ["a"]


def test_processes_that_end_while_they_are_stopped_are_no_obstacle(tmp_path, monkeypatch):
    class Gone:
        def kill(self):
            raise psutil.NoSuchProcess(1)

    children = psutil.Process.children
    monkeypatch.setattr(psutil.Process, "children", lambda *a, **k: [Gone(), *children(*a, **k)])
    monkeypatch.setitem(schedule.LIMIT_SECONDS, "quick", 5.0)
    root = make_root(tmp_path, slow=["import time\ntime.sleep(600)"])
    assert "stopped after 0 minutes" in run_notebooks(root, "quick")["slow"]


def test_a_notebook_that_hangs_is_stopped(tmp_path, monkeypatch):
    root = make_root(tmp_path, slow=["# waits\nimport time\ntime.sleep(600)"])
    monkeypatch.setitem(schedule.LIMIT_SECONDS, "quick", 15.0)
    failures = run_notebooks(root, "quick")
    assert "stopped after 0 minutes" in failures["slow"]


def test_a_dead_kernel_is_a_failure_of_its_cell(tmp_path):
    root = make_root(tmp_path, killed=["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"])
    failure = run_notebooks(root, "quick")["killed"]
    assert failure.startswith("cell 2 (import os, signal)")
    assert "Kernel died" in failure


def test_progress_names_the_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "PROGRESS_SECONDS", 0.5)
    root = make_root(tmp_path, slow=["import time\ntime.sleep(3)"])
    run_notebooks(root, "quick")
    assert "\nslow: at cell 2 (import time)" in capsys.readouterr().out


def test_what_the_terminal_has_no_letters_for_is_said_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(make_root(tmp_path, λ=["1"]))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["--only", "λ"]) == 0
    assert b"\n\\u03bb: started\n" in terminal.buffer.getvalue()


def test_unknown_names_are_errors(tmp_path, capsys, monkeypatch):
    root = make_root(tmp_path, a=["1"])
    with pytest.raises(ValueError, match="'huge': choose one of quick, cpu, gpu"):
        plan(root, "huge")
    with pytest.raises(ValueError, match="no notebook b: choose from a"):
        plan(root, "quick", ["b"])
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit):
        main(["--profile", "huge"])
    assert "quick" in capsys.readouterr().err


def test_an_unknown_parameter_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PARAMETERS", 'profile = "quick"')
    root = make_root(tmp_path, a=["1"])
    with pytest.raises(ValueError, match=r"a\.ipynb has no parameter results"):
        run_notebooks(root, "quick")


def test_a_missing_chapter_is_an_error(tmp_path):
    root = make_root(tmp_path, a=["1"])
    (root / "notebooks" / "a.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.ipynb"):
        plan(root, "quick")


@pytest.mark.parametrize(
    "sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "terminated", "terminal closed"]
)
def test_interrupted_it_stops_the_kernel_and_keeps_nothing(tmp_path, sign):
    cell = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    root = make_root(tmp_path, slow=[cell])
    build = subprocess.Popen(
        [sys.executable, "-m", "unlearnlib.book.build"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A shell starts background jobs with Ctrl-C ignored, and we may be in one: the build shall not be.
        preexec_fn=lambda: signal.signal(sign, signal.SIG_DFL),
    )
    written = root / "notebooks" / "pid"
    deadline = time.monotonic() + 60
    while not (written.exists() and written.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    build.send_signal(sign)
    assert build.wait(timeout=30) != 0
    kernel = int(written.read_text())
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE
    assert not is_done(plan(root, "quick")[0])
