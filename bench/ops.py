"""Runs cases: first right, then fast, beside every peer that imports and agrees.

python -m bench.ops DEVICE OUT.json [--quick]    # all cases, without what only the command line needs

goes on with the record in OUT.json where there is one. It outlives what ends a process, such as a kernel's illegal
access, after which a GPU takes nothing more from it, or a hang: the record says where, and a new process does the rest.
"""

import contextlib
import faulthandler
import gc
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import cases, records, roofline, tables, timing
from bench.peers import PEERS
from bench.timing import one_line
from hypenet_kernels import reference

SECONDS = 4.0  # for a case and its peers; on CUDA a quarter of it for each
QUICK_SECONDS = 0.8
NOT_SMALL = 2**21  # bytes, from which on a call's time says something of memory
STEP_SECONDS = 45  # after which a check, ours or a peer hangs, or compiles for too long
# Relative RMS difference up to which a peer computes the same thing; and ours against the float64 reference.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
ENDED = "the process ended here"  # stands in the record while something runs, so that it is there if it comes true


class DeviceLost(RuntimeError):
    """The GPU takes nothing more from this process."""


def _nothing(*_):
    pass


def run(names, device, quick=False, dtype=None, seconds=None, on_case=_nothing, save=_nothing, record=None):
    """Measures the cases of `names` and `dtype` (all where not given); returns the record.

    on_case(index, count, name) before each case; save(record so far) whenever it changes. `record`: one to go on with.
    Raises DeviceLost, with everything saved, where the rest needs another process.
    """
    seconds = seconds or SECONDS
    chosen = select(names, device, quick, dtype)
    stamp = records.stamp(device)
    if record is None:
        roofs = roofline.measure(device, seconds).asdict()
        record = {"kind": "ops", "stamp": stamp, "roofs": roofs, "checks": {}, "rows": []}
    if any(record["stamp"][name] != stamp[name] for name in ("device", "commit")):
        raise ValueError(f"bench: a record to go on with must be of {stamp['device']} and commit {stamp['commit']}")
    order = {case.name: index for index, case in enumerate(cases.CASES[torch.device(device).type])}
    rows = {row["name"]: row for row in record["rows"]}
    for index, case in enumerate(chosen):
        fresh = {"name": case.name, **asdict(case), "ours": None, "peers": {}, "failure": None, "unfinished": True}
        row = rows.setdefault(case.name, fresh)
        if "unfinished" in row:
            on_case(index, len(chosen), case.name)
            record["rows"] = sorted(rows.values(), key=lambda row: order[row["name"]])
            try:
                measure(row, case, device, seconds, record, lambda: save(record))
                del row["unfinished"]
            finally:
                save(record)
            _free(device)
    return record


def select(names, device, quick=False, dtype=None):
    """The cases of these names and this type, `quick` ones first."""
    known = cases.CASES[torch.device(device).type]
    unknown = set(names) - {case.op for case in known}
    if unknown:
        raise ValueError(f"bench: NAME must be one of {', '.join(sorted(cases.BUILDERS))}, got {', '.join(unknown)}")
    if dtype is not None and dtype not in {case.dtype for case in known}:
        raise ValueError(f"bench: --dtype must be one of {', '.join(sorted({c.dtype for c in known}))}, got {dtype}")
    chosen = [case for case in known if (not names or case.op in names) and dtype in (None, case.dtype)]
    return [case for case in chosen if case.quick] + [case for case in chosen if not (case.quick or quick)]


