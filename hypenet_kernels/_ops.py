"""Registers ops with torch.library and gives them gradients. No other module uses torch.library.

torch.library.register_autograd would do for any schema; its generality costs every call more than a small kernel takes.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload

Function = Callable[..., Any]

# A copy that the hub's `kernels` library loads has another name, and its ops another namespace than an installed one's.
NAMESPACE = "hypenet" if __package__ == "hypenet_kernels" else __package__.replace(".", "_")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, fake: Function, run: Function) -> OpOverload:
    """Register the op torch.ops.hypenet.<name of the schema>.

    Args:
        schema: `name(arguments) -> results`, in torch.library's language.
        fake: checks the arguments and allocates the results.
        run: computes them, on the CPU and on CUDA.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    for kind in ("QuantizedCPU", "NestedTensorCPU", "AutogradNestedTensor", "QuantizedCUDA", "NestedTensorCUDA"):
        _library.impl(name, functools.partial(_refuse_layout, name.removesuffix("_inference")), kind)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def _refuse_layout(op: str, *given: Any) -> NoReturn:
    raise NotImplementedError(f"{op}: every tensor must be dense and not quantised")


def define_differentiable(
    name: str, inputs: str, outputs: str, saved: str, fake: Function, run: Function, gradient: tuple[Function, Function]
) -> tuple[OpOverload, Function]:
    """Register an op that can be differentiated once; return (<name>_inference, <name>).

    `<name>_inference` returns `outputs` and has no gradient: a call that wants none pays neither for tensors saved for
    backward nor for autograd. `<name>` returns `outputs` and `saved`; `<name>_saving` is the same below autograd.

    Args:
        inputs, outputs, saved: parts of the schema.
        fake, run: functions of (save, *inputs), as in `define`; save: whether `saved` is wanted too.
        gradient: (setup_context(ctx, inputs, outputs), backward(ctx, *gradients)).
    """
    forms = {"_inference": outputs, "_saving": f"{outputs}, {saved}", "": f"{outputs}, {saved}"}
    inference, saving, operator = (
        define(
            f"{name}{suffix}({inputs}) -> ({results})",
            functools.partial(fake, suffix != "_inference"),
            functools.partial(run, suffix != "_inference"),
        )
        for suffix, results in forms.items()
    )
    setup_context, backward = gradient

    def forward(ctx: Any, *given: Any) -> Any:
        results = saving(*given)
        setup_context(ctx, given, results)
        return results

    _library.impl(name, _autograd_function(name, forward=forward, backward=backward).apply, "Autograd")
    transformable = _autograd_function(name, forward=saving, setup_context=setup_context, backward=backward)

    def differentiable(*given: Any) -> Any:
        # torch.func transforms a Function with setup_context, which is slow, and only outside of the dispatcher.
        return transformable.apply(*given) if transformed() else operator(*given)

    return inference, differentiable


def transformed() -> bool:
    """Whether a call is under a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def differentiable_once(backward: OpOverload, message: str) -> Function:
    """Wrap a backward op so that a second derivative raises NotImplementedError(message).

    torch's once_differentiable is not enough: if an input of the forward requires grad and `do` does not, it cuts the
    graph, and a loss with other terms gets a wrong gradient without a word.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        return backward(*inputs)

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(message)

    def keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    name = backward.name()
    second = _autograd_function(name, forward=forward, backward=refuse)
    transformable = _autograd_function(name, forward=backward, setup_context=keep_nothing, backward=refuse)

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(*inputs)
        return (transformable if transformed() else second).apply(*inputs)

    return run


def _autograd_function(name: str, **methods: Function) -> Any:
    def refuse(ctx: Any, *arguments: Any) -> NoReturn:
        op = name.partition("::")[2] or name
        raise NotImplementedError(f"{op}: forward-mode derivatives (jvp) and vmap are not built")

    methods |= {"jvp": refuse, "vmap": refuse}
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
