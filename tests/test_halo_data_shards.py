"""Tokenising continues after a kill at any moment; the shards are byte for byte those of a run that was not killed."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from halo_text import make_corpus, write_lines, write_texts
from halo_tiny import documents

from halo import files
from halo.data import shards, tokenizing
from halo.settings import HaloError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
if __name__ == "__main__":  # what the worker processes do not need
    sys.path[:0] = [{root!r}, {tests!r}]
    import halo.data.pieces
    halo.data.pieces.SHARD_CHARACTERS = 4000
    from pathlib import Path
    from halo_text import make_corpus
    from halo_tiny import tiny_tokenizer
    cache = Path(sys.argv[2])
    corpus = make_corpus(tiny_tokenizer(), sys.argv[1], cache=cache, workers=2, max_document=3000)
    print("ready", flush=True)
    corpus.prepare(lambda progress: print(progress.tokens, flush=True))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Several files of several kinds, with bad lines, a long document, and a bad end."""
    directory = tmp_path_factory.mktemp("in")
    texts = documents(300)
    write_texts(directory / "a", [*texts[:20], "\n\n".join(texts[20:60])])
    records = [{"text": text} for text in texts[60:]]
    write_lines(
        directory / "b.jsonl", [*records[:50], "3\n", *records[50:100], {"text": " ".join(texts[:90])}, "nothing\n"]
    )
    write_lines(directory / "c.jsonl", [*records[100:], {"text": 7}, {"text": 8}])
    return directory


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("halo.data.pieces.SHARD_CHARACTERS", 4000)


def content(cache):
    return {
        path.relative_to(cache).as_posix(): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()
    }


def prepared(tokenizer, source, cache, **options):
    corpus = make_corpus(tokenizer, source, cache=cache, workers=1, max_document=3000, **options)
    corpus.prepare()
    return corpus


@pytest.fixture(scope="module")
def whole(tokenizer, source, tmp_path_factory):
    """The files of a run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halo.data.pieces.SHARD_CHARACTERS", 4000)
        cache = tmp_path_factory.mktemp("whole") / "data"
        corpus = prepared(tokenizer, source, cache)
    assert corpus.skipped["skipped"] == 4
    found = content(cache)
    assert len(found) > 35
    return found


def in_child(action):
    """Run `action` in a forked process and return it; the process ends without cleaning up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process with threads
        child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return child


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_every_run_writes_the_same_bytes(tokenizer, source, whole, tmp_path):
    prepared(tokenizer, source, tmp_path / "data")
    assert content(tmp_path / "data") == whole


