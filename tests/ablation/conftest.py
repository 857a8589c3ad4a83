from ..training.conftest import images, teacher  # noqa: F401
