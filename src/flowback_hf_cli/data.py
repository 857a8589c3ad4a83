# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""Flags that several commands share: where the data are."""

import argparse

from flowback_hf_cli.numbers import COUNT, Number


def add_source_arguments(group: argparse._ArgumentGroup, folder_option: str = "--train_data_dir"):
    """Add the flags that name a data set and its columns."""
    group.add_argument(
        "--dataset_name",
        help="A data set to load: its id on the Hub, a folder that `datasets` loads, or a parquet file.",
    )
    group.add_argument("--dataset_config_name", help="The configuration of the data set, if it has several.")
    group.add_argument(
        folder_option,
        help="A folder of images to load, with one folder for each class, either directly in it or in train/ and"
        " validation/.",
    )
    group.add_argument("--image_column", default="image", help="The column of images. Default: %(default)s.")
    group.add_argument("--label_column", default="label", help="The column of class labels. Default: %(default)s.")


def add_data_arguments(group: argparse._ArgumentGroup):
    """Add the flags that name the training data and decide what is held out."""
    add_source_arguments(group)
    group.add_argument("--unconditional", action="store_true", help="Ignore the labels, for a flow without classes.")
    group.add_argument(
        "--cache_dir", help="The folder where data sets and models of the Hub are kept. Default: the libraries' own."
    )
    group.add_argument(
        "--max_train_samples", type=COUNT, help="Train on at most this many images, drawn at random. Default: all."
    )
    group.add_argument(
        "--max_validation_samples",
        type=COUNT,
        default=1024,
        help="Validate with at most this many images. Default: %(default)s.",
    )
    group.add_argument(
        "--train_val_split",
        type=Number(float, above=0, below=1),
        default=0.05,
        help="The share of the training images to hold out if the data set has no validation split. Default:"
        " %(default)s.",
    )


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End with an error unless the training data are named once."""
    check_one_source(parser, args, "dataset_name", "train_data_dir", "latents")


def check_one_source(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str):
    """End with an error unless exactly one of these flags is given; those that the command lacks are left out."""
    names = [name for name in names if hasattr(args, name)]
    if sum(getattr(args, name) is not None for name in names) != 1:
        *others, last = (f"--{name}" for name in names)
        parser.error(f"give one of {', '.join(others)} and {last}.")
