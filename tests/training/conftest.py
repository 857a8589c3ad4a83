import pytest

from ..conftest import REPOSITORY, load_script


@pytest.fixture(scope="session")
def train_rra():
    return load_script(REPOSITORY / "training" / "train_rra.py")
