"""The gated delta rule and simple GLA as ops: one family of kernels, with beta (the delta rule) or without (None).

Every forward op takes the fields of `Inputs`, in their order, and has these forms:

    <op>               -> o, final_state, saved     differentiable; saved: what the backward needs on CUDA (Saved)
    <op>_inference     -> o, final_state            without a gradient
    <op>_checkpointed  -> o, final_state, checkpoints
    <op>_pooled        -> o, checkpoints            reads and updates states in a pool, in place

Decode steps take the fields of `StepInputs`. Inside an op, q, k and v share a dtype, and g, beta and states have the
accumulation type.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native, _ops
from hypenet_kernels import _recurrence_cuda as cuda

Fields = dict[str, Any]


class Rule(NamedTuple):
    """A public op over whole sequences, and what computes it."""

    op: str
    kernel: str  # on the CPU; on CUDA it is the chunk form, or for few tokens the step
    delta: bool  # whether it has beta
    sequential: bool
    optional_gates: bool  # g = None is no decay, and beta = None is 1


class Inputs(NamedTuple):
    """The arguments of a forward op. g and scale may be None until _fla.run has resolved them."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Any  # [B, T, HV]
    beta: Tensor | None  # [B, T, HV]; None: simple GLA
    initial_state: Tensor | None  # [N, HV, K, V]; with state_indices a pool [slots, HV, K, V]
    cu_seqlens: Tensor | None  # [N + 1]
    scale: Any  # float
    segment_chunks: int  # chunks of a segment where CUDA splits sequences; 0: no split
    checkpoint_every: int = 0  # tokens from one returned state to the next; 0: none is returned
    state_indices: Tensor | None = None  # [N] slots; negative: the sequence is skipped

    @property
    def num_sequences(self) -> int:
        """N: the batch size, or how many sequences are packed."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[N, HV, K, V]"""
        return self.num_sequences, self.v.shape[2], self.q.shape[3], self.v.shape[3]


