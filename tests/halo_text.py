"""Small corpora for the tests of halo.data."""

import json

import pyarrow
import torch

from halo.data import SPLITS, Corpus, DataSettings


def make_corpus(tokenizer, source, **options):
    """Return a Corpus; options are keys of `data` or arguments of Corpus."""
    settings = {key: options.pop(key) for key in list(options) if key in DataSettings.model_fields}
    source = source if isinstance(source, list) else str(source)
    return Corpus(DataSettings(source=source, **settings), tokenizer, **options)


def write_texts(directory, texts):
    directory.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (directory / f"{i:03d}.txt").write_text(text)
    return directory


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in records))
    return path


def compress_zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def texts_of(corpus, split):
    """Yield the documents of one side as text, decoded from their tokens."""
    store, tokenizer = corpus.store(split), corpus.tokenizer
    for index in range(len(store)):
        ids = store.document(index).tolist()
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        yield tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def all_texts(corpus):
    return [text for split in SPLITS for text in texts_of(corpus, split)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.document_ids, other.document_ids)