def relative_error(result, expected):
    expected = expected.double()
    return ((result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def check(case, device):
    """None where the op, or its gradients, agree with the float64 reference on the case in small; or what is wrong."""
    try:
        small = cases.gate(case)
        workload = cases.build(small, device)
        exact = {name: _double(value) for name, value in workload.tensors.items()}
        with _one_thread():
            expected = cases.runner(small, _reference(small.op, workload.options), exact, workload.names)()
        return _difference(workload.run(), expected, small.dtype)
    except Exception as error:  # an op that raises is wrong too, and the others are still to be measured
        return one_line(error)


@contextlib.contextmanager
def _one_thread():
    """For the reference's many small products: on a busy machine threads mostly wait for each other there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _double(x):
    if not torch.is_tensor(x):
        return [_double(one) for one in x]
    return x.double() if x.is_floating_point() else x


def _reference(op, options):
    """The op's meaning as cases.runner takes it."""

    def forward(t):
        if op == "hype_attention":
            return (reference.hype_attention(t["q"], t["k"], t["v"], gate=t.get("gate"), **options),)
        if op == "hype_attention_decode":
            k, v = t["caches"][0]
            return (reference.hype_attention(t["q"], k, v, query_offset=k.shape[1] - t["q"].shape[1]),)
        rule = reference.chunk_simple_gla if "gla" in op else reference.chunk_gated_delta_rule
        gates = (t["g"],) if "gla" in op else (t["g"], t["beta"])
        return rule(t["q"], t["k"], t["v"], *gates, initial_state=t["states"][0] if "states" in t else None)

    return forward


def _difference(results, expected, dtype):
    errors = [relative_error(theirs, ours) for theirs, ours in zip(results, expected, strict=True)]
    worst = max(errors, key=lambda error: float("inf") if error != error else error)
    return None if worst <= AGREEMENT[dtype] else f"relative difference {worst:.1e}, at most {AGREEMENT[dtype]:.0e}"


def measure(row, case, device, seconds, record, save):
    """Completes the row of a case: ours, its fraction of the roof, and every peer or why it was not timed."""
    kind = cases.gate(case).name
    if kind not in record["checks"]:
        with _standing(record["checks"], kind, ENDED, save):
            record["checks"][kind] = check(case, device)
        _require(device, case.name)
    row["failure"] = row["failure"] or record["checks"][kind]
    if row["failure"] is not None:
        return
    try:
        _time(row, case, device, seconds, record, save)
    except DeviceLost:
        raise
    except Exception as error:
        row |= {"ours": None, "failure": one_line(error)}
        _require(device, case.name)


def _time(row, case, device, seconds, record, save):
    """On the CPU all in turns. On CUDA one by one and ours first: what a peer breaks is then its own alone."""
    on_cuda = _is_cuda(device)
    lost = {name for r in record["rows"] if r["op"] == case.op for name, peer in r["peers"].items() if "lost" in peer}
    workload, whole_run = cases.build(case, device), roofline.Roofs(**record["roofs"])
    # The rate of a shared machine's memory changes by the minute: it is measured beside what it bounds.
    bound = whole_run.bound(workload.flops, workload.bytes, case.dtype)
    from_memory = not on_cuda and bound == "memory" and workload.bytes >= NOT_SMALL and not case.sizes.get("cached")

    def take(functions):
        roofs = whole_run
        if from_memory:
            before = roofline.memory(device, seconds / 16)
        times = timing.measure(functions, device, seconds / 4 if on_cuda else seconds)
        if from_memory:
            after = roofline.memory(device, seconds / 16)
            row["memory"] = {name: (rate + after[name]) / 2 for name, rate in before.items()}
            roofs = replace(roofs, **row["memory"])
        if "ours" in times:
            row.update(_ours(times.pop("ours"), workload, roofs, case.dtype))
        for name, timed in times.items():
            row["peers"][name] = asdict(timed) | {"ratio": timed.median / row["ours"]["median"]}

    with _standing(row, "failure", ENDED, save):
        expected = workload.run()
        if not all(x.isfinite().all() for x in expected):
            raise ArithmeticError("the result must be finite")
        if on_cuda and row["ours"] is None:
            take({"ours": workload.run})
        row["failure"] = None
    agreed = {}
    for name, peer in PEERS.items():
        if name in row["peers"]:
            continue
        with _standing(row["peers"], name, {"error": ENDED, "lost": True}, save):
            try:
                if name in lost:
                    raise RuntimeError("not tried, since it ended a process before")
                function = _prepare(peer, case, workload, expected, device)
                if function is not None and on_cuda:
                    take({name: function})
                else:
                    del row["peers"][name]
                    agreed |= {name: function} if function is not None else {}
            except (Exception, SystemExit) as error:  # whatever a peer does wrong is a line of the report
                row["peers"][name]["error"] = one_line(error)
                _require(device, f"{name}, {case.name}")
                del row["peers"][name]["lost"]
    if not on_cuda:
        with _standing(row, "failure", ENDED, save):
            take({"ours": workload.run} | agreed)
            row["failure"] = None


@contextlib.contextmanager
def _standing(entries, name, value, save):
    """entries[name] is `value`, on disk too, while something runs, which replaces it. An interrupt leaves no trace."""
    before = dict(entries)
    entries[name] = value
    save()
    try:
        yield
    except KeyboardInterrupt:
        entries.clear()
        entries.update(before)
        raise


def _ours(timed, workload, roofs, dtype):
    return {
        "ours": asdict(timed),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "bound": roofs.bound(workload.flops, workload.bytes, dtype),
        "fraction": 1e3 * roofs.seconds(workload.flops, workload.bytes, dtype) / timed.median,
    }


def _prepare(peer, case, workload, expected, device):
    """What to time of a peer; None where it is not there or has no such form. Raises where its answer is another."""
    # A step changes its states, so that a peer must be compared from states of its own.
    changes = case.op.endswith("_step")
    try:
        function = peer(case, cases.build(case, device).tensors if changes else workload.tensors)
        if function is None:
            return None
        difference = _difference(function(), expected, case.dtype)
    except ModuleNotFoundError:
        return None
    if difference:
        raise ArithmeticError(f"another answer: {difference}")
    return peer(case, workload.tensors) if changes else function


def _is_cuda(device):
    return torch.device(device).type == "cuda"


def _require(device, name):
    """Raises where the GPU takes nothing more: a kernel's fault comes back from every call of the process."""
    if _is_cuda(device):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"{name}: {one_line(error)}") from None


def _free(device):
    gc.collect()
    if _is_cuda(device):
        torch.cuda.empty_cache()


def work(device, out, *flags):
    """Measures what the record in `out` lacks, as far as one process comes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the end of the time leaves no trace either

    def on_case(index, count, name):
        print(f"{index + 1}/{count} {name}", flush=True)

    def save(record):
        records.save(out, record)
        faulthandler.dump_traceback_later(STEP_SECONDS, exit=True)

    record = records.load(out) if out.is_file() else None
    run([], device, quick="--quick" in flags, on_case=on_case, save=save, record=record)
    faulthandler.cancel_dump_traceback_later()


def main(device, out, *flags, command=(sys.executable, "-m", "bench.ops")):
    """Works in one process after the other, as long as each adds to the record; returns what is wrong with it."""
    stopped, before = [], None
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    while (ended := subprocess.run([*command, device, out, *flags, "--work"]).returncode) and not stopped:
        now = out.read_bytes() if out.is_file() else None
        if now == before:
            break
        before = now
    if not out.is_file():
        return f"{out} was not written"
    record = records.load(out)
    print(tables.markdown(tables.HEADER, [tables.cells(row) for row in record["rows"]]))
    print(f"{sum(row['ours'] is not None for row in record['rows'])} of {len(record['rows'])} cases timed", flush=True)
    wrong = [row["name"] for row in record["rows"] if row["failure"] or "unfinished" in row]
    return f"not timed: {', '.join(wrong) or 'the rest'}" if wrong or ended else 0


if __name__ == "__main__":
    device, out, *flags = sys.argv[1:]
    sys.exit((work if "--work" in flags else main)(device, Path(out), *flags))
