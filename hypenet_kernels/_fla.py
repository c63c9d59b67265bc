"""From the arguments of a public op, which are flash-linear-attention's (0.6), to those of the op underneath."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native
from hypenet_kernels import _recurrence_cuda as cuda
from hypenet_kernels._ops import Function
from hypenet_kernels._recurrence import Inputs, Operators, Rule, StepInputs
from hypenet_kernels.normalization import rms_norm_rope

# Arguments that fla takes by name only in **kwargs, and what is accepted of them.
LEGACY = frozenset({"transpose_state_layout", "head_first", "chunk_size"})


Result = tuple[Tensor, *tuple[Any, ...]]  # o, final_state or None, and checkpoints if wanted


class Gates(NamedTuple):
    """How g and beta are given."""

    use_gate: bool = False  # g is a projection: the log decay is -exp(A_log) softplus(g + dt_bias)
    A_log: Tensor | None = None  # [HV]
    dt_bias: Tensor | None = None  # [HV]
    use_beta_sigmoid: bool = False  # beta is a logit
    allow_neg_eigval: bool = False  # beta = 2 sigmoid(logit), so that I - beta k k^T has eigenvalues down to -1

    @property
    def beta_limit(self) -> float:
        """What sigmoid(beta) is multiplied by; 0 where beta is no logit."""
        return (2.0 if self.allow_neg_eigval else 1.0) if self.use_beta_sigmoid else 0.0


class Options(NamedTuple):
    """Options of a public call that are not tensors."""

    output_final_state: bool
    state_v_first: bool
    use_qk_l2norm: bool = False
    split_sequence: bool = False
    gates: Gates | None = None


def legacy(op: str, arguments: dict[str, Any], state_v_first: bool, sizes: tuple[int, ...]) -> bool:
    """Check the arguments that fla has deprecated; return state_v_first. sizes: the chunk sizes that fla takes."""
    for name in arguments:
        if name not in LEGACY:
            raise TypeError(f"{op}: unexpected argument {name!r}")
    if arguments.get("head_first"):
        _checks.fail(NotImplementedError, op, "head_first", "be False: q must be [B, T, H, K]", True)
    chunk_size = arguments.get("chunk_size")
    if chunk_size is not None and chunk_size not in sizes:
        _checks.fail(ValueError, op, "chunk_size", f"be one of {sizes} (it changes no result)", chunk_size)
    if "transpose_state_layout" in arguments:
        message = f"{op}: transpose_state_layout is deprecated, use state_v_first"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        if state_v_first:
            _checks.fail(ValueError, op, "transpose_state_layout", "be left out with state_v_first", True)
        return bool(arguments["transpose_state_layout"])
    return state_v_first


def refuse(op: str, **arguments: Any) -> None:
    """Raise NotImplementedError for an argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            _checks.fail(NotImplementedError, op, name, "be None (nothing else is built)", value)


def check_interval(op: str, checkpoint_every: int) -> int:
    """Check and return checkpoint_every."""
    _checks.integer(op, "checkpoint_every", checkpoint_every)
    if checkpoint_every <= 0 or checkpoint_every % cuda.CHUNK:
        _checks.fail(ValueError, op, "checkpoint_every", f"be a positive multiple of {cuda.CHUNK}", checkpoint_every)
    return checkpoint_every


def _check_gates(op: str, gates: Gates) -> None:
    if gates.allow_neg_eigval and not gates.use_beta_sigmoid:
        _checks.fail(ValueError, op, "allow_neg_eigval", "be False without use_beta_sigmoid_in_kernel", True)
    if gates.use_gate:
        _checks.tensor(op, "A_log", gates.A_log)


