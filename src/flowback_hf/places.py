# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""
Places in a flow: a flow block and a transformer layer in it, both numbered from 1, block 1 next to the image.
"""

import itertools
import re
from collections.abc import Iterable, Sequence

from flowback_hf_cli.numbers import check_number


Place = tuple[int, int]


def place_name(place: Place) -> str:
    """
    The name of a place in files, logs and state dicts.

    Example:
        ```py
        >>> from flowback_hf.places import parse_place, place_name

        >>> place_name((7, 6))
        'block7_layer6'
        >>> parse_place("block7_layer6")
        (7, 6)
        ```
    """
    block, layer = place
    return f"block{block}_layer{layer}"


def parse_place(name: str) -> Place:
    """Read a place off its name. Raises ValueError for anything that [`place_name`] does not return."""
    match = re.fullmatch(r"block([1-9]\d*)_layer([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"`name` must be the name of a place, such as 'block7_layer6', but is {name!r}.")
    return int(match[1]), int(match[2])


def check_places(places: Iterable[Sequence[int]] | None, num_layers: Sequence[int]) -> list[Place]:
    """
    Check places to align.

    Args:
        places (iterable of `(block, layer)`): Numbered from 1.
        num_layers (`Sequence[int]`): Layers of each flow block, from the image side.
    Returns:
        `list[tuple[int, int]]`: the places.
    Raises:
        ValueError: if there are none, or if one is named twice or lies outside the flow.
    """
    places = [tuple(place) for place in places or []]
    for number in itertools.chain(*places):
        check_number("places", number, int)
    if not places or len(set(places)) != len(places):
        raise ValueError(f"`places` must hold at least one (block, layer), each of them once, but are {places}.")
    for block, layer in places:
        if not 1 <= block <= len(num_layers):
            raise ValueError(
                f"`places` names flow block {block}, but this flow's blocks are 1 (image) to {len(num_layers)}"
                " (noise)."
            )
        if not 1 <= layer <= num_layers[block - 1]:
            raise ValueError(
                f"`places` names layer {layer} of flow block {block}, but its layers are 1 to {num_layers[block - 1]}."
            )
    return places


def choose_places(
    num_layers: Sequence[int], blocks: Iterable[int] | None = None, layer: int | None = None
) -> list[Place]:
    """
    The places to align, by default those of *Flowing Backwards*: three quarters up the last two flow blocks.

    Args:
        num_layers (`Sequence[int]`): Layers of each flow block, from the image side.
        blocks (iterable of `int`, *optional*): Flow blocks, numbered from 1. Default: the last two.
        layer (`int`, *optional*): The layer in each. Default: `round(0.75 * layers of the block)`.
    Returns:
        `list[tuple[int, int]]`: one place a block, not checked against the flow: see [`check_places`].

    Example:
        ```py
        >>> from flowback_hf.places import choose_places

        >>> choose_places([8] * 8)
        [(7, 6), (8, 6)]
        >>> choose_places([2, 2, 18], blocks=[3])
        [(3, 14)]
        ```
    """
    num_blocks = len(num_layers)
    blocks = list(blocks or range(max(1, num_blocks - 1), num_blocks + 1))

    def default_layer(block: int) -> int:
        is_in_flow = 1 <= block <= num_blocks
        return max(1, round(0.75 * num_layers[block - 1])) if is_in_flow else 1

    return [(block, default_layer(block) if layer is None else layer) for block in blocks]
