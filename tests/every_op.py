"""Launch every CUDA kernel that the ops can select, at sizes small enough for an emulator or a sanitizer.

compute-sanitizer --tool racecheck python tests/every_op.py        # on a GPU
"""

import argparse
import contextlib
import functools
from itertools import product
from unittest import mock

import torch

import hypenet_kernels as kernels
from hypenet_kernels import _recurrence_cuda as cuda

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
HEAD_DIMS = (128, 64, 256)
LARGE = 227 * 1024  # bytes of shared memory that a block of an H100 can have
T = 70


def run(device, say=lambda *_: None, small=False):
    """Call every op, the most used variants first, in case a time limit ends the run; skip what is not built.

    say(family, dtype, D) is called before each group. small: whether an emulated GPU may have too little shared memory
    for head dimensions above 128; up to 128 every op fits every GPU.
    """
    torch.manual_seed(0)
    families = (
        *(_recurrences, _packed_recurrences, _split_recurrences, _pools, _steps),
        *(_attention, _packed_attention, _decode, _convolutions, _norms),
    )
    for D, dtype, family in product(HEAD_DIMS, DTYPES, families):
        say(family.__name__, dtype, D)
        too_small = suppressed_where_a_gpu_is_too_small(small=small) if D > 128 else contextlib.nullcontext()
        with contextlib.suppress(NotImplementedError), too_small:
            family(torch.device(device), dtype, D)


@contextlib.contextmanager
def suppressed_where_a_gpu_is_too_small(then=lambda _: None, small=False):
    """Call then(error) instead of raising, if a GPU with less than an H100's shared memory has too little of it.

    small: whether an emulated GPU may have too little.
    """
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_available():
            small = torch.cuda.get_device_properties().shared_memory_per_block_optin < LARGE
        if "less shared memory than the kernel needs" not in str(error) or not small:
            raise
        then(str(error))


def _call(op, inputs, **options):
    """Call an op and its backward, if they have CUDA kernels."""
    written = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    forward, backward = (f"hypenet::{op.__name__}{suffix}" in written for suffix in ("", "_bwd"))
    if forward:
        leaves = [x.clone().requires_grad_(backward) for x in inputs]
        results = op(*leaves, **options)
        results = results if isinstance(results, tuple) else (results,)
        if backward:
            torch.autograd.grad(sum(x.float().sum() for x in results), leaves)


def _recurrent_inputs(device, dtype, D, tokens, V=None, H=1, HV=2):
    q, k = (torch.nn.functional.normalize(torch.randn(1, tokens, H, D, device=device), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, HV, V or D, device=device)
    g, beta = -torch.rand(1, tokens, HV, device=device), torch.rand(1, tokens, HV, device=device)
    beta[:, : cuda.CHUNK, 0] *= 2  # above 1 only in the first chunk of the first head
    return [x.to(dtype) for x in (q, k, v)] + [g, beta]


def _recurrences(device, dtype, D, V=None, tokens=T, **options):
    options["output_final_state"] = True
    *inputs, beta = _recurrent_inputs(device, dtype, D, tokens, V)
    _call(kernels.chunk_gated_delta_rule, [*inputs, beta], **options)
    _call(kernels.chunk_simple_gla, inputs, **options)


def _packed_recurrences(device, dtype, D):
    _recurrences(device, dtype, D, V=128, cu_seqlens=torch.tensor([0, 1, T], device=device))


def _split_recurrences(device, dtype, D):
    with mock.patch.object(cuda, "MIN_SEGMENT", 1):  # three segments
        _recurrences(device, dtype, D, tokens=2 * T, split_sequence=True)


def _steps(device, dtype, D):
    for K, tokens in ((D, 1), (D - 4, 2)):
        q, k, v, g, beta = _recurrent_inputs(device, dtype, D, tokens)
        inputs, state = [q[..., :K], k[..., :K], v, g], torch.zeros(1, beta.shape[2], K, D, device=device)
        _call(kernels.gated_delta_step, [*inputs, beta, state])
        _call(kernels.simple_gla_step, [*inputs, state])
        _, states = kernels.gated_delta_step(*inputs, beta, state, output_states=True)
        kernels.commit_states(state, states, torch.tensor([tokens], device=device))
    odd_state = torch.zeros(1, 1, 3, 3, device=device)  # no whole 16-byte vectors
    kernels.commit_states(odd_state, odd_state[None], torch.tensor([1], device=device))


def _pools(device, dtype, D):
    *inputs, beta = _recurrent_inputs(device, dtype, D, T)
    pool, slots = torch.zeros(2, 2, D, D, device=device), torch.tensor([1], device=device)
    options = {"initial_state": pool, "state_indices": slots, "checkpoint_every": cuda.CHUNK}
    kernels.chunk_gated_delta_rule(*inputs, beta, **options)
    kernels.chunk_simple_gla(*inputs, **options)


def _attention(device, dtype, D, cu_seqlens=None):
    q, k, v = (torch.randn(1, T, heads, D, device=device).to(dtype) for heads in (2, 1, 1))
    for gate in (None, q):
        _call(kernels.hype_attention, [q, k, v], gate=gate, logit_scale_base=362.0, cu_seqlens=cu_seqlens)


def _packed_attention(device, dtype, D):
    _attention(device, dtype, D, torch.tensor([0, 3, T], device=device))


def _decode(device, dtype, D):
    for tokens, H in product((1, 4), (1, 4, 8)):
        q = torch.randn(1, tokens, H, D, device=device).to(dtype)
        k_cache, v_cache = (torch.randn(1, 300, 1, D, device=device).to(dtype) for _ in range(2))
        inputs = [q, k_cache, v_cache, torch.tensor([290], device=device)]
        k, v = (torch.randn(1, tokens, 1, D, device=device).to(dtype) for _ in range(2))
        _call(kernels.hype_attention_decode, inputs, k=k, v=v, gate=q, logit_scale_base=362.0)


def _convolutions(device, dtype, D):
    """Rows of 16-byte vectors and of single elements, of every width."""
    if HEAD_DIMS[0] != D:
        return
    for C, W in product((16, 5), (2, 3, 4)):
        x = torch.randn(1, T, C, device=device).to(dtype).transpose(1, 2)
        weight, bounds = torch.randn(C, W, device=device), torch.tensor([0, 3, T], device=device)
        _call(kernels.causal_conv1d_fn, [x, weight], activation="silu", cu_seqlens=bounds)
        kernels.causal_conv1d_update(x[..., 0], torch.zeros(1, C, 4, device=device, dtype=dtype), weight)


def _norms(device, dtype, D):
    x, weight = torch.randn(1, T, 2, D, device=device).to(dtype), torch.randn(D, device=device)
    angles = torch.randn(1, T, D, device=device)
    for inputs in ([x, weight], [x]):
        _call(kernels.rms_norm_rope, inputs, cos=angles.cos(), sin=angles.sin())
    _call(kernels.rms_norm_rope, [x, weight])
    for activation in ("silu", "sigmoid"):
        _call(kernels.rms_norm_gated, [x, x, weight], activation=activation)
    for residual in (x, x.float()):
        _call(kernels.add_rms_norm, [x, residual, weight])
    _call(kernels.swiglu, [x, x])


def main():
    global HEAD_DIMS, DTYPES, T
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--tokens", type=int, default=T)
    parser.add_argument("--once", action="store_true", help="one head dimension and dtype")
    options = parser.parse_args()
    HEAD_DIMS, T = options.head_dims, options.tokens
    if options.once:
        HEAD_DIMS, DTYPES = HEAD_DIMS[:1], DTYPES[:1]
    run("cuda", functools.partial(print, flush=True))
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