def test_two_processes_take_turns(tokenizer, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("halo.data.pieces.SHARD_CHARACTERS", 4000)
    children = [in_child(lambda: prepared(tokenizer, source, tmp_path / "data")) for _ in range(2)]
    assert [end_of(child) for child in children] == [0, 0]
    assert content(tmp_path / "data") == whole


def test_kills_at_random_moments(tokenizer, source, whole, tmp_path):
    """Each child is killed after a random time, the next continues; the last one finishes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.monotonic()
    prepared(tokenizer, source, tmp_path / "clock")
    seconds = time.monotonic() - began
    rng, killed, partials = random.Random(0), 0, 0
    for run in range(8):
        cache = tmp_path / str(run)
        for _ in range(6):
            child = in_child(lambda: prepared(tokenizer, source, cache))  # noqa: B023
            time.sleep(rng.uniform(0.01, 0.4 * seconds))
            os.kill(child, signal.SIGKILL)
            killed += end_of(child) == -signal.SIGKILL
            partials += len(list(cache.rglob("*.partial")))
        prepared(tokenizer, source, cache)
        assert content(cache) == whole
    assert killed > 20


POINTS = ("write", "half written", "sync", "rename", "after rename", "sync of the directory")


@pytest.mark.parametrize("point", POINTS)
def test_kills_inside_writes(tokenizer, source, whole, tmp_path, point, monkeypatch):
    """The process dies at the n-th system call of one kind, and is started again until it survives."""
    cache = tmp_path / "data"

    def run(calls):
        """Prepare, and die at call number `calls` of the chosen kind."""
        left = [calls]

        def counted(here, action, *arguments):
            if here == point:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments)

        plain_open, plain_sync, plain_replace = Path.open, os.fsync, Path.replace

        class Writing:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                if point == "half written":
                    left[0] -= 1
                    if not left[0]:
                        self.file.write(bytes(data)[: len(bytes(data)) // 2])
                        self.file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                return counted("write", self.file.write, data)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.file.close()

        def opened(path, mode="r", *arguments, **options):
            file = plain_open(path, mode, *arguments, **options)
            return Writing(file) if mode == "wb" else file

        def replaced(path, target):
            counted("rename", lambda: None)
            result = plain_replace(path, target)
            counted("after rename", lambda: None)
            return result

        Path.open, Path.replace = opened, replaced
        os.fsync = lambda descriptor: counted("sync", plain_sync, descriptor)
        synced = files.sync_directory
        shards.sync_directory = lambda path: counted("sync of the directory", synced, path)
        prepared(tokenizer, source, cache)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kills = 0
    for calls in (1, 2, 4, 7, 3, 9, 1, 10_000):
        child = in_child(lambda: run(calls))  # noqa: B023
        kills += end_of(child) == -signal.SIGKILL
    assert kills == 7
    assert content(cache) == whole


def test_worker_processes_write_the_same_shards_and_survive_a_kill(tokenizer, source, whole, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, str(script), str(source), str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(6)]
    workers = [child for child, parent in processes().items() if parent == process.pid]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert lines[0] == "ready\n" and all(line.strip().isdigit() for line in lines[1:])
    done = len(list((tmp_path / "data").rglob("*.tokens")))
    assert 0 < done < len(whole) - 2
    # The workers of the process that was killed end too.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (left := [worker for worker in workers if worker in processes()]):
        time.sleep(0.1)
    assert not left
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    assert content(tmp_path / "data") == whole


def processes():
    """Return the parent of every process that runs, by their numbers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:
            continue
        if "Z" not in lines["State"]:
            found[int(path.parent.name)] = int(lines["PPid"])
    return found


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "cut by one byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "an offset": lambda data: data[:-25] + bytes([data[-25] ^ 1]) + data[-24:],
    "the first token": lambda data: data.replace(b" \n", b" \n\1", 1)[: len(data)],
    "a key": lambda data: data[:-3] + bytes([data[-3] ^ 128]) + data[-2:],
    "a count in the header": lambda data: data.replace(b'"tokens": ', b'"tokens": 1', 1),
    "another version": lambda data: data.replace(b'"version": 1', b'"version": 9', 1),
    "no header": lambda data: data[data.index(b"\n") + 1 :],
    "header of another kind": lambda data: b"[1, 2]\n" + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_damaged_shard_is_noticed_and_made_again(tokenizer, source, whole, tmp_path, damage, place, monkeypatch):
    cache = tmp_path / "data"
    for name, data in whole.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(data)
    paths = sorted(cache.rglob("*.tokens"))
    path = {"first": paths[0], "middle": paths[len(paths) // 2], "last": paths[-1]}[place]
    damaged = DAMAGE[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    written = []
    write = tokenizing.Workers.run
    monkeypatch.setattr(
        tokenizing.Workers, "run", lambda *arguments: (written.append(item[0]) or item for item in write(*arguments))
    )
    prepared(tokenizer, source, cache)
    assert content(cache) == whole
    assert written == [int(path.stem)]  # only what was damaged


@pytest.mark.parametrize("name", ["000000.tokens", "000003.tokens", "*.tokens"])
def test_missing_files_are_made_again(tokenizer, source, whole, tmp_path, name):
    prepared(tokenizer, source, tmp_path / "data")
    for path in list((tmp_path / "data").rglob(name)):
        path.unlink()
    prepared(tokenizer, source, tmp_path / "data")
    assert content(tmp_path / "data") == whole


def test_shards_of_other_text_are_not_continued(tokenizer, source, whole, tmp_path):
    """A shard that does not begin where the one before it ends is made again."""
    cache = tmp_path / "data"
    prepared(tokenizer, source, cache)
    paths = sorted(cache.rglob("*.tokens"))
    paths[5].write_bytes(paths[9].read_bytes())
    prepared(tokenizer, source, cache)
    assert content(cache) == whole


def test_unreadable_and_full_disks_are_one_line(tokenizer, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(HaloError, match=r"^.*/file/.* must be writable, got NotADirectoryError"):
        prepared(tokenizer, source, tmp_path / "file" / "data")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(HaloError, match="must be writable, got OSError: No space left on device; free space"):
            prepared(tokenizer, source, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.partial"))
