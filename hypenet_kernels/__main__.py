"""python -m hypenet_kernels: what was built, what each op uses here, and a test of every op against its reference."""

import sys

import torch

import hypenet_kernels as kernels
from hypenet_kernels import _native, reference

# Relative RMS errors that no correct kernel comes near and no wrong one stays below; tests/ hold kernels to far less.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SEQUENCE = ("q", "k", "v", "g")


def main():
    facts = kernels.report()
    print_report(facts)
    devices = ["cpu", *(["cuda"] if facts["gpus"] and facts["modules"]["_cuda"] else [])]
    try:
        _native.cpu()
    except ImportError as error:
        sys.exit(f"\n{error}")
    print("\nself test (relative RMS error against the float64 reference)")
    failed = [test for device in devices for test in self_test(device) if not test]
    if "cuda" not in devices:
        print("  CUDA kernels: not run, " + ("no GPU visible" if facts["modules"]["_cuda"] else "not built"))
    print(f"  {len(failed)} failed" if failed else "  all passed")
    return 1 if failed else 0


def print_report(facts):
    built = ", ".join(name for name, there in facts["modules"].items() if there) or "no native module"
    cuda = f"for {facts['cuda_targets']} by {facts['cuda']}" if facts["cuda_targets"] else f"not built: {facts['cuda']}"
    print(f"hypenet_kernels {facts['version']} in {facts['folder']}")
    print(f"  torch      {facts['torch']}, Python {facts['python']}, {facts['threads']} threads")
    print(f"  processor  {facts['processor']}: level {facts['level']}")
    print(f"  built      {built} ({facts['compiler']})")
    print(f"  CUDA       {cuda}")
    print(f"  GPU        {', '.join(facts['gpus']) or 'none visible'}")
    print("\nops")
    for op, devices in facts["ops"].items():
        for device, choice in devices.items():
            print(f"  {op:33} {device:5} {choice['implementation'] or 'raises'}: {choice['why']}")


def self_test(device):
    """Runs every op that `device` has, in every dtype it takes; yields whether each is right, after a line about it."""
    on_cuda = _native.on_cuda(torch.empty(0, device=device))
    for op, (run, expect, gradients) in CASES.items():
        for dtype, bound in BOUNDS.items():
            if on_cuda and dtype not in _native.CUDA_OPS.get(op, ()):
                continue
            differentiated = gradients if not on_cuda or dtype in _native.HALF else ()  # CUDA has no float32 backward
            given = {name: x.to(device) for name, x in _inputs(dtype).items()}
            exact = {name: x.double() if x.is_floating_point() else x for name, x in _inputs(dtype).items()}
            try:
                error = _error(_outputs(run, given, differentiated), _outputs(expect, exact, differentiated))
                passed, found = error <= bound, f"error {error:.1e} (at most {bound:.0e})"
            except RuntimeError as raised:
                passed, found = False, f"raised {raised}"
            print(f"  {'ok  ' if passed else 'FAIL'} {op:33} {device:5} {str(dtype).removeprefix('torch.'):9} {found}")
            yield passed


def _inputs(dtype, B=2, T=37, H=2, HV=4, K=16):
    random = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(B, T, heads, K, generator=random) for name, heads in zip("qkv", (H, H, HV), strict=True)
    }
    inputs = {name: (x / x.norm(dim=-1, keepdim=True)).to(dtype) for name, x in inputs.items()}
    inputs |= {name: torch.rand(B, T, HV, generator=random) for name in ("g", "beta")}
    inputs["g"] = inputs["g"].log()
    inputs["state"] = torch.randn(B, HV, K, K, generator=random)
    inputs |= {name: torch.randn(B, T, HV, K, generator=random).to(dtype) for name in ("query", "gate")}
    return inputs | {"lengths": torch.tensor([11, T - 3])}


def _outputs(function, inputs, differentiated):
    """What the function returns, and the gradients of a weighted sum of it."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in differentiated}
    outputs = function(inputs | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not leaves:
        return outputs
    loss = sum((x.double() * torch.arange(x.numel(), device=x.device).view(x.shape).cos()).sum() for x in outputs)
    return *outputs, *torch.autograd.grad(loss, list(leaves.values()))


def _error(results, references):
    pairs = zip(results, references, strict=True)
    ratios = [((x.detach().cpu().double() - y).norm() / y.norm()).item() for x, y in pairs]
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)


def _delta(op):
    names = (*SEQUENCE, "beta")
    return lambda x: op(*(x[name] for name in names), initial_state=x["state"], output_final_state=True)


def _gla(op):
    return lambda x: op(*(x[name] for name in SEQUENCE), initial_state=x["state"], output_final_state=True)


def _step(op, names):
    def run(x):
        state = x["state"].clone()
        return op(*(x[name] for name in names), state), state

    return run


def _attention(op):
    options = {"logit_scale_base": 100.0}
    return lambda x: op(x["query"], x["k"], x["v"][:, :, ::2], gate=x["gate"], **options)


def _decode(op):
    def run(x):
        k_cache, v_cache, last = x["k"].clone(), x["v"][:, :, ::2].clone(), slice(0, 3)
        appended = {"k": x["k"][:, last], "v": x["v"][:, last, ::2]}
        o = op(x["query"][:, last], k_cache, v_cache, x["lengths"], **appended, logit_scale_base=100.0)
        return o, k_cache, v_cache

    return run


DELTA_GRADIENTS = (*SEQUENCE, "beta", "state")
GLA_GRADIENTS = (*SEQUENCE, "state")
CASES = {
    "chunk_gated_delta_rule": (
        _delta(kernels.chunk_gated_delta_rule),
        _delta(reference.chunk_gated_delta_rule),
        DELTA_GRADIENTS,
    ),
    "fused_recurrent_gated_delta_rule": (
        _delta(kernels.fused_recurrent_gated_delta_rule),
        _delta(reference.chunk_gated_delta_rule),
        DELTA_GRADIENTS,
    ),
    "gated_delta_step": (
        _step(kernels.gated_delta_step, (*SEQUENCE, "beta")),
        _delta(reference.chunk_gated_delta_rule),
        (),
    ),
    "chunk_simple_gla": (_gla(kernels.chunk_simple_gla), _gla(reference.chunk_simple_gla), GLA_GRADIENTS),
    "fused_recurrent_simple_gla": (
        _gla(kernels.fused_recurrent_simple_gla),
        _gla(reference.chunk_simple_gla),
        GLA_GRADIENTS,
    ),
    "simple_gla_step": (_step(kernels.simple_gla_step, SEQUENCE), _gla(reference.chunk_simple_gla), ()),
    "hype_attention": (
        _attention(kernels.hype_attention),
        _attention(reference.hype_attention),
        ("query", "k", "v", "gate"),
    ),
    "hype_attention_decode": (_decode(kernels.hype_attention_decode), _decode(reference.hype_attention_decode), ()),
}

if __name__ == "__main__":
    sys.exit(main())
