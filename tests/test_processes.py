"""Ops called by several threads at once, and in a child that was forked after its parent had used them."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hypenet_kernels import causal_conv1d_fn, chunk_gated_delta_rule, chunk_simple_gla, hype_attention, rms_norm_rope

ROOT = Path(__file__).resolve().parents[1]


def work(seed):
    """Return the results of some ops, whose inputs depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 600, 4, 32, generator=generator).requires_grad_() for _ in range(3))
    g, beta = -torch.rand(1, 600, 4, generator=generator), torch.rand(1, 600, 4, generator=generator)
    results = [
        chunk_gated_delta_rule(q, torch.nn.functional.normalize(k, dim=-1), v, g, beta)[0],
        chunk_simple_gla(q, k, v, g)[0],
        hype_attention(q, k, v, logit_scale_base=50.0),
        causal_conv1d_fn(q[0].flatten(1).T[None], torch.ones(128, 4)),
        rms_norm_rope(q, torch.ones(32)),
    ]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in results), (q, k, v))
    return [x.detach() for x in (*results, *gradients)]


def test_threads_do_not_disturb_each_other():
    expected = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for seed, results in enumerate(pool.map(work, range(4))):
                assert all(x.equal(y) for x, y in zip(results, expected[seed], strict=True))


FORK = """
import os, sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(2)
from test_processes import work
expected = work(0)
pid = os.fork()
if pid == 0:
    with torch.no_grad():  # torch's autograd refuses to run in a forked child
        from hypenet_kernels import chunk_simple_gla, hype_attention
        q = torch.ones(1, 200, 4, 32)  # so small that torch itself takes one thread
        ok = chunk_simple_gla(q, q, q)[0].isfinite().all() and hype_attention(q, q, q).isfinite().all()
    os._exit(0 if ok else 1)
print("child", os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_computes():
    """libgomp's threads are lost in a fork: a child that waits for them never ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", FORK], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.communicate(timeout=60)[0].strip() == "child 0"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
