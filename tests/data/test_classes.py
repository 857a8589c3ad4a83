import pytest

from flowback_hf.conversion import labels_of_known_data
from flowback_hf.data import match_class_names


FLOW = {0: "cat, house cat", 1: "dog", 2: "crane, machine", 3: "crane"}


def test_classes_are_found_by_their_names_and_synonyms():
    assert match_class_names(["hound, dog", "house cat", "cow", "machine"], FLOW) == [1, 0, None, 2]
    assert match_class_names(["crane"], FLOW) == [3]  # the whole name of one class, a synonym of the other
    assert match_class_names(["crane"], {str(label): name for label, name in FLOW.items()}) == [3]
    assert match_class_names(["b,", "a,"], {0: "a,", 1: "b,"}) == [1, 0]  # nothing is no synonym


@pytest.mark.parametrize("in_order", [True, False])
def test_names_go_before_numbers(in_order):
    flow = {0: "crane, bird", 1: "crane", 2: "dog"}
    assert match_class_names(["crane", "crane, bird", "dog"], flow, in_order) == [1, 0, 2]


def test_numbers_decide_where_names_do_not():
    names = ["crane", "crane", "dog"]
    assert match_class_names(names, dict(enumerate(names))) == [0, 1, 2]
    # a classifier that knows one name only of each
    assert match_class_names(names, {0: "crane, bird", 1: "crane, machine", 2: "dog"}) == [0, 1, 2]
    assert match_class_names(names, {0: "crane, bird", 1: "crane", 2: "dog"}) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"'crane' cannot be told apart: .* classes \[0, 1\]"):
        match_class_names(names, dict(enumerate(names)), in_order=False)


def test_a_name_that_several_classes_have_is_refused():
    flow = {0: "crane", 1: "crane", 2: "dog"}
    assert match_class_names(["dog"], flow) == [2]
    with pytest.raises(
        ValueError, match=r"'crane' cannot be told apart: it may be any of the flow's classes \[0, 1\]"
    ):
        match_class_names(["dog", "crane"], flow)


def test_two_names_of_one_class_are_refused():
    with pytest.raises(ValueError, match=r"'cat' cannot be told apart: it may be any of the flow's classes \[0\]"):
        match_class_names(["cat", "house cat"], FLOW)


def test_the_names_of_imagenet_are_told_apart():
    names = labels_of_known_data(1000)
    shuffled = list(reversed(names.values()))
    assert match_class_names(shuffled, names) == list(range(999, -1, -1))
    assert match_class_names(["crane", "crane bird", "maillot"], names) == [517, 134, 638]
    twice = [name.removesuffix(", crane bird") for name in names.values()]  # as published classifiers have them
    assert match_class_names(twice, names) == list(range(1000))
