"""What tasks share: batches for their models, losses over tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.loading import first_position, text_config
from hflit.tasks.distillation import kl_distance
from hflit.tasks.last_layer import chosen_tokens_only

# How many times the cost of a forward a part may hold, so that one more forward adds 3 % at most.
MOST_COSTS = 32
PROBED = 128  # tokens of a text that shows whether a model can be packed
Items = int | Tensor  # how many; a vector where a loss has several parts


class Evaluated(NamedTuple):
    """What one batch gave in evaluation.

    Attributes:
        loss: Scalar, the mean over the batch.
        sums: The loss summed over its items; a vector where it has several parts.
        items: Items of each part: rows or label tokens.
        outputs: What the model returned, without its loss.
    """

    loss: Tensor
    sums: Tensor
    items: Items
    outputs: dict[str, Any]


def mean_loss(sums: Tensor, items: Items) -> Tensor:
    """Sums over items -> their mean; of several parts, the sum of the means."""
    return (sums / torch.as_tensor(items, device=sums.device).clamp(min=1)).sum()


def blind_to_neighbours(batch: Batch, model: nn.Module, causal: bool) -> Batch:
    """Give packed rows the positions and the attention of texts that run alone.

    Positions count from each text's start, and attention is block-diagonal: a token sees the
    tokens of its own text, for causal models those before it. Causal models with windows find the
    texts by their positions. A batch without packed rows stays as it is. `packable` says
    whether a model follows.

    Args:
        batch: Holds `documents` and `position_ids` if its rows are packed.
        model: Must take `position_ids`.
        causal: Whether a token may not see what comes after it.
    """
    if "documents" not in batch:
        return batch
    batch = dict(batch)
    documents = batch.pop("documents")
    batch["position_ids"] = batch["position_ids"] + first_position(model)
    config: Any = model.config
    has_windows = causal and getattr(config, "sliding_window", None) is not None
    if has_windows or config._attn_implementation.startswith("flash"):
        # flash: never run, no GPU was at hand.
        del batch["attention_mask"]
        found: dict[str, Any] = {**batch, "use_cache": False}  # with a cache it looks for none
        return found
    allowed = documents[:, :, None] == documents[:, None, :]  # (batch, seq, seq); padding alone
    if causal:
        allowed = allowed.tril()
    allowed = allowed[:, None]  # one for all heads: (batch, 1, seq, seq)
    if config._attn_implementation == "eager":  # adds the mask to its scores
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        lowest = torch.finfo(dtype).min
        batch["attention_mask"] = (
            torch.zeros(allowed.shape, dtype=dtype).to(allowed.device).masked_fill(~allowed, lowest)
        )
    else:
        batch["attention_mask"] = allowed
    return batch


def differ(logits: Tensor, others: Tensor) -> bool:
    """Whether logits are apart by more than the rounding of their type."""
    apart = (logits - others).abs().float().mean() / others.abs().float().mean()
    return bool(apart > (0.02 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-4))


def packable(model: Any, causal: bool, maxlength: int | None) -> Any:
    """The model, if texts in a packed row run as if each ran alone.

    Two texts of at most `PROBED` tokens run packed, and each alone. Windows that do not see that
    far, states that go on from text to text and unknown arguments all show there.

    Args:
        model: Has logits for each token.
        causal: Whether a token may not see what comes after it.
        maxlength: Tokens of a packed row, if limited.

    Raises:
        ValueError: They do not.
    """
    takes = inspect.signature(model.forward).parameters
    problem = "takes no position_ids" if "position_ids" not in takes else None
    length = min((maxlength or 2 * PROBED) // 2, PROBED)
    if problem is None and length > 0:
        random = torch.Generator().manual_seed(0)
        config = text_config(model.config)
        ids = torch.randint(config.vocab_size, (2, length), generator=random)
        ids[ids == config.pad_token_id] += 1 if config.pad_token_id == 0 else -1
        ids = ids.to(model.device)
        packed = {
            "input_ids": ids.view(1, -1),
            "attention_mask": torch.ones_like(ids).view(1, -1),
            "documents": torch.arange(2, device=ids.device).repeat_interleave(length)[None],
            "position_ids": torch.arange(length, device=ids.device).repeat(1, 2),
        }
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                given = blind_to_neighbours(packed, model, causal)
                together = model(**{k: v for k, v in given.items() if k in takes}).logits
                alone = torch.cat([model(input_ids=text[None]).logits for text in ids], dim=1)
            if differ(together, alone):
                problem = "lets one text reach another, or sees further in a row of several"
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            problem = f"does not take such rows ({f'{error}' or type(error).__name__})"
        model.train(was_training)
    if problem is not None:
        raise ValueError(
            f"merge='pack' lets each text run as if alone, and {type(model).__name__} {problem}. "
            "Use merge='concat' or merge=None."
        )
    return model


@contextmanager
def logits_only_at(chosen: Tensor, model: Any) -> Iterator[None]:
    """Compute logits for some tokens only: `(chosen, vocab)` in place of `(batch, seq, vocab)`.

    In a masked language model the output layer is often most of the work, and its loss reads 15 %
    of what comes out. The last layer below it, where that can be, is computed for these tokens too.

    Args:
        chosen: True at the tokens, `(batch, seq)`.
        model: A transformers model whose output layer stands at its end; one that names none
            computes all logits.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    fewer_tokens, kept = chosen_tokens_only(chosen, model)
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][kept], *inputs[1:]))
    try:
        with fewer_tokens:
            yield
    finally:
        hook.remove()


