"""What a corpus gives to the stages, and what its fingerprint is bound to."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from halo_text import make_corpus, texts_of, write_texts
from halo_tiny import documents, tiny_tokenizer
from pydantic import ValidationError

from halo.config import load_config, make_config
from halo.data import SPLITS, DataSettings
from halo.settings import HaloError


def test_held_out_text_is_never_trained_on(tokenizer, text_directory):
    text = make_corpus(tokenizer, text_directory, held_out=0.3)
    sides = [set(texts_of(text, split)) for split in SPLITS]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 60 and all(len(side) > 3 for side in sides)
    train = " ".join(sides[0])
    for split in ("choose", "judge"):
        assert not any(part in train for part in texts_of(text, split))
    samples = text.samples(48)
    seen = {tuple(row) for row in samples.batch(0, 200).input_ids.tolist()}
    own = text.store("train").stream()
    assert all(np.isin(row, own).all() for row in seen)


def test_chunks_of_a_side(tokenizer, text_directory):
    text = make_corpus(tokenizer, text_directory, held_out=0.4)
    for split in ("choose", "judge"):
        chunks = text.chunks(split, 4, 24)
        assert chunks.shape == (4, 24) and chunks.dtype == torch.int64
        assert torch.equal(chunks, text.chunks(split, 4, 24))
        assert len(text.chunks(split, 10**6, 24)) == text.count_chunks(split, 24)
    with pytest.raises(
        HaloError, match=r"data.held_out: must leave at least two chunks of 99999 tokens .*, got 0 on the side"
    ):
        text.chunks("judge", 2, 99_999)


def test_each_side_has_its_own_task_stream_and_episodes(tokenizer, text_directory):
    text = make_corpus(tokenizer, text_directory, held_out=0.3)
    streams = [text.stream(split) for split in SPLITS]
    for split, stream in zip(SPLITS, streams, strict=True):
        store = text.store(split)
        assert stream.dtype == np.int64 and len(stream) == store.num_tokens
        assert np.array_equal(stream[: store.length[0]], store.document(0))
        assert np.array_equal(text.task(split).haystack, stream)
    ids = {split: text.episodes(3, split)(7, 200) for split in SPLITS}
    assert np.array_equal(ids["choose"], text.episodes(3, "choose")(7, 200)) and len(ids["choose"]) == 200
    answers = [tokenizer.decode(row).rsplit(" is ", 1)[1] for row in ids.values()]
    assert len(set(answers)) == 3  # not the same needles in other text
    with pytest.raises(ValueError, match="split must be one of train, choose, judge, got 'heldout'"):
        text.store("heldout")


def test_stream_of_a_large_side_is_its_first_documents(tokenizer, text_directory, monkeypatch):
    text = make_corpus(tokenizer, text_directory)
    whole = text.stream("train")
    monkeypatch.setattr("halo.data.corpus.STREAM_TOKENS", 300)
    part = text.stream("train")
    assert 300 <= len(part) < 500 and np.array_equal(part, whole[: len(part)])


def change_text(directory):
    (directory / "more.txt").write_text("quiet river " * 50)


def change_word(directory):
    path = directory / "003.txt"
    path.write_text(path.read_text().replace("river", "stone", 1))


def test_fingerprint_is_that_of_text_tokenizer_and_settings(tokenizer, tmp_path):
    directory = write_texts(tmp_path / "text", documents(40))
    cache = tmp_path / "cache"
    make = lambda **options: make_corpus(tokenizer, directory, cache=cache, **options).fingerprint  # noqa: E731
    first = make()
    assert make() == first == make_corpus(tokenizer, directory).fingerprint
    assert make(workers=1, max_skipped=0.5, seed=3) == first  # how, not what; seeds are the stages'
    for path in directory.iterdir():  # the same text, copied later
        os.utime(path, (1, 1))
    assert make() == first
    # The same text elsewhere.
    assert make_corpus(tokenizer, write_texts(tmp_path / "other", documents(40))).fingerprint == first
    different = [make(held_out=0.2), make(needle_ratio=0.5), make(isolate_documents=True), make(max_document=1000)]
    different[3:] = [make(max_document=1000)] if max(map(len, documents(40))) > 1000 else []
    for change in (change_text, change_word):
        change(directory)
        different.append(make())
    from halo.demo.train_teacher import train_tokenizer

    other = train_tokenizer(documents(10, seed=4), seed=0)
    different.append(make_corpus(other, directory, cache=cache).fingerprint)
    assert len({first, *different}) == len(different) + 1
    entries = [{"source": str(directory), "weight": 1}, {"source": str(tmp_path / "other"), "weight": 2}]
    two = make_corpus(tokenizer, entries).fingerprint
    entries[1]["weight"] = 3
    assert make_corpus(tokenizer, entries).fingerprint not in (two, first)


def test_tokens_are_kept_and_follow_text_and_tokenizer(tokenizer, tmp_path, monkeypatch):
    directory = write_texts(tmp_path / "text", documents(12))
    make = lambda: make_corpus(tokenizer, directory, cache=tmp_path / "cache").store("train").num_tokens  # noqa: E731
    first = make()
    with monkeypatch.context() as patch:
        patch.setattr("halo.data.workers.make_shard", None)  # nothing is tokenised a second time
        assert make() == first
    change_text(directory)
    assert make() > first


def test_files_that_are_gone_are_noticed(tokenizer, tmp_path):
    directory = write_texts(tmp_path / "text", documents(12))
    first = make_corpus(tokenizer, directory, cache=tmp_path / "cache").fingerprint
    (directory / "003.txt").unlink()
    assert make_corpus(tokenizer, directory, cache=tmp_path / "cache").fingerprint != first
    for path in directory.iterdir():
        path.unlink()
    with pytest.raises(HaloError, match=r"^data.source: must hold files ending in"):
        make_corpus(tokenizer, directory, cache=tmp_path / "cache")


def test_other_processes_read_what_one_prepared(tokenizer, text_directory, tmp_path, monkeypatch):
    first = make_corpus(tokenizer, text_directory, cache=tmp_path)
    first.prepare()
    for part in ("make_shard", "write_shard"):
        monkeypatch.setattr(f"halo.data.workers.{part}", None)
    other = make_corpus(tokenizer, text_directory, cache=tmp_path)
    assert torch.equal(other.samples(64).batch(0, 3).input_ids, first.samples(64).batch(0, 3).input_ids)


def test_tokenizer_without_eos_is_refused(text_directory):
    without = tiny_tokenizer()
    without.eos_token = None
    with pytest.raises(HaloError, match="EOS"):
        make_corpus(without, text_directory)


@pytest.mark.parametrize(
    "source",
    ["stdlib", [{"source": "a", "weight": 2.0}, {"source": "b/c", "subset": "x", "split": "test", "field": "body"}]],
)
def test_sources_are_written_as_they_were_given(source):
    settings = DataSettings(source=source)
    assert settings.model_dump(mode="json")["source"] == source
    assert DataSettings(**settings.model_dump(mode="json")) == settings


def test_keys_of_a_source_default_to_those_of_the_section():
    entries = [{"source": "a", "weight": 3}, {"source": "b", "subset": "y", "split": "test", "field": "body"}]
    first, second = DataSettings(source=entries, subset="x", field="content").sources()
    assert (first.weight, first.subset, first.split, first.field) == (0.75, "x", "train", "content")
    assert (second.weight, second.subset, second.split, second.field) == (0.25, "y", "test", "body")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": 5}, "data.source: must be a string or a list of {source, weight, subset, split, field}, got 5"),
        ({"source": []}, "data.source: must be a string or a list"),
        ({"source": ""}, "data.source.0.source: must have at least 1 character, got ''"),
        ({"source": [{"source": "a", "weight": 0}]}, "data.source.0.weight: must be greater than 0, got 0"),
        ({"source": [{"weight": 1}]}, "data.source.0.source: must be given"),
        ({"source": [{"source": "a", "wieght": 1}]}, "data.source.0.wieght: is not a key of this section"),
        ({"source": "a", "max_skipped": 2}, "data.max_skipped: must be less than or equal to 1, got 2"),
        ({"source": "a", "workers": 0}, "data.workers: must be greater than 0, got 0"),
        ({"source": "a", "held_out": 1}, "data.held_out: must be less than 1, got 1"),
    ],
)
def test_wrong_settings_name_their_key(data, message):
    with pytest.raises(HaloError) as error:
        make_config({"teacher": "demo", "out": "out", "data": data})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_are_immutable():
    with pytest.raises(ValidationError):
        load_config("demo").data.held_out = 0.5


def test_settings_need_neither_torch_nor_transformers():
    code = (
        "import sys, halo.data, halo.data.settings; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"
