"""Runs cases: first right, then fast, beside every peer that imports and agrees.

python -m bench.ops DEVICE OUT.json        # all cases, without what only the command line needs
"""

import gc
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import cases, records, roofline, tables, timing
from bench.peers import PEERS
from hypenet_kernels import reference

SECONDS = 4.0  # for a case and its peers
QUICK_SECONDS = 0.8
# Relative RMS difference up to which a peer computes the same thing; and ours against the float64 reference.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
GATE_SIZES = {"B": 2, "T": 70, "S": 70, "H": 2, "HV": 2, "HK": 1, "K": 64, "V": 64, "D": 64, "gated": 1}


def run(names, device, quick=False, dtype=None, on_case=lambda *_: None, on_row=lambda record: None):
    """Measures the cases of `names` and `dtype` (all where not given); returns the record.

    on_case(index, count, name) before each case; on_row(record so far) after it.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    chosen = select(names, device, quick, dtype)
    kinds = {(case.op, case.dtype, case.backward) for case in chosen}
    failures = {kind: check(*kind, device) for kind in sorted(kinds)}
    roofs = roofline.measure(device, seconds)
    record = {"kind": "ops", "stamp": records.stamp(device), "roofs": roofs.asdict(), "rows": []}
    for index, case in enumerate(chosen):
        on_case(index, len(chosen), case.name)
        failure = failures[case.op, case.dtype, case.backward]
        record["rows"].append(measure(case, device, roofs, failure, seconds))
        on_row(record)
        _free(device)
    return record


def select(names, device, quick=False, dtype=None):
    known = cases.CASES[torch.device(device).type]
    unknown = set(names) - {case.op for case in known}
    if unknown:
        raise ValueError(f"bench: NAME must be one of {', '.join(sorted(cases.BUILDERS))}, got {', '.join(unknown)}")
    if dtype is not None and dtype not in {case.dtype for case in known}:
        raise ValueError(f"bench: --dtype must be one of {', '.join(sorted({c.dtype for c in known}))}, got {dtype}")
    chosen = (case for case in known if (not names or case.op in names) and (case.quick or not quick))
    return [case for case in chosen if dtype in (None, case.dtype)]


def relative_error(result, expected):
    expected = expected.double()
    return ((result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def check(op, dtype, backward, device):
    """None where the op, or its gradients, agree with the float64 reference on a small case; else what is wrong."""
    try:
        case = cases.Case(op, GATE_SIZES, dtype, backward)
        workload = cases.build(case, device)
        exact = {name: _double(value) for name, value in workload.tensors.items()}
        expected = cases.runner(case, _reference(op, workload.options), exact, workload.names)()
        return _difference(workload.run(), expected, dtype)
    except Exception as error:  # an op that raises is wrong too, and the others are still to be measured
        return _line(error)


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


def _line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def measure(case, device, roofs, failure, seconds):
    """One row of the record: ours, the fraction of the roof, and every peer or why it was not timed."""
    row = {"name": case.name, **asdict(case), "ours": None, "peers": {}, "failure": failure}
    if failure is not None:
        return row
    try:
        return row | _timed(case, device, roofs, seconds)
    except Exception as error:
        return row | {"failure": _line(error)}


def _timed(case, device, roofs, seconds):
    workload = cases.build(case, device)
    expected = workload.run()
    functions, untimed = {"ours": workload.run}, {}
    for name, peer in PEERS.items():
        function, reason = _prepare(peer, case, workload, expected, device)
        if function is not None:
            functions[name] = function
        elif reason is not None:
            untimed[name] = {"error": reason}
    del expected
    times = timing.measure(functions, device, seconds)
    ours = times.pop("ours")
    return {
        "ours": asdict(ours),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "bound": roofs.bound(workload.flops, workload.bytes, case.dtype),
        "fraction": 1e3 * roofs.seconds(workload.flops, workload.bytes, case.dtype) / ours.median,
        "peers": untimed
        | {name: asdict(taken) | {"ratio": taken.median / ours.median} for name, taken in times.items()},
    }


def _prepare(peer, case, workload, expected, device):
    """(callable, None), (None, why not) or, for a peer that is not there or has no such form, (None, None)."""
    # A step changes its states, so that a peer must be compared from states of its own.
    changes = case.op.endswith("_step")
    try:
        function = peer(case, cases.build(case, device).tensors if changes else workload.tensors)
        if function is None:
            return None, None
        if difference := _difference(function(), expected, case.dtype):
            return None, f"another answer: {difference}"
        return (peer(case, workload.tensors) if changes else function), None
    except ImportError:
        return None, None
    except Exception as error:  # whatever a peer does wrong is a line of the report
        return None, _line(error)


def _free(device):
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def main(device, out):
    """Every case of the device, saved as it comes; returns what went wrong."""

    def on_case(index, count, name):
        print(f"{index + 1}/{count} {name}", flush=True)

    record = run([], device, on_case=on_case, on_row=lambda record: records.save(out, record))
    print(tables.markdown(tables.HEADER, [tables.cells(row) for row in record["rows"]]))
    return [row["name"] for row in record["rows"] if row["failure"]]


if __name__ == "__main__":
    wrong = main(sys.argv[1], Path(sys.argv[2]))
    sys.exit(f"not timed: {', '.join(wrong)}" if wrong else 0)
