"""Sample n depends on seed and n alone: all tokens once an epoch, exact shares and resumes, ranks that agree."""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from halo_text import assert_same, make_corpus, write_texts
from halo_tiny import documents

from halo.data import Batch, PackedOrder, Samples, TokenStore, batches, loading
from halo.data.samples import BLOCK, block_counts
from halo.settings import HaloError

LENGTH = 24


@pytest.fixture(scope="module")
def text(tokenizer, text_directory):
    return make_corpus(tokenizer, text_directory, needle_ratio=0.3)


def plain_samples(tokenizer, length=LENGTH, seed=(0,)):
    return Samples([TokenStore.build(documents(20), tokenizer)], [1.0], length, seed)


def test_an_epoch_is_every_token_once_with_its_document(tokenizer):
    store = TokenStore.build(documents(20), tokenizer)
    order = PackedOrder(store, LENGTH, seed=5, epoch=0)
    # Undo the shuffle of the chunks: the documents must come back whole, in the epoch's order, cut at the two ends.
    chunks = [order.chunk(int(i)) for i in np.argsort(order.chunks)]
    packed = np.concatenate([ids for ids, _ in chunks])
    laid_out = np.concatenate([store.document(i) for i in order.documents])
    assert np.array_equal(packed, laid_out[order.shift : order.shift + len(packed)])
    assert len(packed) > store.num_tokens - LENGTH
    for ids, document_ids in chunks:
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        steps = np.flatnonzero(np.diff(document_ids))
        assert document_ids[0] == 0 and np.array_equal(steps, ends[ends < LENGTH - 1])


def test_documents_end_in_eos_and_decode_to_their_text(tokenizer):
    texts = documents(5)
    store = TokenStore.build(texts, tokenizer)
    assert len(store) == 5 and store.num_tokens == len(store.stream())
    for i, text in enumerate(texts):
        *ids, last = store.document(i).tolist()
        assert last == tokenizer.eos_token_id and tokenizer.decode(ids) == text


