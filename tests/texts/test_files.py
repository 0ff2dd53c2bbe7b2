"""Files of texts, as erasure requests and corpora of one's own read them."""

import pytest

from unlearnlib.texts import files


def test_json_lines_may_have_a_byte_order_mark_and_any_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028two"}\r\n\r\n{"id": 3, "text": " three "}'.encode())
    assert files.read_texts(path) == ["one\u2028two", " three "]


def test_plain_texts_are_parted_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\nstill one\r\n \t\r\n\r\n\r\ntwo\n")
    assert files.read_texts(path) == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', "line 2 of a.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": "one"}\n\n{"txt": "two"}\n', "line 3 of a.jsonl is no JSON object"),
        ("a.jsonl", b'["one"]\n', "line 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": "one"}\n{"text": " \\n"}\n', "text in line 2 of a.jsonl is empty"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "text in line 1 of a.jsonl has half a character"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no texts"),
        ("a.txt", b"", "a.txt holds no texts"),
        ("a.txt", b"one\n\ntwo \xff\n", "line 3 of a.txt is not UTF-8"),
        ("a.txt", b'{"text": "one"}\n', "end in .jsonl"),
        ("a.txt", b'\n{ "text": "one" }\n{ "text": "two" }\n', "end in .jsonl"),
        ("a.txt", b'[\n  {"text": "one"},\n  {"text": "two"}\n]\n', "end in .jsonl"),
        ("a.txt", b'[{"text": "one"},\n{"text": "two"}]\n', "end in .jsonl"),
        ("a.txt", b"<!DOCTYPE html>\n<p>one</p>\n", "a.txt is HTML"),
        ("a.txt", b"%PDF-1.7\n1 0 obj\n", "a.txt is PDF"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.txt is a Git LFS pointer"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "line 1 of a.txt has a zero byte: it is in UTF-16"),
        ("a.csv", b"id,text\n1,one\n", "a.csv ends in .csv, which is read neither as"),
        ("a.parquet", b"PAR1", "a.parquet ends in .parquet"),
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz ends in .gz"),
        ("a.json", b'[{"text": "one"},\n{"text": "two"}]\n', "line 1 of a.json is no JSON object"),
    ],
)
def test_bad_files_are_errors_with_the_number_of_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_texts(path)


def test_plain_text_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "a.txt").write_text("[1] A footnote.\n\n{not JSON}\n")
    assert files.read_texts(tmp_path / "a.txt") == ["[1] A footnote.", "{not JSON}"]


@pytest.mark.parametrize("content", ["id\ttext\n1\tone\n2\ttwo\n", "one\ntwo\nthree\n"])
def test_lines_that_are_read_as_one_text_are_warned_about(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    [warning] = files.read_file(tmp_path / "a.txt").warnings
    assert "the 3 lines of a.txt are read as a single text" in warning
    (tmp_path / "b.txt").write_text("one\n\ntwo\nlines\n")
    assert files.read_file(tmp_path / "b.txt").warnings == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        files.read_texts(tmp_path / "nowhere.jsonl")
