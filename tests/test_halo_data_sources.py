"""Which files are read: a wrong source is one line, and a run's results are never its text."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from halo_text import all_texts, compress_zstd, make_corpus, write_lines, write_texts
from halo_tiny import documents

from halo.data.local import DEMO_MARK
from halo.settings import HaloError


def lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "data.source: must be an existing file or directory, got missing.txt"),
        ("missing.jsonl.gz", "data.source: must be an existing file or directory, got missing.jsonl.gz"),
        ("./nowhere", "data.source: must be an existing file or directory, got ./nowhere"),
        (
            "{tmp}/*/none*",
            "data.source: must hold files ending in .txt, .md, .rst, .jsonl, .ndjson, .json, .parquet, got none",
        ),
        ("{tmp}/empty", "data.source: must hold files ending in .txt"),
        ("{tmp}/image.png", "data.source: must end in one of .txt"),
        ("{tmp}/pipe", "data.source: must be a regular file or a directory"),
        ("/dev/zero", "data.source: must be a regular file or a directory"),
        ("{tmp}/blank.txt", "data.source: must hold text, got none in"),
        ("{tmp}/cut.jsonl.gz", "cut.jsonl.gz: must be readable, got Compressed file ended"),
        ("{tmp}/cut.jsonl.zst", "cut.jsonl.zst: must be readable, got Truncated compressed stream"),
        ("{tmp}/no.jsonl.gz", "no.jsonl.gz: must be readable, got Not a gzipped file"),
        ("{tmp}/no.parquet", "no.parquet: must be readable, got"),
    ],
)
def test_wrong_source_is_one_line(tokenizer, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(documents(40)))[:-40])
    (tmp_path / "cut.jsonl.zst").write_bytes(compress_zstd(lines(documents(40)))[:-40])
    (tmp_path / "no.jsonl.gz").write_bytes(lines(documents(2)))
    (tmp_path / "no.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HaloError) as error:
        make_corpus(tokenizer, source.format(tmp=tmp_path)).prepare()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pipes_loops_and_devices_in_a_folder_are_not_read(tokenizer, tmp_path):
    write_texts(tmp_path / "in", documents(30))
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    (tmp_path / "in" / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "in" / "around").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere.txt")
    assert sorted(all_texts(make_corpus(tokenizer, tmp_path / "in"))) == sorted(documents(30))


def test_outputs_are_never_inputs(tokenizer, tmp_path):
    texts = documents(30)
    write_texts(tmp_path, texts)
    out = tmp_path / "runs" / "one"
    for source in (tmp_path, tmp_path / "**" / "*"):
        text = make_corpus(tokenizer, source, cache=out / "data")
        text.prepare()
        first = text.fingerprint
        write_lines(out / "align" / "metrics.jsonl", [{"step": 1, "text": "never to be read"}])
        (out / "selection.json").write_text('{"text": "never to be read"}')
        again = make_corpus(tokenizer, source, cache=out / "data")
        assert sorted(all_texts(again)) == sorted(texts) and again.fingerprint == first
        # Nor does another run read them.
        other = make_corpus(tokenizer, source, cache=tmp_path / "two" / "data")
        assert sorted(all_texts(other)) == sorted(texts) and other.fingerprint == first
    # Nor what else may lie there: results of the demo, an exported model or a teacher.
    write_texts(tmp_path / "demo", ["never to be read"])
    (tmp_path / "demo" / DEMO_MARK).touch()
    model = tmp_path / "teachers" / "small"
    write_lines(model / "README.jsonl", [{"text": "never to be read"}])
    (model / "config.json").write_text('{"text": "never to be read"}')
    (model / "model.safetensors").touch()
    for source in (tmp_path, tmp_path / "**" / "*"):
        assert sorted(all_texts(make_corpus(tokenizer, source, cache=tmp_path / "two" / "data"))) == sorted(texts)
    (model / "model.safetensors").unlink()  # Without weights it is no model, and its files are text.
    assert len(all_texts(make_corpus(tokenizer, tmp_path, cache=tmp_path / "three" / "data"))) == len(texts) + 2
    with pytest.raises(
        HaloError, match=r"data.source: must be another directory than the run's output, got .* for both"
    ):
        make_corpus(tokenizer, tmp_path, cache=tmp_path / "data")


def test_directory_that_cannot_be_read_is_one_line(tokenizer, tmp_path, monkeypatch):
    write_texts(tmp_path / "in" / "closed", documents(5))
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(HaloError, match=r"in: must be readable, got Permission denied$"):
        make_corpus(tokenizer, tmp_path / "in")


def test_text_inside_the_output_folder_that_is_asked_for_is_read(tokenizer, tmp_path):
    write_texts(tmp_path / "out" / "my text", documents(30))
    text = make_corpus(tokenizer, tmp_path / "out" / "my text", cache=tmp_path / "out" / "data")
    assert len(all_texts(text)) == 30


def test_locale_does_not_matter(tokenizer, tmp_path):
    """Files are UTF-8 whatever the locale says."""
    (tmp_path / "a.txt").write_text("Stra\xdfe " * 50, encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from halo.data.formats import FileReader;"
        f"print(ascii(next(FileReader(Path({str(tmp_path / 'a.txt')!r}), 'text', 9999).items())[1][:6]))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "'Stra\\xdfe'\n", result.stderr
