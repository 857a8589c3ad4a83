# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Which classes of a data set, or of a classifier, are which classes of a flow."""

from collections import Counter
from collections.abc import Mapping, Sequence


def match_class_names(names: Sequence[str], id2label: Mapping[int, str], in_order: bool = True) -> list[int | None]:
    """
    Find the class of a flow that has each name. Commas separate synonyms, on both sides.

    A class that is called the same to the letter goes before one that shares a synonym. Where several classes are
    called the same, as the two cranes of ImageNet, and there are as many names as classes, the number decides.

    Args:
        names (`Sequence[str]`): What the classes of the other side are called.
        id2label (`Mapping`): What the flow's classes are called.
        in_order (`bool`, defaults to `True`): Whether `names` stand in the order of their numbers.
    Returns:
        `list[int]`: for each name, the flow's class id; `None` if it has no class of that name.
    Raises:
        ValueError: if a name is that of several classes of the flow, or several names are those of one.

    Example:
        ```py
        >>> from flowback_hf.data import match_class_names

        >>> match_class_names(["dog", "house cat", "cow"], {0: "cat, house cat", 1: "dog"})
        [1, 0, None]
        ```
    """
    by_whole_name: dict[str, set[int]] = {}
    by_synonym: dict[str, set[int]] = {}
    for label, name in id2label.items():
        by_whole_name.setdefault(name, set()).add(int(label))
        for synonym in synonyms_of(name):
            by_synonym.setdefault(synonym, set()).add(int(label))
    alike = [set().union(*(by_synonym.get(synonym, ()) for synonym in synonyms_of(name))) for name in names]
    candidates = [by_whole_name.get(name) or alike[number] for number, name in enumerate(names)]

    is_numbered = in_order and len(names) == len(id2label)
    wanted = Counter(label for labels in candidates if len(labels) == 1 for label in labels)
    label_ids = []
    for number, (name, labels) in enumerate(zip(names, candidates)):
        is_clear = len(labels) < 2 and all(wanted[label] < 2 for label in labels)
        if is_clear:
            label_ids.append(next(iter(labels), None))
        elif is_numbered and number in alike[number] | labels:
            label_ids.append(number)
        else:
            raise ValueError(
                f"The class {name!r} cannot be told apart: it may be any of the flow's classes {sorted(labels)}, and"
                " other names may be, too. Rename classes of the data set, or of the flow (`id2label` in its"
                " model_index.json)."
            )
    return label_ids


def synonyms_of(name: str) -> set[str]:
    return {synonym for part in name.split(",") if (synonym := part.strip())}
