"""Check cases against the reference, then time our op and every installed peer whose result agrees with it."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from bench import cases, check, records, roofline, timing
from bench.peers import PEERS, Peer
from bench.records import OpsRecord, Row, one_line

SECONDS = 4.0  # for a case and its peers together; on CUDA a quarter of it for each of them
QUICK_SECONDS = 0.8
NOT_SMALL = 2**21  # bytes; a call that moves fewer says nothing about memory
ENDED = "the process ended here"  # written before a step that may kill the process, and overwritten by its result

OnCase = Callable[[int, int, str], None]
Save = Callable[[OpsRecord], None]


class DeviceLost(RuntimeError):
    """A CUDA error from which this process cannot recover, such as an illegal memory access."""


def run(
    names: list[str],
    device: str,
    quick: bool = False,
    dtype: str | None = None,
    seconds: float | None = None,
    on_case: OnCase = lambda *_: None,
    save: Save = lambda _: None,
    record: OpsRecord | None = None,
) -> OpsRecord:
    """Measure the cases selected by `names`, `quick` and `dtype`.

    Args:
        names: ops; empty for all.
        seconds: time for a case and its peers.
        on_case: called as on_case(index, count, name) before each case.
        save: called with the record so far whenever it changes.
        record: an unfinished record of the same device and commit to resume from.

    Raises:
        ValueError: an unknown op or dtype, or `record` is of another device or commit.
        DeviceLost: the remaining cases need a new process; everything measured so far has been saved.
    """
    seconds = seconds or SECONDS
    chosen = select(names, device, quick, dtype)
    stamp = records.stamp(device)
    if record is None:
        roofs = roofline.measure(device, seconds).asdict()
        record = {"kind": "ops", "stamp": stamp, "roofs": roofs, "checks": {}, "rows": []}
    before = record["stamp"]
    if (before["device"], before["commit"]) != (stamp["device"], stamp["commit"]):
        raise ValueError(f"bench: a record to resume must be of {stamp['device']} and commit {stamp['commit']}")
    order = {case.name: index for index, case in enumerate(cases.CASES[torch.device(device).type])}
    rows = {row["name"]: row for row in record["rows"]}
    for index, case in enumerate(chosen):
        row = rows.setdefault(case.name, _new_row(case))
        if "unfinished" in row:
            on_case(index, len(chosen), case.name)
            record["rows"] = sorted(rows.values(), key=lambda row: order[row["name"]])
            try:
                Measurement(row, case, device, seconds, record, save).run()
                del row["unfinished"]
            finally:
                save(record)
            _free(device)
    return record


def select(names: list[str], device: str, quick: bool = False, dtype: str | None = None) -> list[cases.Case]:
    """Return the cases of these ops and this dtype, the quick ones first; with `quick` only those."""
    known = cases.CASES[torch.device(device).type]
    unknown = set(names) - {case.op for case in known}
    if unknown:
        raise ValueError(f"bench: NAME must be one of {', '.join(sorted(cases.BUILDERS))}, got {', '.join(unknown)}")
    if dtype is not None and dtype not in {case.dtype for case in known}:
        raise ValueError(f"bench: --dtype must be one of {', '.join(sorted({c.dtype for c in known}))}, got {dtype}")
    chosen = [case for case in known if (not names or case.op in names) and dtype in (None, case.dtype)]
    return [case for case in chosen if case.quick] + [case for case in chosen if not (case.quick or quick)]


def _new_row(case: cases.Case) -> Row:
    return {
        "name": case.name,
        "op": case.op,
        "sizes": case.sizes,
        "dtype": case.dtype,
        "backward": case.backward,
        "quick": case.quick,
        "ours": None,
        "peers": {},
        "failure": None,
        "unfinished": True,
    }


@dataclass
class Measurement:
    """One case, measured into its row; the record is saved before every step that may kill the process."""

    row: Row
    case: cases.Case
    device: str
    seconds: float
    record: OpsRecord
    save: Save

    def run(self) -> None:
        """Fill the row, or set its "failure" if our op is wrong or raises."""
        row, checks, kind = self.row, self.record["checks"], cases.shrunk(self.case).name
        if kind not in checks:
            with self._provisional(checks, kind, ENDED):
                checks[kind] = check.check(self.case, self.device)
            self._require_device(self.case.name)
        row["failure"] = row["failure"] or checks[kind]
        if row["failure"] is not None:
            return
        try:
            self.time()
        except DeviceLost:
            raise
        except Exception as error:
            row["ours"], row["failure"] = None, one_line(error)
            self._require_device(self.case.name)

    def time(self) -> None:
        """Time our op and its peers.

        On the CPU, ours and all peers are interleaved. On CUDA, ours is timed first and then each peer by itself, so
        that a peer that crashes cannot invalidate other results.
        """
        on_cuda = _is_cuda(self.device)
        workload = cases.build(self.case, self.device)
        with self._provisional(self.row, "failure", ENDED):
            expected = workload.run()
            if not all(x.isfinite().all() for x in expected):
                raise ArithmeticError("the result must be finite")
            if on_cuda and self.row["ours"] is None:
                self._take({"ours": workload.run}, workload)
            self.row["failure"] = None
        agreed: dict[str, cases.Run] = {}
        for name, peer in PEERS.items():
            if name not in self.row["peers"]:
                agreed |= self._try_peer(name, peer, workload, expected)
        if not on_cuda:
            with self._provisional(self.row, "failure", ENDED):
                self._take({"ours": workload.run} | agreed, workload)
                self.row["failure"] = None

    def _try_peer(
        self, name: str, peer: Peer, workload: cases.Workload, expected: tuple[torch.Tensor, ...]
    ) -> dict[str, cases.Run]:
        """Check a peer; time it on CUDA, and on the CPU return it, by name, to be timed together with the others.

        A peer that is not installed or does not implement the case leaves no entry in the row, any other failure does.
        """
        peers = self.row["peers"]
        with self._provisional(peers, name, {"error": ENDED, "lost": True}):
            try:
                if self._was_lost(name):
                    raise RuntimeError("not tried again: it ended an earlier process")
                function = _prepare(peer, self.case, workload, expected, self.device)
                if function is not None and _is_cuda(self.device):
                    self._take({name: function}, workload)
                else:
                    del peers[name]
                    return {} if function is None else {name: function}
            except (Exception, SystemExit) as error:  # whatever goes wrong in a peer is reported, and we go on
                peers[name]["error"] = one_line(error)
                self._require_device(f"{name}, {self.case.name}")
                del peers[name]["lost"]
        return {}

    def _was_lost(self, name: str) -> bool:
        """Return whether a peer ended a process, or lost the GPU, in an earlier case of this op."""
        rows = [row for row in self.record["rows"] if row["op"] == self.case.op and row is not self.row]
        return any("lost" in row["peers"].get(name, {}) for row in rows)

    def _take(self, functions: dict[str, cases.Run], workload: cases.Workload) -> None:
        """Time `functions` together and put the times into the row.

        A shared machine's memory bandwidth changes within minutes: on the CPU it is measured just before and after a
        case that it bounds, and the mean is that case's roof.
        """
        row, dtype, roofs = self.row, self.case.dtype, roofline.Roofs(**self.record["roofs"])
        bound = roofs.bound(workload.flops, workload.bytes, dtype)
        from_memory = bound == "memory" and workload.bytes >= NOT_SMALL and not self.case.sizes.get("cached")
        if _is_cuda(self.device):
            times = timing.measure(functions, self.device, self.seconds / 4)
        elif from_memory:
            before = roofline.memory(self.device, self.seconds / 16)
            times = timing.measure(functions, self.device, self.seconds)
            after = roofline.memory(self.device, self.seconds / 16)
            row["memory"] = {name: (rate + after[name]) / 2 for name, rate in before.items()}
            roofs = replace(roofs, copy=row["memory"]["copy"], read=row["memory"]["read"])
        else:
            times = timing.measure(functions, self.device, self.seconds)
        if "ours" in times:
            ours = times.pop("ours")
            row["ours"] = ours.asdict()
            row["flops"], row["bytes"] = workload.flops, workload.bytes
            row["bound"] = roofs.bound(workload.flops, workload.bytes, dtype)
            row["fraction"] = 1e3 * roofs.seconds(workload.flops, workload.bytes, dtype) / ours.median
        if row["ours"] is not None:
            for name, timed in times.items():
                peer = cast(records.PeerTimes, timed.asdict())
                row["peers"][name] = {**peer, "ratio": timed.median / row["ours"]["median"]}

    @contextlib.contextmanager
    def _provisional(self, entries: Any, name: str, value: Any) -> Iterator[None]:
        """Set entries[name] and save, before a step that may kill the process and that overwrites the entry.

        KeyboardInterrupt restores the entries, so that an interrupted step is measured again on resume.
        """
        before = dict(entries)
        entries[name] = value
        self.save(self.record)
        try:
            yield
        except KeyboardInterrupt:
            entries.clear()
            entries.update(before)
            raise

    def _require_device(self, name: str) -> None:
        """Raise DeviceLost if the GPU is unusable: after a kernel's fault every CUDA call of the process fails."""
        if _is_cuda(self.device):
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(f"{name}: {one_line(error)}") from None


def _prepare(
    peer: Peer, case: cases.Case, workload: cases.Workload, expected: tuple[torch.Tensor, ...], device: str
) -> cases.Run | None:
    """Return the call of a peer to time, or None if it is not installed or does not implement the case.

    Raises:
        ArithmeticError: the peer's result differs from ours.
    """
    # A decode step overwrites its state: compare a peer on fresh copies of the tensors.
    in_place = case.op.endswith("_step")
    try:
        function = peer(case, cases.build(case, device).tensors if in_place else workload.tensors)
        if function is None:
            return None
        difference = check.difference(function(), expected, case.dtype)
    except ModuleNotFoundError:
        return None
    if difference:
        raise ArithmeticError(f"different result: {difference}")
    return peer(case, workload.tensors) if in_place else function


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _free(device: str) -> None:
    gc.collect()
    if _is_cuda(device):
        torch.cuda.empty_cache()
