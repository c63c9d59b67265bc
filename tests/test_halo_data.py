"""Chunks contain every token once per epoch, with document boundaries, and resume at the next batch."""

import json
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from halo_tiny import documents, tiny_tokenizer

from halo.config import DataSettings, HaloError, load_config
from halo.data import Batch, Corpus, PackedOrder, StreamedChunks, TokenStore
from halo.demo import corpus as standard_library
from halo.sources import is_held_out, open_source

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("some text")
    for i, text in enumerate(documents()):
        (directory / f"{i}.txt").write_text(text)
    return directory


def corpus(tokenizer, source, **options):
    settings = {key: options.pop(key) for key in list(options) if key in DataSettings.model_fields}
    return Corpus(DataSettings(source=str(source), **settings), tokenizer, **options)


def take(loader, count):
    return [(batch.input_ids, batch.document_ids) for batch in islice(loader, count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for (ids, document_ids), (other_ids, other_documents) in zip(batches, others, strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(document_ids, other_documents)


def test_an_epoch_is_every_token_once_with_its_document(tokenizer):
    store = TokenStore.build(documents(20), tokenizer)
    order = PackedOrder(store, LENGTH, seed=5, epoch=0)
    # Undo the shuffle of the chunks: the documents must come back whole, in the epoch's order, cut at the two ends.
    chunks = [order.chunk(int(i)) for i in np.argsort(order.chunks)]
    packed = np.concatenate([ids for ids, _ in chunks])
    laid_out = np.concatenate([store.document(i) for i in order.documents])
    assert np.array_equal(packed, laid_out[order.shift : order.shift + len(packed)])
    assert len(packed) > len(store.tokens) - 2 * LENGTH
    for ids, document_ids in chunks:
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        steps = np.flatnonzero(np.diff(document_ids))
        assert document_ids[0] == 0 and np.array_equal(steps, ends[ends < LENGTH - 1])


def test_documents_end_in_eos_and_decode_to_their_text(tokenizer):
    texts = documents(5)
    store = TokenStore.build(texts, tokenizer)
    assert len(store) == 5
    for i, text in enumerate(texts):
        *ids, last = store.document(i).tolist()
        assert last == tokenizer.eos_token_id and tokenizer.decode(ids) == text


def test_epochs_and_seeds_differ(tokenizer):
    store = TokenStore.build(documents(20), tokenizer)
    orders = [PackedOrder(store, LENGTH, seed, epoch).documents.tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3


def test_same_seed_same_batches(tokenizer, text_directory):
    loaders = [corpus(tokenizer, text_directory, seed=seed).batches(LENGTH, 3) for seed in (1, 1, 2)]
    first, again, other = (take(loader, 4) for loader in loaders)
    assert_same(first, again)
    assert not torch.equal(first[0][0], other[0][0])


def test_stages_see_different_orders(tokenizer, text_directory):
    text = corpus(tokenizer, text_directory)
    first, second = (take(text.batches(LENGTH, 3, offset=offset), 1) for offset in (1, 2))
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize("needle_ratio", [0.0, 0.4])
@pytest.mark.parametrize("consumed", [1, 5, 300])
def test_resume_continues_with_the_next_batch(tokenizer, text_directory, consumed, needle_ratio):
    make = lambda: corpus(tokenizer, text_directory, needle_ratio=needle_ratio).batches(64, 2)  # noqa: E731
    reference = make()
    iterator = iter(reference)
    for _ in range(consumed):
        next(iterator)
    state = reference.state_dict()
    expected = [(batch.input_ids, batch.document_ids) for batch in islice(iterator, 5)]
    resumed = make()
    resumed.load_state_dict(state)
    assert_same(take(resumed, 5), expected)


def streamed(tokenizer, buffer=7):
    rows = datasets.Dataset.from_dict({"text": documents(40)}).to_iterable_dataset(num_shards=4)
    encode = lambda row: [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]  # noqa: E731
    options = {"length": LENGTH, "batch": 2, "seed": 0, "needle_ratio": 0.0, "episode": None}
    return StreamedChunks(rows.shuffle(seed=0, buffer_size=1), encode, buffer, **options)


@pytest.mark.parametrize("consumed", [1, 30, 130])
def test_a_stream_resumes_with_its_shuffle_buffer(tokenizer, consumed):
    reference = streamed(tokenizer)
    iterator = iter(reference)
    for _ in range(consumed):
        next(iterator)
    state = reference.state_dict()
    expected = take(iterator, 5)
    resumed = streamed(tokenizer)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 5), expected)


def test_a_stream_is_shuffled_but_complete(tokenizer):
    stream = streamed(tokenizer)
    seen = torch.cat([ids for ids, _ in take(stream, 40)])
    straight = torch.cat([ids for ids, _ in take(streamed(tokenizer, buffer=1), 44)])
    lines = {tuple(row) for row in straight.tolist()}
    assert not torch.equal(seen[:10], straight[:10]) and all(tuple(row) in lines for row in seen.tolist())
    assert len({tuple(row) for row in seen.tolist()}) == len(seen)


def test_jsonl_file_directory_and_text_hold_the_same_documents(tokenizer, text_directory, tmp_path):
    lines = [json.dumps({"body": text}) for text in documents()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:25]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[25:]))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    expected = sorted(documents())
    for source, field in ((text_directory, "text"), (tmp_path, "body")):
        text = corpus(tokenizer, source, field=field, held_out=0.3)
        held_out, train = list(text.held_out_texts()), list(text.source.texts(held_out=False))
        assert sorted(held_out + train) == expected and 5 < len(held_out) < 35
    single = corpus(tokenizer, tmp_path / "a.jsonl", field="body", held_out=0.3)
    assert len(list(single.held_out_texts())) + len(list(single.source.texts(held_out=False))) == 25