def run(rule: Rule, operators: Operators, x: Inputs, options: Options) -> Result:
    """Run a public function over whole sequences.

    Args:
        x: the arguments as they were passed: scale and gates may be None, and segment_chunks has no meaning yet.

    Returns:
        (o, final_state or None), with checkpoint_every (o, final_state or None, checkpoints).
    """
    op, gates = rule.op, options.gates
    _check_tensors(rule, x, gates)
    q, k, v, g, beta, initial_state, cu_seqlens = x[:7]
    dtype = v.dtype if rule.sequential else q.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = _promoted(op, q, k, v)
    if options.use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    if gates is not None:
        g, beta = _activated(op, gates, x)
    g = _constant(0.0, q, v) if g is None else accumulated(op, "g", g, q)
    if rule.delta:
        beta = _constant(1.0, q, v) if beta is None else accumulated(op, "beta", beta, q)
    if initial_state is not None:
        if x.state_indices is None:
            initial_state = accumulated(op, "initial_state", initial_state, q)
        elif options.state_v_first and initial_state.is_contiguous() and not initial_state.mT.is_contiguous():
            transposed = "be a transposed view (.mT) of a pool [slots, HV, K, V] with state_v_first"
            _checks.fail(NotImplementedError, op, "initial_state", transposed, "a contiguous one")
        initial_state = initial_state.mT if options.state_v_first else initial_state
    tensors, scale = (q, k, v, g, beta, initial_state), _checks.scale(op, x.scale, q)
    segment_chunks = 0
    if options.split_sequence:
        segment_chunks = _segment_chunks(op, Inputs(*tensors, cu_seqlens, scale, 0))
    if x.state_indices is None and x.checkpoint_every == 0:
        operator = operators.differentiable if _checks.wants_gradient(*tensors) else operators.inference
        o, final_state, *_ = operator(*tensors, cu_seqlens, scale, segment_chunks)
        checkpoints: Any = ()
    else:
        o, final_state, *checkpoints = _serve(
            op, operators, Inputs(*tensors, cu_seqlens, scale, segment_chunks, x.checkpoint_every, x.state_indices)
        )
    if o.dtype != dtype:
        o = o.to(dtype)
    if options.state_v_first:
        final_state, checkpoints = final_state.mT, [y.mT for y in checkpoints]
    return o, final_state if options.output_final_state else None, *checkpoints


def _check_tensors(rule: Rule, x: Inputs, gates: Gates | None) -> None:
    """Check kinds and devices of all tensors."""
    required: dict[str, Any] = {"q": x.q, "k": x.k, "v": x.v}
    optional: dict[str, Any] = {"initial_state": x.initial_state, "cu_seqlens": x.cu_seqlens}
    given = optional if rule.optional_gates else required
    given["g"] = x.g
    if rule.delta:
        given["beta"] = x.beta
    if x.state_indices is not None:
        optional["state_indices"] = x.state_indices
    if gates is not None:
        _check_gates(rule.op, gates)
        if gates.use_gate:  # else A_log and dt_bias are ignored, as fla does
            optional |= {"A_log": gates.A_log, "dt_bias": gates.dt_bias}
    _checks.tensors(rule.op, required, optional)


def _serve(op: str, operators: Operators, x: Inputs) -> tuple[Any, ...]:
    """Call an op with a pool of states or checkpoints; return o, final_state (the pool if any) and checkpoints."""
    what = "with state_indices or checkpoint_every (they have no backward; use torch.no_grad())"
    _checks.no_grad(op, dict(zip(Inputs._fields[:6], x, strict=False)), {}, what)
    if x.state_indices is None:
        return tuple(operators.checkpointed(*x[:10]))
    if x.initial_state is None:
        _checks.fail(TypeError, op, "initial_state", "be a pool of states with state_indices", None)
    o, checkpoints = operators.pooled(*x)
    return (o, x.initial_state, checkpoints) if x.checkpoint_every else (o, x.initial_state)


def step(op: str, operator: Function, x: StepInputs, gates: Gates | None) -> Any:
    """Run a public decode step. x: the arguments as they were passed; beta_limit has no meaning yet."""
    required: dict[str, Any] = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "state": x.state}
    if op == "gated_delta_step":
        required["beta"] = x.beta
    optional = {"state_indices": x.state_indices, "A_log": x.A_log, "dt_bias": x.dt_bias}
    _checks.tensors(op, required, optional)
    _checks.no_grad(op, required, optional)
    if gates is not None:
        _check_gates(op, gates)
    if (x.A_log is not None or x.dt_bias is not None) and (gates is None or not gates.use_gate):
        name, y = ("dt_bias", x.dt_bias) if x.A_log is None else ("A_log", x.A_log)
        _checks.fail(ValueError, op, name, "be left out without use_gate_in_kernel", y)
    q, g, beta = x.q, x.g, x.beta
    if g.dtype != q.dtype or (beta is not None and beta.dtype != q.dtype):
        g, beta = accumulated(op, "g", g, q), accumulated(op, "beta", beta, q)
    scale, limit, A_log, dt_bias = _checks.scale(op, x.scale, q), 0.0, None, None
    if gates is not None:
        limit = gates.beta_limit
        A_log, dt_bias = accumulated(op, "A_log", x.A_log, q), accumulated(op, "dt_bias", x.dt_bias, q)
    return operator(q, x.k, x.v, g, beta, x.state, x.state_indices, A_log, dt_bias, scale, x.use_qk_l2norm, limit)


