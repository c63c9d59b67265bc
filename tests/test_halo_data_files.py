"""Every kind of file is read as what it is; what is no text is skipped, counted and named, or refused in one line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from halo_text import all_texts, compress_zstd, make_corpus, write_lines, write_texts
from halo_tiny import documents

from halo.settings import HaloError


def lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, texts, key="text"):
    table = pyarrow.table({"id": list(range(len(texts))), key: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


KINDS = {
    "a.jsonl": lambda path, texts: path.write_bytes(lines(texts)),
    "a.JSONL": lambda path, texts: path.write_bytes(lines(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(compress_zstd(lines(texts))),
    "two frames.jsonl.zst": lambda path, texts: path.write_bytes(
        compress_zstd(lines(texts[:9])) + compress_zstd(lines(texts[9:]))
    ),
    "a.json": lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts], indent=1)),
    "lines.json": lambda path, texts: path.write_bytes(lines(texts)),
    "a.json.gz": lambda path, texts: path.write_bytes(gzip.compress(json.dumps([{"text": t} for t in texts]).encode())),
    "a.parquet": write_parquet,
    "utf8 mark.jsonl": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf" + lines(texts)),
    "utf16.jsonl": lambda path, texts: path.write_text(lines(texts).decode(), encoding="utf-16"),
    "utf16le.jsonl": lambda path, texts: path.write_text(lines(texts).decode(), encoding="utf-16-le"),
    "utf16be.jsonl": lambda path, texts: path.write_text(lines(texts).decode(), encoding="utf-16-be"),
    "utf32.jsonl": lambda path, texts: path.write_text(lines(texts).decode(), encoding="utf-32"),
    "windows.jsonl": lambda path, texts: path.write_bytes(lines(texts).replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("name", KINDS)
def test_file_of_records_alone_in_a_folder_and_by_glob(tokenizer, tmp_path, name):
    texts = documents(25)
    path = tmp_path / "in" / name
    path.parent.mkdir()
    KINDS[name](path, texts)
    (path.parent / "image.png").write_bytes(b"\x89PNG\0")
    for source in (path, path.parent, tmp_path / "**" / name.replace("two", "t?o")):
        text = make_corpus(tokenizer, source, held_out=0.3)
        assert sorted(all_texts(text)) == sorted(texts)
        assert text.skipped == {"records": 25, "skipped": 0, "replaced": 0, "reasons": {}, "examples": []}


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.rst", "a.txt.gz", "a.md.zst", "utf16.txt", "mark.txt"])
def test_file_of_plain_text_is_one_document(tokenizer, tmp_path, name):
    text = "\n".join(documents(3))
    data = text.encode("utf-16") if name == "utf16.txt" else text.encode("utf-8-sig" if name == "mark.txt" else "utf-8")
    data = gzip.compress(data) if name.endswith(".gz") else compress_zstd(data) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    write_texts(tmp_path / "more", documents(40, seed=1))
    assert text in all_texts(make_corpus(tokenizer, tmp_path))
    alone = make_corpus(tokenizer, tmp_path / name)
    # A single document is cut into passages, which together are its text.
    assert sum(len(part) for part in all_texts(alone)) == len(text)


def test_field_names_the_text(tokenizer, tmp_path):
    texts = documents(12)
    (tmp_path / "a.jsonl").write_bytes(lines(texts[:6], "body"))
    write_parquet(tmp_path / "b.parquet", texts[6:], "body")
    assert sorted(all_texts(make_corpus(tokenizer, tmp_path, field="body"))) == sorted(texts)
    entry = {"source": str(tmp_path), "field": "body"}
    assert sorted(all_texts(make_corpus(tokenizer, [entry]))) == sorted(texts)


BAD_LINES = {
    '{"text": 5}\n': '"text" is a number, not a string or a chat',
    '{"text": ["a"]}\n': '"text" is a list, not a string or a chat',
    '{"text": null}\n': '"text" is null, not a string or a chat',
    '{"text": {"a": 1}}\n': '"text" is an object, not a string or a chat',
    '{"txt": "a"}\n': 'has no key "text", only txt',
    "{}\n": 'has no key "text", only none',
    "[1, 2]\n": "is a list, not a JSON object",
    '"text"\n': "is a string, not a JSON object",
    "3\n": "is a number, not a JSON object",
    '{"text": "cut of\n': "is not JSON",
    "plain words\n": "is not JSON",
    '{"text": "a\\u0000b"}\n': "holds zero bytes, so it is binary",
    "[" * 100_000 + "\n": "is nested too deep",
    '{"a":' * 5_000 + "1" + "}" * 5_000 + "\n": "is nested too deep",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:16].strip())
def test_bad_line_is_skipped_counted_and_named(tokenizer, tmp_path, bad):
    texts = documents(30)
    records = [{"text": text} for text in texts]
    path = write_lines(tmp_path / "a.jsonl", [*records[:10], bad, "\n", *records[10:]])
    text = make_corpus(tokenizer, path)
    assert sorted(all_texts(text)) == sorted(texts)
    reason = BAD_LINES[bad]
    assert text.skipped["records"] == 31 and text.skipped["skipped"] == 1 and text.skipped["reasons"] == {reason: 1}
    assert text.skipped["examples"] == [f"{path}:11: {reason}"]
    with pytest.raises(HaloError) as error:
        make_corpus(tokenizer, path, max_skipped=0.01).prepare()
    assert str(error.value) == (
        f"data.max_skipped: must be at least the share of records of {path} that cannot be read (1 of 31), got 0.01; "
        f"the first: {path}:11: {reason}"
    )


def test_too_many_bad_lines_are_an_error_before_all_are_read(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("halo.data.pieces.SHARD_CHARACTERS", 20_000)
    path = write_lines(tmp_path / "a.jsonl", ["3\n" if i % 5 == 0 else {"text": "word " * 20} for i in range(5000)])
    with pytest.raises(
        HaloError, match=r"\((2\d\d|3\d\d|4\d\d) of (1|2)\d\d\d\), got 0.05; the first: .*a.jsonl:1: is a n"
    ):
        make_corpus(tokenizer, path).prepare()


def test_no_line_with_the_key_is_one_line(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"body": text, "id": 1} for text in documents(4)])
    with pytest.raises(
        HaloError, match=r'\(4 of 4\), got 0.05; the first: .*a.jsonl:1: has no key "text", only body, id$'
    ):
        make_corpus(tokenizer, path).prepare()
    write_parquet(tmp_path / "b.parquet", documents(4), "body")
    with pytest.raises(
        HaloError, match=r"data.field: must name a column of text of .*b.parquet, one of id, body, got text"
    ):
        make_corpus(tokenizer, tmp_path / "b.parquet").prepare()


def test_lone_surrogate_is_replaced_and_a_pair_is_joined(tokenizer, tmp_path):
    records = ['{"text": "%s x \\ud83d y"}\n' % ("word " * 40), '{"text": "\\ud83d\\ude00 z"}\n']
    path = write_lines(tmp_path / "a.jsonl", [*records, *({"text": text} for text in documents(20))])
    text = make_corpus(tokenizer, path)
    texts = all_texts(text)
    assert "word " * 40 + " x \ufffd y" in texts and "\U0001f600 z" in texts and len(texts) == 22
    assert text.skipped["skipped"] == 0 and text.skipped["replaced"] == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_stray_byte_is_replaced_in_every_kind_of_file(tokenizer, tmp_path, name):
    words = "caf\xe9 " + "plain words " * 40
    data = words.encode("latin-1") if name == "a.txt" else b'{"text": "' + words.encode("latin-1") + b'"}\n'
    (tmp_path / name).write_bytes(data)
    write_lines(tmp_path / "good.jsonl", [{"text": text} for text in documents(20)])
    text = make_corpus(tokenizer, tmp_path)
    assert words.replace("\xe9", "\ufffd") in all_texts(text)
    assert text.skipped["replaced"] == 1 and text.skipped["skipped"] == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("d\xe9j\xe0 vu \xe0 l'\xe9t\xe9 ".encode("latin-1") * 30, "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 9, "holds zero bytes, so it is binary"),
    ],
)
def test_file_that_is_no_text_is_skipped_and_named(tokenizer, tmp_path, data, reason):
    write_lines(tmp_path / "good.jsonl", [{"text": text} for text in documents(30)])
    (tmp_path / "bad.txt").write_bytes(data)
    text = make_corpus(tokenizer, tmp_path)
    assert len(all_texts(text)) == 30
    assert text.skipped["examples"] == [f"{tmp_path / 'bad.txt'}:1: {reason}"]


def test_parquet_with_bytes_that_are_no_text(tokenizer, tmp_path):
    texts = documents(30)
    raw = [b"plain words \xff " + b"and more " * 50, *(text.encode() for text in texts)]
    column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert sorted(all_texts(make_corpus(tokenizer, tmp_path))) == sorted([*texts, raw[0].decode(errors="replace")])


def test_long_documents_are_cut_at_words(tokenizer, tmp_path):
    long = " ".join(documents(100))
    path = write_lines(tmp_path / "a.jsonl", [{"text": long}, *({"text": text} for text in documents(5, seed=1))])
    (tmp_path / "b.txt").write_text(long)
    for source in (path, tmp_path / "b.txt"):
        parts = [text for text in all_texts(make_corpus(tokenizer, source, max_document=1500)) if text in long]
        assert all(len(part) <= 1500 for part in parts) and sum(map(len, parts)) == len(long)
        assert len(parts) > len(long) / 1500 and all(part.endswith(" ") or long.endswith(part) for part in parts)


def test_one_line_of_many_megabytes_is_cut_and_reported(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("halo.data.pieces.SHARD_CHARACTERS", 600_000)
    line = " ".join(documents(2000, words=200))
    path = write_lines(tmp_path / "a.jsonl", [{"text": line}])
    text = make_corpus(tokenizer, path, max_document=100_000, workers=1)
    seen = []
    text.prepare(seen.append)
    assert len(line) > 2_500_000 and len(seen) >= 5
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen) and seen[-1].tokens == seen[-1].total
    assert all(p.tokens_per_second > 0 and p.remaining >= 0 for p in seen)
    assert abs(seen[0].total / seen[-1].tokens - 1) < 0.2  # the estimate is one from the start
    stores = [text.store(split) for split in ("train", "choose", "judge")]
    assert sum(store.num_tokens for store in stores) == seen[-1].tokens and len(stores[0]) > 10
    assert text.skipped["records"] == 1