def test_epochs_and_seeds_differ(tokenizer):
    store = TokenStore.build(documents(20), tokenizer)
    orders = [PackedOrder(store, LENGTH, seed, epoch).documents.tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3


def test_epochs_of_samples_hold_the_same_chunks_of_their_order(tokenizer):
    """The samples of each epoch are exactly its packed chunks, none twice and none left out."""
    samples = plain_samples(tokenizer)
    per_epoch = samples.stores[0].num_tokens // LENGTH
    for epoch in range(4):
        order = PackedOrder(samples.stores[0], LENGTH, (0, 0), epoch)

        wanted = sorted(tuple(order.chunk(i)[0]) for i in range(per_epoch))
        numbers = [n for n in range(BLOCK) if samples._deal(n)[1] // per_epoch == epoch]
        assert sorted(tuple(samples[n][0]) for n in numbers) == wanted


def test_sample_does_not_depend_on_what_was_read_before(text):
    samples = text.samples(64, stage=1)
    numbers = [0, 5000, 17, 4095, 4096, 123_456, 17, 0]
    for number in numbers:
        ids, document_ids = samples[number]
        other_ids, other_documents = text.samples(64, stage=1)[number]
        assert np.array_equal(ids, other_ids) and np.array_equal(document_ids, other_documents)


def test_seeds_and_stages_see_different_orders(tokenizer, text_directory):
    first, again, other = (make_corpus(tokenizer, text_directory, seed=seed).samples(LENGTH) for seed in (1, 1, 2))
    assert_same([first.batch(0, 12)], [again.batch(0, 12)])
    assert not torch.equal(first.batch(0, 12).input_ids, other.batch(0, 12).input_ids)
    text = make_corpus(tokenizer, text_directory)
    one, two = (text.samples(LENGTH, stage=stage).batch(0, 12).input_ids for stage in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("needle_ratio", [0.0, 0.4, 1.0])
def test_resume_continues_over_several_epochs(tokenizer, text_directory, needle_ratio):
    make = lambda: make_corpus(tokenizer, text_directory, needle_ratio=needle_ratio).samples(64)  # noqa: E731
    samples = make()
    uninterrupted = list(islice(batches(samples, 2), 500))
    assert 3 * (samples.stores[0].num_tokens // 64) < 200 * 2  # several epochs end after the resume
    for consumed in (1, 5, 60, 300):
        assert_same(list(islice(batches(make(), 2, start=consumed), 200)), uninterrupted[consumed : consumed + 200])


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_one_global_order(text, world):
    samples = text.samples(64)
    whole = list(islice(batches(samples, 6, start=3), 4))
    ranks = [list(islice(batches(text.samples(64), 6, 3, rank, world), 4)) for rank in range(world)]
    joined = [
        Batch(torch.cat([b.input_ids for b in parts]), torch.cat([b.document_ids for b in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)


def test_world_that_does_not_divide_the_batch_is_one_line(text):
    with pytest.raises(HaloError, match=r"^batch: must be a multiple of the number of processes \(4\), got 6$"):
        batches(text.samples(64), 6, world=4)


def test_background_loading_gives_the_same_batches_and_leaves_the_random_state(text, monkeypatch):
    expected = list(islice(batches(text.samples(64), 4, start=2), 5))
    monkeypatch.setattr(loading, "BACKGROUND_TOKENS", 1)
    state = torch.get_rng_state()
    loaded = batches(text.samples(64), 4, start=2)
    assert_same(list(islice(loaded, 5)), expected)
    loaded.close()
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_in_another_process_map_the_shards_again(text):
    samples = text.samples(64)
    packed = pickle.dumps(samples.stores)
    assert len(packed) < samples.stores[0].num_tokens * 4  # without the tokens
    again = pickle.loads(pickle.dumps(samples))
    assert_same([again.batch(7, 3)], [samples.batch(7, 3)])


def test_share_of_episodes(tokenizer, text_directory):
    samples = make_corpus(tokenizer, text_directory, needle_ratio=0.5).samples(128)
    ids = samples.batch(0, 60).input_ids
    episodes = sum("The magic number for" in tokenizer.decode(row) for row in ids)
    assert 18 <= episodes <= 42 and ids.shape == (60, 128)


@pytest.mark.parametrize("shares", [[0.3, 0.7], [0.5, 0.25, 0.25], [0, 0.1, 0.9], [1 / 3] * 3, [1e-9, 1 - 1e-9], [1.0]])
def test_shares_of_a_block(shares):
    counts = block_counts(np.array(shares))
    assert counts.sum() == BLOCK
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - share * BLOCK) <= 1 and (count > 0) == (share > 0)


def test_mixture_gives_each_source_its_share_and_its_own_order(tokenizer, tmp_path):
    sources = []
    for name, weight in (("alpha", 1), ("beta", 3), ("gamma", 0.5)):
        texts = [f"{name} " + text for text in documents(30, words=40, seed=weight)]
        sources.append({"source": str(write_texts(tmp_path / name, texts)), "weight": weight})
    mixed = make_corpus(tokenizer, sources, needle_ratio=0.2).samples(64)
    total = 4 * BLOCK
    kinds = np.array([mixed._deal(n)[0] for n in range(total)])
    expected = [0.2, 0.8 * 1 / 4.5, 0.8 * 3 / 4.5, 0.8 * 0.5 / 4.5]
    shares = np.bincount(kinds, minlength=4) / total
    assert np.abs(shares - expected).max() < 2 / BLOCK
    # A source's chunks come in the order that it has alone: the k-th of a source is its chunk k.
    for source in range(3):
        indices = [mixed._deal(n)[1] for n in np.flatnonzero(kinds == source + 1)]
        assert sorted(indices) == list(range(len(indices)))
        epoch = PackedOrder(mixed.stores[source], 64, (0, 0, source), 0)
        number = next(int(n) for n in np.flatnonzero(kinds == source + 1) if mixed._deal(n)[1] == 2)
        assert np.array_equal(mixed[number][0], epoch.chunk(2)[0])


def test_too_little_text_is_one_line(tokenizer, text_directory):
    with pytest.raises(HaloError, match=r"^data: must hold at least one chunk of 99999 tokens, got [0-9]+ from "):
        make_corpus(tokenizer, text_directory).samples(99_999)


def test_episode_that_does_not_fit_is_one_line(tokenizer, text_directory):
    with pytest.raises(HaloError, match=r"length must be at least [0-9]+ with this tokenizer, got 8$"):
        make_corpus(tokenizer, text_directory, needle_ratio=0.1).samples(8)


def test_cu_seqlens_of_a_batch():
    batch = Batch(torch.zeros(2, 5, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    assert batch.cu_seqlens().tolist() == [0, 2, 5, 10] and batch.cu_seqlens().dtype == torch.int32
    assert [part.input_ids.shape[0] for part in batch.split(1)] == [1, 1]
