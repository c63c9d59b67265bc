"""Runs cases: first right, then fast, beside every peer that imports and agrees."""

import gc
from dataclasses import asdict

import torch

from bench import cases, records, roofline, timing
from bench.peers import PEERS
from hypenet_kernels import reference

SECONDS = 4.0  # for a case and its peers
QUICK_SECONDS = 0.8
# Relative RMS difference up to which a peer computes the same thing; and ours against the float64 reference.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
GATE_SIZES = {"B": 2, "T": 70, "S": 70, "H": 2, "HV": 2, "HK": 1, "K": 64, "V": 64, "D": 64, "gated": 1}


def run(names, device, quick, on_case):
    """Measures the cases of `names` (all where empty); `on_case(index, count, name)`. Returns the record."""
    chosen = select(names, device, quick)
    passed = {op: check(op, dtype, device) for op, dtype in {(case.op, case.dtype) for case in chosen}}
    roofs = roofline.measure(device, QUICK_SECONDS if quick else SECONDS)
    rows = []
    for index, case in enumerate(chosen):
        on_case(index, len(chosen), case.name)
        rows.append(measure(case, device, roofs, passed[case.op], QUICK_SECONDS if quick else SECONDS))
        gc.collect()
    return {"kind": "ops", "stamp": records.stamp(device), "roofs": roofs.asdict(), "rows": rows}


def select(names, device, quick):
    known = cases.CASES[torch.device(device).type]
    unknown = set(names) - {case.op for case in known}
    if unknown:
        raise ValueError(f"bench: NAME must be one of {', '.join(sorted(cases.BUILDERS))}, got {', '.join(unknown)}")
    return [case for case in known if (not names or case.op in names) and (case.quick or not quick)]


def relative_error(result, expected):
    expected = expected.double()
    return ((result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def check(op, dtype, device):
    """None where the op agrees with its float64 reference on a small case, else what is wrong."""
    case = cases.Case(op, GATE_SIZES, dtype)
    workload = cases.build(case, device)
    x = {name: value for name, value in workload.tensors.items() if torch.is_tensor(value)}
    if op.endswith("_step"):
        x["initial_state"] = workload.tensors["states"][0].clone()
    if op == "hype_attention_decode":
        x = {"q": x["q"], "k": x["k_cache"], "v": x["v_cache"]}
    error = relative_error(workload.run()[0].cpu(), _reference(op, {k: v.cpu() for k, v in x.items()}, workload))
    return None if error <= AGREEMENT[dtype] else f"{op}: relative error {error:.1e} against the reference"


def _reference(op, x, workload):
    x = {name: value.double() for name, value in x.items()}
    if op == "hype_attention":
        return reference.hype_attention(x["q"], x["k"], x["v"], gate=x.get("gate"), **workload.options)
    if op == "hype_attention_decode":
        offset = x["k"].shape[1] - x["q"].shape[1]
        return reference.hype_attention(x["q"], x["k"], x["v"], query_offset=offset)
    state = x.get("initial_state")
    if "gla" in op:
        return reference.chunk_simple_gla(x["q"], x["k"], x["v"], x["g"], initial_state=state)[0]
    return reference.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=state)[0]


def measure(case, device, roofs, failure, seconds):
    """One row of the record: ours, the fraction of the roof, and every peer or why it was not timed."""
    row = {"name": case.name, **asdict(case), "ours": None, "peers": {}, "failure": failure}
    if failure is not None:
        return row
    workload = cases.build(case, device)
    expected = workload.run()
    functions = {"ours": workload.run}
    for name, peer in PEERS.items():
        function, reason = _prepare(peer, case, workload, expected, device)
        if function is not None:
            functions[name] = function
        elif reason is not None:
            row["peers"][name] = {"error": reason}
    del expected
    times = timing.measure(functions, device, seconds)
    ours = times.pop("ours")
    floor = 1e3 * roofs.seconds(workload.flops, workload.bytes, case.dtype)
    row |= {
        "ours": asdict(ours),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "bound": roofs.bound(workload.flops, workload.bytes, case.dtype),
        "fraction": floor / ours.median,
    }
    row["peers"] |= {name: asdict(taken) | {"ratio": taken.median / ours.median} for name, taken in times.items()}
    return row


def _prepare(peer, case, workload, expected, device):
    """(callable, None), (None, why not) or, for a peer that is not there or has no such form, (None, None)."""
    # A step changes its states, so that a peer must be compared from states of its own.
    changes = case.op.endswith("_step")
    try:
        function = peer(case, cases.build(case, device).tensors if changes else workload.tensors)
    except ImportError:
        return None, None
    if function is None:
        return None, None
    try:
        results = function()
    except Exception as error:  # whatever a peer does wrong is a line of the report
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    errors = [relative_error(theirs, ours) for theirs, ours in zip(results, expected, strict=True)]
    if max(errors) > AGREEMENT[case.dtype]:
        return None, f"another answer: relative difference {max(errors):.1e}"
    return (peer(case, workload.tensors) if changes else function), None
