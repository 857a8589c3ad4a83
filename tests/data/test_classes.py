import pytest

from flowback_hf.conversion import labels_of_known_data
from flowback_hf.data import match_class_names


FLOW = {0: "cat, house cat", 1: "dog", 2: "crane, machine", 3: "crane"}


def test_classes_are_found_by_their_names_and_synonyms():
    assert match_class_names(["dog", "house cat", "cow", "cat, house cat", "machine"], FLOW) == [1, 0, None, 0, 2]
    assert match_class_names(["crane"], FLOW) == [3]  # the whole name of one class, a synonym of the other
    assert match_class_names(["crane"], {str(label): name for label, name in FLOW.items()}) == [3]


def test_classes_in_the_same_order_are_matched_by_number():
    assert match_class_names(["cat", "hound, dog", "machine, crane", "crane"], FLOW) == [0, 1, 2, 3]
    names = ["crane", "crane", "dog"]
    assert match_class_names(names, dict(enumerate(names))) == [0, 1, 2]


def test_a_name_that_several_classes_have_is_refused():
    flow = {0: "crane", 1: "crane", 2: "dog"}
    assert match_class_names(["dog"], flow) == [2]
    with pytest.raises(ValueError, match=r"'crane' cannot be found .* its classes \[0, 1\] all have that name"):
        match_class_names(["dog", "crane"], flow)


def test_the_names_of_imagenet_are_told_apart():
    names = labels_of_known_data(1000)
    shuffled = list(reversed(names.values()))
    assert match_class_names(shuffled, names) == list(range(999, -1, -1))
    assert match_class_names(["crane", "crane bird", "maillot"], names) == [517, 134, 638]