def test_standard_library_is_split_by_held_out():
    split = {share: open_source(DataSettings(source="stdlib", held_out=share)) for share in (0.0625, 0.25)}
    everything = sorted(standard_library.documents("train") + standard_library.documents("heldout"))
    for share, source in split.items():
        held_out, train = list(source.texts(held_out=True)), list(source.texts(held_out=False))
        assert sorted(held_out + train) == everything
        assert 0.5 * share < len(held_out) / len(everything) < 1.5 * share
    assert list(split[0.0625].texts(held_out=True)) == standard_library.documents("heldout")
    assert set(standard_library.documents("heldout")) < set(split[0.25].texts(held_out=True))
    assert split[0.0625].fingerprint() != split[0.25].fingerprint()


def test_demo_holds_out_what_its_teacher_was_not_trained_on():
    assert load_config("demo").data.held_out == standard_library.HELDOUT_SHARE


def test_held_out_text_is_never_trained_on(tokenizer, text_directory):
    text = corpus(tokenizer, text_directory, held_out=0.3)
    train, held_out = (text.store(held_out=side) for side in (False, True))
    as_texts = lambda store: {tokenizer.decode(store.document(i)[:-1]) for i in range(len(store))}  # noqa: E731
    assert as_texts(train).isdisjoint(as_texts(held_out))
    assert all(is_held_out(document, 0.3) for document in as_texts(held_out))
    chunks = text.held_out_chunks(4, LENGTH)
    assert chunks.shape == (4, LENGTH) and chunks.dtype == torch.int64


def test_long_documents_are_beginnings_of_held_out_documents(tokenizer, text_directory):
    text = corpus(tokenizer, text_directory, held_out=0.3)
    store = text.store(held_out=True)
    starts = {tuple(store.document(i)[:40].tolist()) for i in range(len(store))}
    rows = text.held_out_documents(5, 40)
    assert rows.shape == (5, 40) and all(tuple(row) in starts for row in rows.tolist())
    with pytest.raises(
        HaloError, match=r"scale.length: must be at most the longest held-out document \(\d+\), got 9999"
    ):
        text.held_out_documents(5, 9999)


