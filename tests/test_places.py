import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowback_hf.places import check_places, choose_places, parse_place, place_name


@given(st.tuples(st.integers(min_value=1), st.integers(min_value=1)))
def test_a_name_is_read_back(place):
    assert parse_place(place_name(place)) == place


@pytest.mark.parametrize(
    "name", ["block0_layer1", "block1_layer", "block1layer1", "block1_layer1.weight", "Block1_layer1"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"must be the name of a place, such as 'block7_layer6', but is '{name}'"):
        parse_place(name)


def test_default_places_are_the_papers():
    assert choose_places([8] * 8) == [(7, 6), (8, 6)]
    assert choose_places([8] * 8, [1, 2], 2) == [(1, 2), (2, 2)]
    assert choose_places([1]) == [(1, 1)]
    assert choose_places([2, 2, 18]) == [(2, 2), (3, 14)]


@pytest.mark.parametrize(
    "places, message",
    [
        ([], "must hold at least one"),
        (None, "must hold at least one"),
        ([(1, 1), (1, 1)], "each of them once"),
        ([(0, 1)], r"names flow block 0, but this flow's blocks are 1 \(image\) to 2 \(noise\)"),
        ([(3, 1)], "names flow block 3"),
        ([(2, 5)], "names layer 5 of flow block 2, but its layers are 1 to 4"),
        ([(1, 0)], "names layer 0 of flow block 1, but its layers are 1 to 3"),
    ],
)
def test_places_outside_the_flow_are_refused(places, message):
    with pytest.raises(ValueError, match=f"`places` .*{message}"):
        check_places(places, [3, 4])


def test_places_come_back_as_tuples():
    assert check_places([[1, 3], (2, 4)], [3, 4]) == [(1, 3), (2, 4)]
