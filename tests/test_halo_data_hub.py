"""Datasets of Hugging Face are streamed into shards, as far as tokens are needed; chats go through the template."""

import json
import time

import datasets
import pytest
from halo_text import all_texts, make_corpus, write_lines
from halo_tiny import documents, tiny_tokenizer

from halo.data import hub
from halo.data.shards import open_shard, read_header
from halo.settings import HaloError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("halo.data.pieces.SHARD_CHARACTERS", 4000)


@pytest.fixture
def serve(monkeypatch):
    """Make `load_dataset` return rows, and count how many are read."""

    def start(columns, shards=3, kind="memory", directory=None):
        reads = []

        def rows():
            if kind == "parquet":
                paths = []
                for shard in range(shards):
                    part = datasets.Dataset.from_dict({key: value[shard::shards] for key, value in columns.items()})
                    paths.append(str(directory / f"{shard}.parquet"))
                    part.to_parquet(paths[-1], batch_size=16)
                loaded = plain("parquet", data_files=paths, split="train", streaming=True)
            else:
                loaded = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=shards)
            return loaded.map(lambda row: reads.append(1) or row)

        plain = datasets.load_dataset
        monkeypatch.setattr(hub, "reach_dataset", lambda name: None)
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, split, streaming: rows())
        return reads

    return start


def test_whole_dataset_is_read_once(tokenizer, serve, tmp_path):
    texts = documents(60)
    reads = serve({"text": texts})
    text = make_corpus(tokenizer, "some/dataset", cache=tmp_path / "data", held_out=0.3)
    assert sorted(all_texts(text)) == sorted(texts) and len(reads) == 60
    again = make_corpus(tokenizer, "some/dataset", cache=tmp_path / "data", held_out=0.3)
    assert sorted(all_texts(again)) == sorted(texts) and len(reads) == 60 and again.fingerprint == text.fingerprint


def test_dataset_is_read_until_there_are_enough_tokens(tokenizer, serve, tmp_path):
    reads = serve({"text": documents(400)})
    make = lambda tokens: make_corpus(tokenizer, "some/dataset", cache=tmp_path, tokens=tokens, held_out=0.2, workers=1)  # noqa: E731
    sizes = {}
    for tokens in (2000, 9000, 9000):
        text = make(tokens)
        text.prepare()
        sizes[tokens] = sum(text.store(split).num_tokens for split in ("train", "choose", "judge"))
        assert tokens / 0.8 <= sizes[tokens] < tokens / 0.8 + 2000
        assert len(reads) < 400
    read = len(reads)
    first = make(9000)
    assert first.fingerprint == text.fingerprint and len(reads) == read
    # Fewer tokens are the beginning of the same shards, though more are there.
    assert sum(make(2000).store(split).num_tokens for split in ("train", "choose", "judge")) == sizes[2000]
    assert make(2000).fingerprint != first.fingerprint
    everything = make(10**9)
    assert sum(everything.store(split).num_tokens for split in ("train", "choose", "judge")) > 20_000


class Stop(Exception):
    pass


def content(cache):
    """Return what the shards hold, without the state of the reader of `datasets`, which depends on where it began."""
    found = {}
    for path in cache.rglob("*.tokens"):
        header, shard = read_header(path), open_shard(path)
        found[path.name] = (header.tally, header.digest, header.start and header.start[0]["row"], header.end[0]["row"])
        assert header.tokens == len(shard.tokens) > 0
    return found


@pytest.mark.parametrize("kind", ["memory", "parquet"])
@pytest.mark.parametrize("stops", [[1], [4, 2], [1, 1, 1, 9]])
def test_interrupted_stream_continues_at_the_next_row(tokenizer, serve, tmp_path, stops, kind):
    columns = {"text": [*documents(150), 5, *documents(150, seed=1)] if kind == "memory" else documents(301)}
    if kind == "memory":
        columns["text"] = [str(value) if value != 5 else None for value in columns["text"]]
    (tmp_path / "rows").mkdir()
    reads = serve(columns, kind=kind, directory=tmp_path / "rows")
    whole = make_corpus(tokenizer, "some/dataset", cache=tmp_path / "whole", workers=1)
    whole.prepare()
    shards = content(tmp_path / "whole")
    assert len(shards) > 20 and whole.skipped["skipped"] == (kind == "memory")
    reads.clear()
    for stop in stops:
        seen = []

        def interrupt(progress, seen=seen, stop=stop):
            seen.append(progress.tokens)
            if len(seen) == 2 * stop:
                raise Stop

        with pytest.raises(Stop):
            make_corpus(tokenizer, "some/dataset", cache=tmp_path / "cut", workers=1).prepare(interrupt)
    cut = make_corpus(tokenizer, "some/dataset", cache=tmp_path / "cut", workers=1)
    cut.prepare()
    assert content(tmp_path / "cut") == shards
    assert cut.fingerprint == whole.fingerprint and cut.skipped == whole.skipped
    assert len(reads) < 301 + 40 * (len(stops) + 1)  # it did not begin again
    # A shard that is lost later is made again alone.
    reads.clear()
    next((tmp_path / "cut").rglob("000007.tokens")).unlink()
    make_corpus(tokenizer, "some/dataset", cache=tmp_path / "cut", workers=1).prepare()
    assert content(tmp_path / "cut") == shards and len(reads) < 80


