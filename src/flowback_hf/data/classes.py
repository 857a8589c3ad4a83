# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Which classes of a data set, or of a classifier, are which classes of a flow."""

from collections.abc import Mapping, Sequence

from flowback_hf.pipelines.pipeline_flowback import classes_by_name


def match_class_names(names: Sequence[str], id2label: Mapping[int, str]) -> list[int | None]:
    """
    Find the class of a flow that has each name. Commas separate synonyms, on both sides.

    If there are as many names as classes, and each name shares a synonym with the class of its number, they are
    matched by number: two classes may then have the same name, as the two cranes of ImageNet.

    Args:
        names (`Sequence[str]`): What the classes of the other side are called.
        id2label (`Mapping`): What the flow's classes are called.
    Returns:
        `list[int]`: for each name, the flow's class id; `None` if it has no class of that name.
    Raises:
        ValueError: if a name is that of several classes of the flow.

    Example:
        ```py
        >>> from flowback_hf.data import match_class_names

        >>> match_class_names(["dog", "house cat", "cow"], {0: "cat, house cat", 1: "dog"})
        [1, 0, None]
        ```
    """
    id2label = {int(label): name for label, name in id2label.items()}
    own = [id2label.get(label) for label in range(len(id2label))]
    if len(names) == len(own) and all(is_same_class(name, other) for name, other in zip(names, own)):
        return list(range(len(names)))
    classes = classes_by_name(id2label)
    shared = {name: classes[name] for name in names if len(classes.get(name, [])) > 1}
    if shared:
        name, label_ids = next(iter(shared.items()))
        raise ValueError(
            f"The class {name!r} cannot be found in this flow, because its classes {label_ids} all have that name:"
            " rename them in `id2label`, in the model's model_index.json."
        )
    return [classes[name][0] if name in classes else None for name in names]


def is_same_class(name: str, other: str | None) -> bool:
    return other is not None and not synonyms_of(name).isdisjoint(synonyms_of(other))


def synonyms_of(name: str) -> set[str]:
    return {synonym.strip() for synonym in name.split(",")}