class StepInputs(NamedTuple):
    """The arguments of a decode step."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV], in q's dtype or the accumulation type, as beta
    beta: Tensor | None  # [B, T, HV]; None: simple GLA
    state: Tensor  # [B, HV, K, V], or with state_indices a pool of slots
    state_indices: Tensor | None  # [B]
    A_log: Tensor | None  # [HV]; if given, g means -exp(A_log) softplus(g + dt_bias)
    dt_bias: Tensor | None  # [HV]
    scale: Any  # float
    use_qk_l2norm: bool
    beta_limit: float  # 0: beta is beta; else beta means beta_limit sigmoid(beta)


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "int segment_chunks"
)
POOLED_SCHEMA = f"{SCHEMA}, int checkpoint_every, Tensor state_indices".replace(
    "Tensor? initial_state", "Tensor(a!) initial_state"
)
STEP_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor{} state, Tensor? state_indices, Tensor? A_log, "
    "Tensor? dt_bias, float scale, bool use_qk_l2norm, float beta_limit"
)


def check_operands(
    op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, gates: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Return B, T, K, HV, V. gates: the dtype of g and beta."""
    _checks.rank(op, "q", q, "B T H K")
    _checks.rank(op, "v", v, "B T HV V")
    _checks.element(op, "q", q)
    (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
    _checks.like(op, "k", k, "q", q)
    _checks.shape(op, "v", v, (B, T, HV, V))
    _checks.same_dtype(op, "v", v, q)
    if K == 0 or V == 0:
        _checks.fail(ValueError, op, "head dimensions", "be at least 1", f"K = {K}, V = {V}")
    _checks.multiple(op, "v's number of heads", HV, "q's number of heads", H)
    for name, x in (("g", g), ("beta", beta)):
        if x is not None:
            _checks.shape(op, name, x, (B, T, HV))
            _checks.dtype(op, name, x, (gates,))
    return B, T, K, HV, V


def check(op: str, x: Inputs) -> None:
    """Check the arguments of a forward or backward op."""
    check_operands(op, x.q, x.k, x.v, x.g, x.beta, _native.accumulator(x.q.dtype))
    if x.cu_seqlens is not None:
        _checks.cu_seqlens(op, x.cu_seqlens, x.q)
    if x.state_indices is None:
        if x.initial_state is not None:
            _check_state(op, "initial_state", x.initial_state, x, x.num_sequences)
        return
    _checks.indices(op, "state_indices", x.state_indices, x.num_sequences)
    _check_pool(op, "initial_state", x.initial_state, x)


def _check_state(op: str, name: str, state: Tensor | None, x: Inputs | StepInputs, slots: int) -> None:
    if state is not None:
        _checks.shape(op, name, state, (slots, x.v.shape[2], x.q.shape[3], x.v.shape[3]))
        _checks.dtype(op, name, state, (_native.accumulator(x.q.dtype),))


def _check_pool(op: str, name: str, pool: Tensor | None, x: Inputs | StepInputs) -> None:
    """Check states that are updated in place: any stride from slot to slot, each slot contiguous."""
    if pool is None:
        _checks.fail(TypeError, op, name, "be a pool of states with state_indices", None)
    _checks.rank(op, name, pool, "slots HV K V")
    slots = pool.shape[0] if x.state_indices is not None else x.q.shape[0]
    _check_state(op, name, pool, x, slots)
    _checks.pool(op, name, pool)


def allocate(x: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return uninitialised (o, final_state, checkpoints); checkpoints: None where none are wanted."""
    (B, T, _, K), (_, _, HV, V), wide = x.q.shape, x.v.shape, _native.accumulator(x.q.dtype)
    o = x.q.new_empty(B, T, HV, V)
    if x.state_indices is None:
        final_state = x.q.new_empty(x.num_sequences, HV, K, V, dtype=wide)
    else:
        assert x.initial_state is not None  # a pool, which `check` has seen
        final_state = x.initial_state
    if x.checkpoint_every == 0:
        return o, final_state, None
    # Packed sequences do not fill all of them, nor do skipped ones.
    new = x.q.new_empty if x.cu_seqlens is None and x.state_indices is None else x.q.new_zeros
    return o, final_state, new(B, T // x.checkpoint_every, HV, K, V, dtype=wide)


def _results(x: Inputs, o: Tensor, final_state: Tensor, checkpoints: Tensor | None, saved: Any) -> Any:
    if x.state_indices is not None:
        return o, o.new_empty(0) if checkpoints is None else checkpoints
    if checkpoints is not None:
        return o, final_state, checkpoints
    return (o, final_state) if saved is None else (o, final_state, list(saved))


def _forward_fake(rule: Rule, save: bool, *arguments: Any) -> Any:
    x = Inputs(*arguments)
    check(rule.op, x)
    saved = (cuda.saved_tensors(x, *_dims(rule.op, x)) if _native.on_cuda(x.q) else ()) if save else None
    return _results(x, *allocate(x), saved)


def _forward(rule: Rule, save: bool, *arguments: Any) -> Any:
    x = Inputs(*arguments)
    op, on_cuda = rule.op, _native.on_cuda(x.q)
    check(op, x)
    o, final_state, checkpoints = allocate(x)
    if on_cuda and rule.sequential and _as_steps(x, save):
        return _steps(op, x, o, final_state)
    if on_cuda:
        K, V = cuda.padded_dims(op, x.q, x.v)
        q, k, v = _native.rows(x.q, K), _native.rows(x.k, K), _native.rows(x.v, V)
        wide_o, wide_state = _native.buffer(o, V), _native.buffer(final_state, K, V)
    else:
        K, V = x.q.shape[3], x.v.shape[3]
        q, k, v = _native.dense_last(x.q), _native.dense_last(x.k), _native.dense_last(x.v)
        wide_o, wide_state = o, final_state
    bounds = None if x.cu_seqlens is None else _native.bounds(x.cu_seqlens)
    fields = {
        **_operands(x, q, k, v),
        "N": final_state.shape[0] if x.state_indices is None else x.num_sequences,
        "cu_seqlens": _native.pointer(bounds),
        "o": _native.pointer(wide_o),
    }
    if x.state_indices is None:
        initial_state = None if x.initial_state is None else _native.padded(x.initial_state, K, V).contiguous()
    else:
        _check_slots(op, x, K, V)
        initial_state, slots = final_state, x.state_indices.contiguous()
        fields["state_indices"] = _native.indices(slots)
        fields["num_slots"], fields["slot_stride"] = final_state.shape[0], final_state.stride(0)
    fields["initial_state"], fields["final_state"] = _native.pointer(initial_state), _native.pointer(wide_state)
    if checkpoints is not None:
        wide = _native.padded(checkpoints, K, V)  # zeros included
        fields["checkpoint_every"], fields["checkpoints"] = x.checkpoint_every, _native.pointer(wide)
    if not on_cuda:
        _native.kernel(op, rule.kernel, x.q.device)(fields)
        return (o, final_state, []) if save else _results(x, o, final_state, checkpoints, None)
    workspace = cuda.forward_workspace(x, K, V, save)
    _native.kernel(op, "gated_delta_chunk_fwd", x.q.device)(fields | cuda.fields(x, workspace))
    if checkpoints is not None:
        checkpoints = _native.narrowed(wide, checkpoints)
    o, final_state = _native.narrowed(wide_o, o), _native.narrowed(wide_state, final_state)
    return _results(x, o, final_state, checkpoints, workspace.saved if save else None)


def _dims(op: str, x: Inputs) -> tuple[int, int]:
    """Return K and V as the kernels take them."""
    return cuda.padded_dims(op, x.q, x.v) if _native.on_cuda(x.q) else (x.q.shape[3], x.v.shape[3])


def _read(x: Inputs, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the kernels read them."""
    if _native.on_cuda(x.q):
        return _native.rows(x.q, K), _native.rows(x.k, K), _native.rows(x.v, V)
    return _native.dense_last(x.q), _native.dense_last(x.k), _native.dense_last(x.v)


def _check_slots(op: str, x: Inputs, K: int, V: int) -> None:
    """Check that kernels for K and V can update the pool in place; on the CPU, also the values of state_indices."""
    assert x.initial_state is not None and x.state_indices is not None
    own = x.state_shape[2:]
    if own != (K, V):
        rule = f"have K in {cuda.KEY_DIMS} and V a multiple of {cuda.VALUE_DIM_MULTIPLE} on CUDA"
        _checks.fail(NotImplementedError, op, "a pool of states", rule, f"K = {own[0]}, V = {own[1]}")
    if not _native.on_cuda(x.q):
        _checks.slots(op, x.state_indices, x.initial_state.shape[0])


def _as_steps(x: Inputs, save: bool) -> bool:
    """Whether the recurrent form on CUDA goes token by token: with few of them, and in float32 always."""
    few = x.q.shape[1] <= cuda.STEP_TOKENS or x.q.dtype == torch.float32
    return few and not save and x.cu_seqlens is None and x.checkpoint_every == 0 and x.state_indices is None


def _steps(op: str, x: Inputs, o: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
    final_state.zero_() if x.initial_state is None else final_state.copy_(x.initial_state)
    step = StepInputs(x.q, x.k, x.v, x.g, x.beta, final_state, None, None, None, x.scale, False, 0.0)
    _launch_step(op, step, o, None)
    return o, final_state


def _backward_fake(op: str, do: Tensor, dfinal_state: Tensor | None, saved: list[Tensor], *arguments: Any) -> Any:
    x = Inputs(*arguments)
    check(op, x)
    _checks.like(op, "do", do, "v", x.v)
    _check_state(op, "dfinal_state", dfinal_state, x, x.num_sequences)
    dq, dk, dv, dg = (_native.empty_like(y) for y in (x.q, x.k, x.v, x.g))
    dbeta = x.g.new_empty(0) if x.beta is None else _native.empty_like(x.beta)
    N, HV, K, V = x.state_shape
    return dq, dk, dv, dg, dbeta, x.q.new_empty(N, HV, K, V, dtype=_native.accumulator(x.q.dtype))


def _backward(op: str, do: Tensor, dfinal_state: Tensor | None, saved: list[Tensor], *arguments: Any) -> Any:
    gradients = _backward_fake(op, do, dfinal_state, saved, *arguments)
    x, on_cuda = Inputs(*arguments), _native.on_cuda(do)
    K, V = _dims(op, x)
    (q, k, v), do = _read(x, K, V), _native.rows(do, V)
    initial_state, bounds = _native.contiguous(x.initial_state), _native.bounds(x.cu_seqlens)
    if dfinal_state is not None:
        dfinal_state = _native.padded(dfinal_state, K, V).contiguous()
    buffers, names = gradients, ("dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
    if on_cuda:
        sizes = (K,), (K,), (V,), (), (), (K, V)
        buffers = tuple(_native.buffer(y, *size) if size else y for y, size in zip(gradients, sizes, strict=True))
    fields = {
        **_operands(x, q, k, v),
        "N": x.num_sequences,
        "cu_seqlens": _native.pointer(bounds),
        "initial_state": _native.pointer(initial_state),
        "do_": _native.view(do),
        "dfinal_state": _native.pointer(dfinal_state),
        **{name: _native.pointer(y) for name, y in zip(names, buffers, strict=True)},
    }
    if x.beta is None:
        fields["dbeta"] = 0
    kernel = _native.kernel(op, "gated_delta_chunk_bwd", x.q.device)
    if not on_cuda:
        kernel(fields)
        return gradients
    workspace = cuda.backward_workspace(op, x, K, V, cuda.Saved(*saved))
    kernel(fields | cuda.fields(x, workspace))
    return tuple(_native.narrowed(wide, y) for wide, y in zip(buffers, gradients, strict=True))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x = Inputs(*inputs)
    ctx.scale, ctx.segment_chunks = x.scale, x.segment_chunks
    ctx.save_for_backward(*inputs[:7], *output[2])
    ctx.set_materialize_grads(False)


def _differentiate(backward: _ops.Function, ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: Any) -> Any:
    """Return the gradients of a forward op's inputs."""
    tensors = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    x, saved = Inputs._make((*tensors[:7], ctx.scale, ctx.segment_chunks, 0, None)), list(tensors[7:])
    if do is None:
        if dfinal_state is None:
            return (None,) * 9
        do = x.q.new_zeros(x.v.shape)
    *gradients, dbeta, dinitial_state = backward(do, dfinal_state, saved, *x[:9])
    dbeta = None if x.beta is None else dbeta
    return *gradients, dbeta, None if x.initial_state is None else dinitial_state, None, None, None


def _step_fake(op: str, draft: bool, *arguments: Any) -> Any:
    return _step_results(op, StepInputs._make(arguments), draft)


def _step_results(op: str, x: StepInputs, draft: bool) -> Any:
    """Check the arguments of a step; return uninitialised o, for draft tokens (o, states)."""
    B, T, K, HV, V = check_operands(op, x.q, x.k, x.v, x.g, x.beta, _gate_dtype(x))
    state = x.state
    wide = _native.accumulator(x.q.dtype)
    if x.state_indices is not None or state.dtype != wide or state.shape != (B, HV, K, V) or not state.is_contiguous():
        _check_pool(op, "state", state, x)  # a pool, or what is wrong with it
    if x.state_indices is not None:
        _checks.indices(op, "state_indices", x.state_indices, B)
    if x.A_log is not None or x.dt_bias is not None:
        for name, y in (("A_log", x.A_log), ("dt_bias", x.dt_bias)):
            if y is not None:
                _checks.shape(op, name, y, (HV,))
                _checks.dtype(op, name, y, (wide,))
    o = x.q.new_empty(B, T, HV, V)
    return (o, x.state.new_empty(B, T, HV, K, V)) if draft else o


def _gate_dtype(x: StepInputs) -> torch.dtype:
    return x.q.dtype if x.g.dtype == x.q.dtype else _native.accumulator(x.q.dtype)


def _step(op: str, draft: bool, *arguments: Any) -> Any:
    x = StepInputs._make(arguments)
    results = _step_results(op, x, draft)
    o, states = results if draft else (results, None)
    _launch_step(op, x, o, states)
    return results


def _launch_step(op: str, x: StepInputs, o: Tensor, states: Tensor | None) -> None:
    """What the values of state_indices break raises on the CPU, and gives o = NaN on CUDA."""
    K = x.q.shape[3]
    if _native.on_cuda(x.q):
        if K > _native.cuda().STEP_MAX_KEY_DIM:
            rule = f"have a head dimension of at most {_native.cuda().STEP_MAX_KEY_DIM} on CUDA"
            _checks.fail(NotImplementedError, op, "q", rule, K)
    elif x.state_indices is not None:
        _checks.slots(op, x.state_indices, x.state.shape[0])
    q, k, v = _native.dense_last(x.q), _native.dense_last(x.k), _native.dense_last(x.v)
    state_indices, A_log, dt_bias = map(_native.contiguous, (x.state_indices, x.A_log, x.dt_bias))
    fields = {
        **_operands(x, q, k, v),
        "use_qk_l2norm": x.use_qk_l2norm,
        "gates_in_dtype": x.g.dtype == x.q.dtype,
        "beta_limit": x.beta_limit,
        "A_log": _native.pointer(A_log),
        "dt_bias": _native.pointer(dt_bias),
        "num_slots": x.state.shape[0],
        "state_indices": _native.indices(state_indices),
        "state": _native.pointer(x.state),
        "o": _native.pointer(o),
    }
    if not x.state.is_contiguous():
        fields["slot_stride"] = x.state.stride(0)
    if states is not None:
        fields["states"] = _native.pointer(states)
    _native.kernel(op, "gated_delta_step", x.q.device)(fields)


def _operands(x: Inputs | StepInputs, q: Tensor, k: Tensor, v: Tensor) -> Fields:
    """The fields that all params structs of the family share; q, k, v: as kernels read them."""
    (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
    return {
        "dtype": _native.DTYPES[q.dtype],
        "delta": x.beta is not None,
        "num_threads": _native.threads(),
        "B": B,
        "T": T,
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "scale": x.scale,
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "g": _native.view(x.g),
        "beta": _native.view(x.beta),
    }


class Operators(NamedTuple):
    """The forms of a forward op that the public functions call."""

    inference: _ops.Function
    differentiable: _ops.Function
    checkpointed: _ops.Function
    pooled: _ops.Function


def define_sequence_op(rule: Rule, backward: _ops.Function) -> Operators:
    """Register a forward op in all its forms. backward: what define_backward returned for its chunk form."""
    run, fake = functools.partial(_forward, rule), functools.partial(_forward_fake, rule)
    gradient = _setup_context, functools.partial(_differentiate, backward)
    results = "Tensor o, Tensor final_state"
    return Operators(
        *_ops.define_differentiable(rule.op, SCHEMA, results, "Tensor[] saved", fake, run, gradient),
        *(
            _ops.define(schema, functools.partial(fake, False), functools.partial(run, False))
            for schema in (
                f"{rule.op}_checkpointed({SCHEMA}, int checkpoint_every) -> ({results}, Tensor checkpoints)",
                f"{rule.op}_pooled({POOLED_SCHEMA}) -> (Tensor o, Tensor checkpoints)",
            )
        ),
    )


def define_backward(forward: str) -> _ops.Function:
    """Register the backward op of the chunk form `forward`; return what its gradient calls."""
    op = f"{forward}_bwd"
    results = ", ".join(f"Tensor d{name}" for name in Inputs._fields[:6])
    schema = f"{op}(Tensor do, Tensor? dfinal_state, Tensor[] saved, {SCHEMA}) -> ({results})"
    operator = _ops.define(schema, functools.partial(_backward_fake, op), functools.partial(_backward, op))
    return _ops.differentiable_once(operator, f"{op}: there is no second derivative")


def define_step(op: str) -> tuple[_ops.Function, _ops.Function]:
    """Register a decode step and its form for draft tokens, which returns the state after each and changes none."""
    forms = (op, "(a!)", False, "Tensor"), (f"{op}_draft", "", True, "(Tensor o, Tensor states)")
    step, draft = (
        _ops.define(
            f"{name}({STEP_SCHEMA.format(alias)}) -> {results}",
            functools.partial(_step_fake, op, draft),
            functools.partial(_step, op, draft),
        )
        for name, alias, draft, results in forms
    )
    return step, draft
