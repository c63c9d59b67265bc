"""Three sides by hash, disjoint, with the asked share, and enough of each in a small corpus too."""

import numpy as np
import pytest
from halo_text import all_texts, make_corpus, texts_of, write_texts
from halo_tiny import documents

from halo.config import load_config
from halo.data.splits import CHOOSE, JUDGE, LEAST_TOKENS, TRAIN, split_documents
from halo.demo import corpus as standard_library

SPLITS = ("train", "choose", "judge")


def keys_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3])
def test_large_corpus_is_split_by_whole_documents(share):
    keys, lengths = keys_of(200_000), np.random.default_rng(1).integers(500, 1500, 200_000)
    parts = split_documents(keys, lengths, share)
    assert np.array_equal(parts.document, np.arange(200_000)) and np.array_equal(parts.length, lengths)
    held_out = keys.astype(float) / 2**64 < share
    assert np.array_equal(parts.side != TRAIN, held_out)
    for side in (CHOOSE, JUDGE):
        assert abs((parts.side == side).mean() / (share / 2) - 1) < 0.25


def test_larger_share_holds_out_what_a_smaller_one_does():
    keys, lengths = keys_of(50_000), np.full(50_000, 2000)
    small, large = (split_documents(keys, lengths, share).side != TRAIN for share in (0.01, 0.05))
    assert large[small].all() and large.sum() > 3 * small.sum()


SMALL = {
    "one book": [100_000],
    "one long book": [20_000_000],
    "a short text": [1000],
    "a hundred documents": [1000] * 100,
    "two documents": [40_000, 60_000],
    "a book and notes": [500_000] + [20] * 300,
    "short notes": [30] * 64,
}


@pytest.mark.parametrize("share", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("name", SMALL)
def test_small_corpus_has_enough_on_each_side(name, share):
    lengths = np.array(SMALL[name])
    total = int(lengths.sum())
    least = min(LEAST_TOKENS, total // 16)
    wanted = max(least, total * share / 2)
    for seed in range(20):
        parts = split_documents(keys_of(len(lengths), seed), lengths, share)
        sizes = [int(parts.length[parts.side == side].sum()) for side in (TRAIN, CHOOSE, JUDGE)]
        assert sum(sizes) == total
        assert min(sizes[1:]) >= least and sizes[0] > 0.4 * total
        if len(lengths) == 1:
            assert max(sizes[1:]) <= 2 * wanted + 1024
        # Every token of every document is in exactly one part.
        for document in range(min(len(lengths), 3)):
            mine = parts.document == document
            ends = parts.start[mine] + parts.length[mine]
            assert parts.start[mine][0] == 0 and ends[-1] == lengths[document]
            assert np.array_equal(ends[:-1], parts.start[mine][1:]) and (parts.length[mine] > 0).all()
            assert (np.diff(parts.side[mine]) != 0).all()  # neighbours on one side are one part


def test_nothing_to_split():
    parts = split_documents(np.zeros(0, np.uint64), np.zeros(0, np.int64), 0.01)
    assert len(parts.document) == 0


def test_one_percent_of_a_hundred_documents(tokenizer, tmp_path):
    """Whatever the documents, there is held-out text on both sides."""
    for seed in range(10):
        texts = documents(100, seed=seed)
        text = make_corpus(tokenizer, write_texts(tmp_path / str(seed), texts), held_out=0.01)
        assert sorted(all_texts(text)) == sorted(texts)  # whole documents
        assert all(2 <= len(text.store(split)) <= 12 for split in ("choose", "judge"))
        assert text.chunks("judge", 4, 32).shape == (4, 32)


def test_a_book_of_one_file_has_held_out_text(tokenizer, tmp_path):
    book = "\n\n".join(documents(400))
    (tmp_path / "book.txt").write_text(book)
    text = make_corpus(tokenizer, tmp_path / "book.txt", held_out=0.01)
    for split in ("choose", "judge"):
        assert text.chunks(split, 8, 64).shape == (8, 64)
        assert text.store(split).length.max() >= 64
        assert all(part in book for part in texts_of(text, split))
    # Each part of the book is on one side only.
    stores = [text.store(split) for split in SPLITS]
    assert sum(store.num_tokens for store in stores) == len(tokenizer(book)["input_ids"]) + 1
    marks = {
        split: {word for part in texts_of(text, split) for word in part.split() if word[:-1].isdigit()}
        for split in SPLITS
    }
    assert len(marks["choose"] & marks["train"]) + len(marks["judge"] & marks["train"]) < 20
    assert text.samples(64).batch(0, 2).input_ids.shape == (2, 64)


def test_equal_documents_are_on_the_same_side(tokenizer, tmp_path):
    texts = documents(80, words=400)
    text = make_corpus(tokenizer, write_texts(tmp_path, texts * 2), held_out=0.3)
    sides = [set(texts_of(text, split)) for split in SPLITS]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 80
    assert sum(len(text.store(split)) for split in SPLITS) == 160


def test_standard_library_is_split_by_the_names_of_its_documents(tokenizer, tmp_path, monkeypatch):
    named = [(name, text[:5000]) for name, text in standard_library.named_documents()]
    monkeypatch.setattr(standard_library, "named_documents", lambda: named)
    for share in (1 / 16, 1 / 4):
        text = make_corpus(tokenizer, "stdlib", held_out=share, cache=tmp_path)
        stores = {split: text.store(split) for split in SPLITS}
        names = {
            "train": [name for name, _ in named if not standard_library.is_heldout(name, share)],
            "choose": [name for name, _ in named if standard_library.is_heldout(name, share / 2)],
        }
        names["judge"] = [
            name
            for name, _ in named
            if standard_library.is_heldout(name, share) and not standard_library.is_heldout(name, share / 2)
        ]
        assert {split: len(store) for split, store in stores.items()} == {k: len(v) for k, v in names.items()}
        assert stores["train"].num_tokens > 10 * (1 / 16) / share * stores["judge"].num_tokens
        for split in ("choose", "judge"):
            first = next(body for name, body in named if name == names[split][0])
            assert next(texts_of(text, split)) == first
        if share == 1 / 16:
            assert len(names["choose"]) + len(names["judge"]) == len(standard_library.documents("heldout"))
            assert len(names["train"]) == len(standard_library.documents("train"))


def test_demo_holds_out_what_its_teacher_was_not_trained_on():
    assert load_config("demo").data.held_out == standard_library.HELDOUT_SHARE