def test_mixture_of_streams_is_read_in_proportion(tokenizer, serve, tmp_path):
    serve({"text": documents(400)})
    sources = [{"source": "some/one", "weight": 3}, {"source": "some/two"}]
    text = make_corpus(tokenizer, sources, tokens=8000, held_out=0.01, workers=1)
    text.prepare()
    first, second = (sum(stores[side].num_tokens for side in range(3)) for stores in text._split)
    assert 6000 <= first < 8000 and 2000 <= second < 4000


def test_unreachable_dataset_is_one_line_after_one_try(tokenizer, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    tries = []

    class Unreachable:
        def dataset_info(self, name, timeout):
            tries.append(name)
            raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    began = time.monotonic()
    with pytest.raises(HaloError) as error:
        make_corpus(tokenizer, "some/dataset").prepare()
    assert str(error.value) == (
        "data.source: must be an existing path or a dataset that can be reached, got some/dataset "
        "(Couldn't reach the Hub)"
    )
    assert tries == ["some/dataset"] and time.monotonic() - began < 5
    assert capfd.readouterr().err == ""


def test_connection_lost_on_the_way_is_one_line(tokenizer, serve, monkeypatch):
    serve({"text": documents(5)})

    class Rows:
        def __iter__(self):
            yield {"text": documents(1)[0]}
            raise ConnectionError("gone\nmore")

        def state_dict(self):
            return {}

    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split, streaming: Rows())
    with pytest.raises(
        HaloError, match=r"^data.source: some/dataset must stay reachable, got gone; the same command cont"
    ):
        make_corpus(tokenizer, "some/dataset").prepare()


def test_dataset_without_the_column_is_one_line(tokenizer, serve):
    serve({"body": documents(3), "id": [1, 2, 3]})
    with pytest.raises(HaloError, match=r"^data.field: must name a column of text, one of body, id, got text$"):
        make_corpus(tokenizer, "some/dataset").prepare()


TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begins with the assistant') }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "quiet river?"}, {"role": "assistant", "content": "copper bridge."}]
SHARED = [{"from": "human", "value": "quiet river?"}, {"from": "gpt", "value": "copper bridge."}]


@pytest.mark.parametrize(
    "record", [{"messages": CHAT}, {"conversations": SHARED}, {"text": CHAT}, {"messages": CHAT, "id": 3}]
)
def test_chats_go_through_the_template(tmp_path, record):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = write_lines(tmp_path / "a.jsonl", [record, *({"text": text} for text in documents(20))])
    texts = all_texts(make_corpus(tokenizer, path))
    assert "<user>quiet river?\n<assistant>copper bridge.\n" in texts and len(texts) == 21


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (CHAT[1:], '"messages" is refused by the chat template (TemplateError)'),
        ([{"content": "a"}], "a message of its chat has no role"),
        ([{"role": "user", "content": 3}], "a message of its chat has no content"),
        ([], '"messages" is a list, not a string or a chat'),
        ([3], '"messages" is a list, not a string or a chat'),
    ],
)
def test_broken_chat_is_skipped_and_named(tmp_path, chat, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = write_lines(tmp_path / "a.jsonl", [*({"messages": CHAT} for _ in range(25)), {"messages": chat}])
    assert make_corpus(tokenizer, path).skipped["examples"] == [f"{path}:26: {reason}"]


def test_chat_without_a_template_is_one_line(tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHAT}]))
    with pytest.raises(
        HaloError, match=r'^teacher: its tokenizer must have a chat template for records with "messages", go'
    ):
        make_corpus(tokenizer, tmp_path / "a.json").prepare()


def test_chats_of_a_streamed_dataset(serve):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    serve({"messages": [CHAT] * 30})
    assert set(all_texts(make_corpus(tokenizer, "some/dataset"))) == {"<user>quiet river?\n<assistant>copper bridge.\n"}
