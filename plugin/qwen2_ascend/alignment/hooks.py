"""Copies of what modules are given and return while they run, by torch's hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def copied(places: Iterable[tuple[str, Any, int | None]]) -> Iterator[dict[str, list[Tensor]]]:
    """Fills a dict, for the length of the block, with what every forward computes.

    Args:
        places: a name, a module, and which of its positional arguments; None for its output.

    Yields:
        By name, a tensor of each forward, in their order.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for name, module, argument in places:
            hooks.enter_context(_attach(module, argument, seen[name]))
        yield seen


def _attach(module: Any, argument: int | None, into: list[Tensor]) -> Any:
    """Copies at once: what follows may write into the tensor."""

    def on_output(_module: Any, _arguments: Any, output: Any) -> None:
        into.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    def on_input(_module: Any, arguments: Any, keywords: Any) -> None:
        # a TransformerBlock hands its layers everything by name
        tensor = arguments[argument] if arguments else keywords["hidden_states"]
        into.append(tensor.detach().clone())

    if argument is None:
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)
