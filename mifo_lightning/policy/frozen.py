"""Weights that stand still all through training: those that text never reaches, and those that the user names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mifo_lightning.common.errors import InputError
from mifo_lightning.policy.policy import Policy, Sequences


def freeze_unused(policy: Policy) -> list[str]:
    """Take the gradient from weights that text never reaches, such as a vision tower; DDP would wait for it.

    Returns:
        Names of the modules that hold them.
    """
    logp, _ = policy(Sequences.pack([[0, 1]], [[2, 3]], 0).to(policy.device))
    reached, nodes = set(), [logp.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        reached.add(id(getattr(node, "variable", None)))
        new = {n for n, _ in getattr(node, "next_functions", ()) if n is not None} - seen
        seen |= new
        nodes += new
    modules = set()
    for name, p in policy.model.named_parameters():
        # an expert that these few tokens miss is used by others
        if p.requires_grad and id(p) not in reached and "expert" not in name:
            p.requires_grad_(False)
            modules.add(".".join(name.split(".")[:2]))
    return sorted(modules)


def freeze_named(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradient from parameters whose Hugging Face name matches one of `patterns`, in which * is any text.

    Raises:
        InputError: A pattern matches none, or together they match all that was trained.
    """
    weights = dict(model.named_parameters())
    for pattern in patterns:
        matched = [p for name, p in weights.items() if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(weights)[:3])
            raise InputError(f"model.loading.frozen: {pattern!r} matches no weight; some of the names: {some}")
        for p in matched:
            p.requires_grad_(False)
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"model.loading.frozen: {list(patterns)} matches every weight; leave some to be trained")
