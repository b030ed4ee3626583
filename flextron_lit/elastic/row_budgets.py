"""A batch whose sequences have budgets of their own: one generation for each budget, put together in order (ours)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

PER_ROW = ("inputs", "input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
"""Arguments of `generate` with an entry for every sequence."""
OF_ALL = ("past_key_values", "streamer", "return_dict_in_generate", "custom_generate", "assistant_model")
"""Those that know the batch as a whole."""


def rows_of(budgets: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Every budget once, in the order in which they first stand, with the places that have it."""
    places: list[tuple[Any, list[int]]] = []
    for place, budget in enumerate(budgets):
        known = next((own for each, own in places if each == budget), None)
        if known is None:
            places.append((budget, [place]))
        else:
            known.append(place)
    return places


def by_rows(
    generate: Callable[..., Tensor], budgets: Sequence[Any], given: Mapping[str, Any], own: GenerationConfig
) -> Tensor:
    """Generate for sequences with budgets of their own.

    Args:
        generate: takes a batch, and one `budget` for it.
        budgets: one for every sequence.
        given: the arguments of Hugging Face's `generate`, by name.
        own: what the model's files say of generating.

    Raises:
        ValueError: if there are not as many sequences, or an argument knows the batch as a whole.
    """
    _refuse_of_all(budgets, given)
    groups = rows_of(budgets)
    made = [generate(**_part(given, rows), budget=budget) for budget, rows in groups]
    ends = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    pads = (given.get("pad_token_id"), own.pad_token_id, ends, 0)
    return together(made, [rows for _, rows in groups], next(pad for pad in pads if pad is not None))


def _refuse_of_all(budgets: Sequence[Any], given: Mapping[str, Any]) -> None:
    name = next((each for each in PER_ROW if isinstance(given.get(each), Tensor)), None)
    sequences = 0 if name is None else len(given[name])
    if sequences != len(budgets) or not sequences:
        raise ValueError(
            f"there are {len(budgets)} budgets and {sequences} sequences in the batch; give each sequence one budget"
        )
    for name in OF_ALL:
        if given.get(name):
            raise ValueError(
                f"{name} is of the whole batch, whose sequences have budgets of their own and run apart; leave it out"
            )


def _part(given: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments for some of the sequences."""
    cut = {name: given[name][list(rows)] for name in PER_ROW if isinstance(given.get(name), Tensor)}
    return {**given, **cut}


def together(made: Sequence[Tensor], places: Sequence[Sequence[int]], pad: int) -> Tensor:
    """What the generations of several budgets gave, as one batch in the order of its prompts.

    Args:
        made: a batch each, int64 [rows x returned, T]; they may be of different lengths.
        places: where the rows of each stand.
        pad: fills what is shorter, on the right.
    """
    longest = max(tokens.shape[1] for tokens in made)
    level = [F.pad(tokens, (0, longest - tokens.shape[1]), value=pad) for tokens in made]
    apart = torch.cat([tokens.unflatten(0, (len(own), -1)) for tokens, own in zip(level, places, strict=True)])
    order = torch.tensor([place for own in places for place in own], device=apart.device)
    return apart[order.argsort()].flatten(0, 1)
