"""Token ids and the rows of the embedding: an id that has no row is never computed with.

With a cut vocabulary such an id gives zeros in silence, without it an IndexError in the middle of a
run. So every batch is looked at on the host, where that costs microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.errors import UserError


def unknown_tokens(tokens: Sequence[int], vocab_size: int) -> str:
    """Which id the model does not have, in a sentence; or nothing.

    Args:
        tokens: ids.
        vocab_size: rows of the model's embedding, without padding.
    """
    if not len(tokens):
        return ""
    smallest, largest = min(tokens), max(tokens)
    if smallest >= 0 and largest < vocab_size:
        return ""
    token = largest if largest >= vocab_size else smallest
    return (
        f"holds token {token}, the model's vocabulary ends at {vocab_size - 1} (vocab_size in "
        "config.json); the tokens are another tokenizer's, or it has tokens for which the model's "
        "embedding was not resized."
    )


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Refuses ids that the model does not have.

    Raises:
        UserError: says which.
    """
    if unknown := unknown_tokens(tokens, vocab_size):
        raise UserError(f"the text {unknown}")