def run_reversed(rule: Rule, operators: Operators, x: Inputs, options: Options) -> Result:
    """Run a public function from the last token of every sequence to its first."""
    _check_tensors(rule, x, None)
    bounds, state, T = x.cu_seqlens, x.initial_state, x.q.shape[1]
    flipped = x._replace(q=x.q.flip(1), k=x.k.flip(1), v=x.v.flip(1), g=None if x.g is None else x.g.flip(1))
    if bounds is None:
        o, final_state = run(rule, operators, flipped, options)
        return o.flip(1), final_state
    # The tokens after the last sequence now come first: a sequence of their own, whose results are dropped.
    _checks.cu_seqlens(rule.op, bounds, x.q)
    bounds = torch.nn.functional.pad(T - bounds.flip(0), (1, 0))
    if state is not None:
        state = torch.cat([torch.zeros_like(state[:1]), state.flip(0)])
    o, final_state = run(rule, operators, flipped._replace(initial_state=state, cu_seqlens=bounds), options)
    in_sequence = torch.arange(T, device=o.device) >= bounds[1]
    o = torch.where(in_sequence[:, None, None], o, 0).flip(1)
    return o, None if final_state is None else final_state[1:].flip(0)


def _segment_chunks(op: str, x: Inputs) -> int:
    _checks.rank(op, "v", x.v, "B T HV V")
    if x.cu_seqlens is not None:
        _checks.rank(op, "cu_seqlens", x.cu_seqlens, "N+1")
    return cuda.chunks_of_segment(x)


def _promoted(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v in the one float type that holds all of theirs."""
    for name, x in zip("qkv", tensors, strict=True):
        _checks.dtype(op, name, x, _checks.FLOATS)
    q, k, v = (x.dtype for x in tensors)
    dtype = torch.promote_types(torch.promote_types(q, k), v)
    return tuple(x.to(dtype) for x in tensors)


def _constant(value: float, q: Tensor, v: Tensor) -> Tensor:
    """Return what g = None (0) or beta = None (1) means, for every token and value head."""
    return v.new_full((), value, dtype=_native.accumulator(q.dtype)).expand(v.shape[:3])


def _activated(op: str, gates: Gates, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """Return (g, beta) of gates as a layer projects them, computed in the accumulation type."""
    g, beta = x.g, x.beta
    _checks.rank(op, "v", x.v, "B T HV V")
    if gates.use_gate:
        _checks.tensor(op, "g", g)
        _checks.shape(op, "g", g, x.v.shape[:3])
        A_log, dt_bias = accumulated(op, "A_log", gates.A_log, x.q), accumulated(op, "dt_bias", gates.dt_bias, x.q)
        g = accumulated(op, "g", g, x.q)
        assert A_log is not None and g is not None
        for name, y in (("A_log", A_log), ("dt_bias", dt_bias)):
            if y is not None:
                _checks.shape(op, name, y, x.v.shape[2:3])
        g = -A_log.exp() * torch.nn.functional.softplus(g if dt_bias is None else g + dt_bias)
    if gates.use_beta_sigmoid:
        beta = accumulated(op, "beta", beta, x.q)
        if beta is None:
            _checks.fail(TypeError, op, "beta", "be a tensor with use_beta_sigmoid_in_kernel", None)
        beta = gates.beta_limit * beta.sigmoid()
    return g, beta


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x / sqrt(sum(x^2) + eps) over the last dimension, rounded once: an RMSNorm with the weight K^-1/2."""
    if x.dim() == 0 or x.dtype not in _checks.FLOATS:
        return x  # for the op to refuse
    K = max(1, x.shape[-1])
    weight = x.new_full(x.shape[-1:], K**-0.5, dtype=_native.accumulator(x.dtype))
    return rms_norm_rope(x, weight, eps=eps / K)


def accumulated(op: str, name: str, x: Any, q: Tensor) -> Any:
    """Return a gate or state of any float type in the accumulation type of q; None for None."""
    wide = _native.accumulator(q.dtype)
    if x is None or x.dtype == wide:
        return x
    _checks.dtype(op, name, x, _checks.FLOATS)
    return x.to(wide)