def test_share_of_episodes(tokenizer, text_directory):
    loader = corpus(tokenizer, text_directory, needle_ratio=0.5).batches(128, 20)
    (ids, _), *_ = take(loader, 1)
    episodes = sum("The magic number for" in tokenizer.decode(row) for row in ids)
    assert 5 <= episodes <= 15
    assert ids.shape == (20, 128)


def test_tokens_are_cached_and_the_cache_follows_text_and_tokenizer(tokenizer, tmp_path):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(documents(12)):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    size = lambda: len(corpus(tokenizer, tmp_path / "text", cache=tmp_path / "cache").store(held_out=False).tokens)  # noqa: E731
    first = size()
    assert size() == first and len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "text" / "more.txt").write_text("quiet river " * 50)
    assert size() > first and len(list((tmp_path / "cache").iterdir())) == 2


def test_standard_library_is_a_source(tokenizer, monkeypatch):
    monkeypatch.setattr("halo.demo.corpus.documents", lambda split, share: [f"{split} text {i}" for i in range(3)])
    text = corpus(tokenizer, "stdlib")
    assert list(text.held_out_texts()) == [f"heldout text {i}" for i in range(3)]


def test_cu_seqlens_of_a_batch():
    batch = Batch(torch.zeros(2, 5, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    assert batch.cu_seqlens().tolist() == [0, 2, 5, 10] and batch.cu_seqlens().dtype == torch.int32
    assert [part.input_ids.shape[0] for part in batch.split(1)] == [1, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "data.source: must be an existing file or directory, got missing.txt"),
        ("./nowhere", "data.source: must be an existing file or directory, got ./nowhere"),
        ("{tmp}/empty", "data.source: must hold files ending in"),
        ("{tmp}/bad.jsonl", "bad.jsonl:2: must be a JSON object with the key text"),
    ],
)
def test_wrong_source_is_one_line(tokenizer, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(HaloError) as error:
        corpus(tokenizer, source.format(tmp=tmp_path)).batches(LENGTH, 1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreachable_dataset_is_one_line(tokenizer, monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(HaloError, match=r"got some/dataset \(Couldn't reach the Hub\)$"):
        corpus(tokenizer, "some/dataset")


def test_dataset_without_the_column_is_one_line(tokenizer, monkeypatch):
    rows = datasets.Dataset.from_dict({"body": documents(3), "id": [1, 2, 3]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split, streaming: rows)
    with pytest.raises(HaloError, match=r"data.field: must name a column of text, one of body, id, got text"):
        next(iter(corpus(tokenizer, "some/dataset").batches(LENGTH, 1)))


def test_too_little_text_is_one_line(tokenizer, text_directory):
    with pytest.raises(HaloError, match="data: must hold at least one chunk of 99999 tokens, got"):
        corpus(tokenizer, text_directory).batches(99_999, 1)


def test_tokenizer_without_eos_is_refused(tokenizer, text_directory):
    without = tiny_tokenizer()
    without.eos_token = None
    with pytest.raises(HaloError, match="EOS"):
        corpus(without, text_directory)


def test_a_dataset_by_name_streams_and_resumes(tokenizer, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": documents(60)}).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split, streaming: rows)
    options = {"held_out": 0.3, "shuffle_buffer": 5, "needle_ratio": 0.2}
    reference = corpus(tokenizer, "some/dataset", **options)
    loader = reference.batches(150, 2)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    expected = take(iterator, 4)
    resumed = corpus(tokenizer, "some/dataset", **options).batches(150, 2)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), expected)
    held_out = list(reference.held_out_texts())
    assert held_out and all(is_held_out(text, 0.3) for text in held_out)
    seen = " ".join(tokenizer.decode(row) for ids, _ in expected for row in ids)
    assert not any(text in seen for text in held_out)
