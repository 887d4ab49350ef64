"""Answers that a model in training writes to held-out prompts, by the packed rows and the kernel that it is trained with."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from burnish.data.question import Question
from burnish.train.objective import packed_inputs


def greedy(
    model: nn.Module,
    questions: Sequence[Question],
    stop_ids: frozenset[int],
    most_tokens: int,
    capacity: int,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The most likely answer to each question, its stop token included.

    An answer has at most `most_tokens`, and no more than fit into a pack of this capacity behind its prompt; one at least.
    Each token is a forward pass over all open questions of a pack in one row, without a cache, so that nothing but the
    weights differs from training; rows grow by a token each. `beat` is called before each pass. A collective call: every
    worker runs the same passes, and world rank 0 chooses the tokens.
    """
    answers: list[list[int]] = []
    limits = [max(1, min(most_tokens, capacity - len(question.prompt))) for question in questions]
    first = 0
    while first < len(questions):
        last, taken = first, 0
        while last < len(questions) and (last == first or taken + len(questions[last].prompt) + limits[last] <= capacity):
            taken += len(questions[last].prompt) + limits[last]
            last += 1
        prompts = [question.prompt.tolist() for question in questions[first:last]]
        answers += _answers(model, prompts, limits[first:last], stop_ids, device, beat)
        first = last
    return answers


def _answers(
    model: nn.Module,
    rows: list[list[int]],
    limits: list[int],
    stop_ids: frozenset[int],
    device: torch.device,
    beat: Callable[[], None],
) -> list[list[int]]:
    """What follows each prompt, up to a stop token or its limit; the prompts grow by it."""
    answers: list[list[int]] = [[] for _ in rows]
    unfinished = list(range(len(rows)))
    while unfinished:
        beat()
        chosen = _next_tokens(model, [rows[number] for number in unfinished], device)
        for number, token in zip(unfinished, chosen, strict=True):
            rows[number].append(token)
            answers[number].append(token)
        unfinished = [
            number for number in unfinished if answers[number][-1] not in stop_ids and len(answers[number]) < limits[number]
        ]
    return answers


def _next_tokens(model: nn.Module, rows: list[list[int]], device: torch.device) -> list[int]:
    """The most likely token behind each row; the same on every worker."""
    lengths = np.array([len(row) for row in rows], np.int32)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([list(chain.from_iterable(rows))], device=device),
        "logits_to_keep": torch.from_numpy(np.cumsum(lengths) - 1).to(device),
        **packed_inputs(lengths, device),
    }
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    if len(logits) != len(rows):  # this model gives all of them whatever it is asked for
        logits = logits[inputs["logits_to_keep"]]
    tokens = logits.argmax(-1)
    if dist.is_initialized():
        dist.broadcast(tokens, 0)
    chosen: list[int] = tokens.tolist()
    return chosen
