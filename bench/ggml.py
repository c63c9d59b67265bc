"""Call ggml's GATED_DELTA_NET on the CPU through ctypes, as a peer of the gated delta rule in float32.

`bench/build_ggml.sh` builds the libraries; the environment variable GGML_LIBRARIES names their folder, by default
build/ggml/lib in the checkout. ggml requires H = HV and K = V; its g is in log space, its scale is K ** -0.5, and its
states are [N, H, V, K].
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

F32 = 0  # GGML_TYPE_F32
FOLDER = Path(os.environ.get("GGML_LIBRARIES", Path(__file__).resolve().parents[1] / "build" / "ggml" / "lib"))
HEADROOM = 1 << 20  # bytes of a context for tensor headers and the graph, beyond the tensors' data


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


@cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Load libggml-base and libggml-cpu.

    Raises:
        ModuleNotFoundError: they have not been built.
    """
    names = ("libggml-base.so", "libggml-cpu.so")
    if not all((FOLDER / name).is_file() for name in names):
        raise ModuleNotFoundError(
            f"ggml: {' and '.join(names)} are not in {FOLDER}; build them with bench/build_ggml.sh"
        )
    base, cpu = (ctypes.CDLL(str(FOLDER / name), mode=ctypes.RTLD_GLOBAL) for name in names)
    tensor = c_void_p
    signatures = {
        (base, "ggml_init"): (c_void_p, [_InitParams]),
        (base, "ggml_free"): (None, [c_void_p]),
        (base, "ggml_new_tensor_4d"): (tensor, [c_void_p, c_int, *[c_int64] * 4]),
        (base, "ggml_get_data"): (c_void_p, [tensor]),
        (base, "ggml_gated_delta_net"): (tensor, [c_void_p, *[tensor] * 6, c_int64]),
        (base, "ggml_new_graph"): (c_void_p, [c_void_p]),
        (base, "ggml_build_forward_expand"): (None, [c_void_p, tensor]),
        (base, "ggml_version"): (c_char_p, []),
        (cpu, "ggml_cpu_init"): (None, []),
        (cpu, "ggml_graph_plan"): (_Plan, [c_void_p, c_int, c_void_p]),
        (cpu, "ggml_graph_compute"): (c_int, [c_void_p, POINTER(_Plan)]),
    }
    for (library, name), (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


def version() -> str:
    text: bytes = libraries()[0].ggml_version()
    return text.decode()


class GatedDeltaNet:
    """A ggml graph of one call; `run()` computes `o` [B, T, H, D] and `final_state` [B, H, D, D]."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Build the graph on copies of q, k, v [B, T, H, D], g, beta [B, T, H] and state [B, H, D, D], all float32."""
        self.base, self.cpu = libraries()
        B, T, H, D = v.shape
        if q.shape != v.shape or v.dtype != torch.float32:
            raise ValueError(f"ggml: q must have v's shape, in float32, got {list(q.shape)} and {list(v.shape)}")
        state = torch.zeros(B, H, D, D) if state is None else state.mT
        inputs = (q, k, v, g[..., None], beta[..., None], state)
        num_outputs = v.numel() + state.numel()
        size = 4 * (sum(x.numel() for x in inputs) + num_outputs) + HEADROOM
        self.context = self.base.ggml_init(_InitParams(size, None, False))
        tensors = [self._tensor(x.contiguous()) for x in inputs]
        result = self.base.ggml_gated_delta_net(self.context, *tensors, 1)
        self.graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(self.graph, result)
        self.plan = self.cpu.ggml_graph_plan(self.graph, num_threads or torch.get_num_threads(), None)
        self.work = ctypes.create_string_buffer(self.plan.work_size)
        self.plan.work_data = ctypes.cast(self.work, c_void_p)
        data = (ctypes.c_float * num_outputs).from_address(self.base.ggml_get_data(result))
        outputs = torch.frombuffer(data, dtype=torch.float32)
        self.o = outputs[: v.numel()].view(B, T, H, D)
        self.final_state = outputs[v.numel() :].view(B, H, D, D).mT

    def _tensor(self, x: torch.Tensor) -> int:
        tensor: int = self.base.ggml_new_tensor_4d(self.context, F32, *reversed(x.shape))
        ctypes.memmove(self.base.ggml_get_data(tensor), x.data_ptr(), 4 * x.numel())
        return tensor

    def run(self) -> None:
        status = self.cpu.ggml_graph_compute(self.graph, ctypes.byref(self.plan))
        if status != 0:
            raise RuntimeError(f"ggml: ggml_graph_compute returned {status}")

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.base.ggml_free(self.context)
