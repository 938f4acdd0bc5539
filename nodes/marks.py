"""Validation that marks each wrong input of a node, and no other."""

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from types import MethodType

from ..loaders.host import executing_node, validated_node
from . import queued_graph
from .schema import Node, problem


class Marks:
    """A node's `validate_inputs`, which marks each input that is wrong, and no other, with what is wrong with it.

    The host marks all inputs that `validate_inputs` takes, and judges the others itself, so that it takes those alone
    that are wrong.

    Args:
        find: From the id of a queued node to what is wrong, by input; None for an input with which nothing is. Values
            are as they were queued, a number may still be text.
    """

    def __init__(self, find: Callable[[str], Mapping[str, str | None]]):
        self.find = find

    def __get__(self, _: object, node: type[Node]) -> Callable:
        asked = validated_node()
        nodes = queued_graph.nodes_of(node.__name__) if asked is None else [asked]
        wrong = dict.fromkeys(name for one in nodes for name, text in self.find(one).items() if text)

        def validate_inputs(cls: type[Node], **names: object) -> bool | str:
            texts = self.find(executing_node() or "")
            return problem(cls, [texts.get(name) for name in names])

        named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("cls", *wrong)]
        validate_inputs.__signature__ = Signature(named)  # type: ignore[attr-defined]  # what the host reads
        return MethodType(validate_inputs, node)