def token_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over the tokens that have a label.

    Args:
        logits: `(batch, seq, vocab)`, or of the tokens with a label, `(tokens, vocab)`.
        labels: `(batch, seq)`, -100 where nothing is learned.
        smoothing: Share of each label that is spread over the vocabulary.
    """
    if logits.dim() == 2:
        labels = labels[labels != IGNORE_INDEX]
    return F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        label_smoothing=smoothing,
    )


def token_distance(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`kl_distance` over the tokens that have a label; logits as in `token_loss`."""
    learned = labels != IGNORE_INDEX
    at_labels = [each if each.dim() == 2 else each[learned] for each in (student, teacher)]
    return kl_distance(at_labels[0], at_labels[1], temperature)


def split_by_length(batch: Batch, forward_cost: float, places: tuple[str, ...] = ()) -> list[Batch]:
    """Cut a micro-batch into parts of rows of like length, each padded to its own longest row.

    The parts hold the same rows as the batch; summed losses over them are the loss of the batch.
    On a CPU a part holds no more tokens than an efficient forward needs, so that memory for
    activations does not grow with the batch: MiniLM on up to 13 rows of 512 tokens at once took
    2.7 GiB, in parts of 2,200 tokens 1.9 GiB and no more time. An accelerator, where that was
    never measured, gets all rows of like length at once.

    Args:
        batch: Padded rows, to the right or to the left.
        forward_cost: What one more forward and backward costs, in tokens of padding.
        places: Columns that hold positions in their row.

    Returns:
        At least one part, the longest rows first.
    """
    most = MOST_COSTS * forward_cost if batch["attention_mask"].device.type == "cpu" else math.inf
    mask = batch["attention_mask"].cpu()  # an accelerator is waited for once, not for each part
    rows, seq = mask.shape
    lengths = mask.sum(dim=1)
    if rows == 1 or (int(lengths.min()) == seq and rows * seq <= most):
        return [batch]
    order = torch.argsort(lengths, descending=True, stable=True)
    cuts = cheapest_cuts(lengths[order].numpy(), forward_cost, most)
    if len(cuts) == 2:  # one part: nothing to gain
        return [batch]
    return [
        _part(batch, mask, order[start:stop], places)
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]


def forward_cost(model: Any, device: torch.device) -> float:
    """What one more forward and backward of a model costs, in tokens.

    An estimate from the size of the model, so that the same run is cut alike each time: cuts decide
    the rounding of sums. On a CPU a pass writes each gradient once more, as long as 60 tokens take
    for all the weights that a token meets, and its calls take as long as 1e8 of those weights
    (fitted to five models of 0.4 to 43 million on one and two cores). On an accelerator it is taken
    to be 10 ms of launches at 100 trillion operations a second, which was never run.

    Args:
        model: Has `num_parameters`.
        device: Where it runs.
    """
    body = max(model.num_parameters(exclude_embeddings=True), 1)
    if device.type != "cpu":
        return 1.7e11 / body
    # An output layer writes the gradient of its table whole, see `gradients_by_row`.
    has_head = getattr(model, "get_output_embeddings", lambda: model)() is not None
    written = model.num_parameters() if has_head else body
    return (60 * written + 1e8) / body


def cheapest_cuts(lengths: np.ndarray, forward_cost: float, most: float = math.inf) -> list[int]:
    """Where to cut rows, longest first, so that padding and forwards together cost least.

    A dynamic program over the number of rows placed so far: a part costs its rows times the length
    of its longest row, plus `forward_cost`.

    Args:
        lengths: Tokens of each row, falling.
        forward_cost: Cost of a part of its own, in tokens.
        most: Tokens that a part of several rows may hold, with padding.

    Returns:
        Row numbers at which the parts start, and the number of rows.

    Example:
        >>> cheapest_cuts(np.array([100, 90, 10, 10]), forward_cost=20)
        [0, 2, 4]
    """
    count = len(lengths)
    best = np.zeros(count + 1)  # cost of the rows from each row on
    following = np.zeros(count + 1, dtype=int)
    for start in range(count - 1, -1, -1):
        sizes = np.arange(1, count - start + 1)
        tokens = lengths[start] * sizes
        costs = tokens + forward_cost + best[start + 1 :]
        costs[1:][tokens[1:] > most] = math.inf
        size = int(costs.argmin())
        best[start], following[start] = costs[size], start + size + 1
    cuts = [0]
    while cuts[-1] < count:
        cuts.append(int(following[cuts[-1]]))
    return cuts


def _part(batch: Batch, mask: Tensor, rows: Tensor, places: tuple[str, ...]) -> Batch:
    mask = mask[rows]
    used = mask.any(dim=0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    part = {}
    for name, column in batch.items():
        column = column[rows]
        # Columns of tokens are whole numbers, as many as there are tokens; a list of class labels
        # that happens to be as long holds fractions.
        if column.shape == mask.shape and not column.is_floating_point():
            column = column[:, first:last]
        elif name in places:
            column = column - first
        part[name] = column
    return part
