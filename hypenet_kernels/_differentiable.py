"""Gives an op its gradient: an autograd.Function behind the dispatcher's Autograd key.

torch.library.register_autograd does this for any schema, and its generality costs every call more than a small kernel.
"""

import torch


def register(library, name, plain, setup_context, backward):
    """Makes the op <name> differentiable once. plain: an op of the same schema that computes it and has no gradient."""

    def forward(ctx, *inputs):
        outputs = plain(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    library.impl(name, _function(name, forward, backward).apply, "Autograd")


def once(operator, error, message):
    """operator, for a backward to call: what differentiates its result raises error(message).

    A gradient of its own refuses, since once_differentiable notices only a `do` that wants one: where an input of the
    forward does, it cuts the graph, and a loss with other terms would get a wrong gradient without a word.
    """

    def forward(ctx, *inputs):
        return operator(*inputs)

    def refuse(ctx, *_):
        raise error(message)

    second = _function(operator.name(), forward, refuse)

    def run(*inputs):
        return second.apply(*inputs) if torch.is_grad_enabled() else operator(*inputs)

    return run


def _function(name, forward, backward):
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)
