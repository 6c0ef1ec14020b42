"""Batches of as many rows as fit a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 8  # lengths that differ by less are alike: their rows change places each epoch


def budgeted(
    lengths: list[int], tokens: int, seed: int, world: int = 1
) -> Callable[[int], list[list[int]]]:
    """Batches whose rows, padded to the longest of them, hold at most so many tokens.

    Rows of like length stand together, at random among themselves; so do the batches of one round
    over the processes, which have about equally much to do; the order of the rounds is random.
    Each epoch has its own batches, as many as every other, from seed and epoch alone.

    Args:
        lengths: Tokens of each row.
        tokens: Of a batch, with padding.
        seed: Of the order.
        world: Processes; batch i goes to process i % world.

    Returns:
        Epoch -> row numbers of each batch, for all processes.

    Raises:
        ValueError: A row alone is longer.
    """
    longest = int(np.argmax(lengths))
    if lengths[longest] > tokens:
        raise ValueError(
            f"max_tokens_per_batch={tokens} is less than the {lengths[longest]} tokens of row "
            f"{longest}. Raise it, or lower maxlength."
        )
    alike = -(-np.array(lengths) // STEP)
    # Shuffling leaves this sequence as it is, so the cuts are those of every epoch.
    cuts = _cuts(np.minimum(np.sort(alike)[::-1] * STEP, tokens), tokens)

    def batches(epoch: int) -> list[list[int]]:
        draw = np.random.default_rng([seed, epoch])
        shuffled = draw.permutation(len(alike))
        order = shuffled[np.argsort(-alike[shuffled], kind="stable")]
        made = [rows.tolist() for rows in np.split(order, cuts)]
        rounds = [made[start : start + world] for start in range(0, len(made), world)]
        # A round that lacks batches stays last, where missing ones are filled.
        whole = len(made) // world
        places = [*draw.permutation(whole).tolist(), *range(whole, len(rounds))]
        return [rows for place in places for rows in rounds[place]]

    return batches


def _cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where to cut falling lengths, so that each part times its first length stays in bounds."""
    cuts, start = [], 0
    while (start := start + tokens // int(lengths[start])) < len(lengths):
        cuts.append(start)
    return cuts
