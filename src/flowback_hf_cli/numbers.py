# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Which numbers an argument accepts: declared once, checked in Python and on the command line."""

import argparse
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args


def check_number(
    name: str,
    value: Any,
    kind: type,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
):
    """Raise ValueError unless a value is a number of a kind, `int` or (finite) `float`, within these bounds."""
    is_kind = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if (
        is_kind
        and -math.inf < value < math.inf  # NaN is refused, too
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    ):
        return
    bounds = {" of at least": at_least, " above": above, " at most": at_most, " below": below}
    expected = " and".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    raise ValueError(f"`{name}` must be a {'whole' if kind is int else 'finite'} number{expected}, but is {value!r}.")


@dataclass(frozen=True)
class Number:
    """
    The numbers that an argument accepts. It is the `type` of an argument of `argparse`.

    Args:
        kind (`type`): `int` for whole numbers, `float` for finite ones.
        at_least, above, at_most, below (`float`, *optional*): Bounds.

    Example:
        ```py
        >>> import argparse
        >>> from flowback_hf_cli.numbers import Number

        >>> parser = argparse.ArgumentParser()
        >>> action = parser.add_argument("--label_dropout", type=Number(float, at_least=0, at_most=1))
        >>> parser.parse_args(["--label_dropout", "0.1"]).label_dropout
        0.1
        ```
    """

    kind: type
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, name: str, value: Any):
        """Raise ValueError unless a value is accepted."""
        check_number(name, value, self.kind, self.at_least, self.above, self.at_most, self.below)

    def __call__(self, text: str) -> int | float:
        """Read a number of the command line."""
        try:
            value = self.kind(text)
        except ValueError:
            value = text
        try:
            self.check("value", value)
        except ValueError as error:
            # argparse puts the flag before it.
            raise argparse.ArgumentTypeError(str(error).removeprefix("`value` ").removesuffix(".")) from None
        return value


COUNT = Number(int, at_least=1)
SEED = Number(int, at_least=0, below=2**32)  # NumPy takes no others


def number_field(default: Any, number: Number) -> Any:
    """Make a field of a dataclass that holds a number or, if its default is a tuple, several."""
    return field(default=default, metadata={"number": number})


def number_of(arguments: type, name: str) -> Number | None:
    """Return what a field of a dataclass accepts; `None` if it is not made by [`number_field`]."""
    return next(each.metadata.get("number") for each in fields(arguments) if each.name == name)


def check_number_fields(arguments: Any):
    """Raise ValueError for the first field made by [`number_field`] that holds something else."""
    for each in fields(arguments):
        number, value = each.metadata.get("number"), getattr(arguments, each.name)
        may_be_none = NoneType in get_args(each.type)
        if number is None or (value is None and may_be_none):
            continue
        holds_several = isinstance(each.default, tuple) and isinstance(value, Iterable)
        for one in value if holds_several else [value]:
            number.check(each.name, one)
