import pytest
import torch


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("nearest_images")


def test_the_distance_to_the_nearest_image(script):
    train_images = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    images = torch.tensor([[0.0, 1.0], [3.0, 4.0], [3.0, 1.0]])
    assert script.distances_to_nearest(images, train_images).tolist() == [1, 0, 3]


def test_a_near_copy_among_many_is_found(script):
    """Differences of squares would lose this distance in float32."""
    train_images = torch.randn(100, 3072, generator=torch.Generator().manual_seed(0))
    distances = script.distances_to_nearest(train_images[3:4] + 1e-5, train_images)
    assert distances.item() == pytest.approx(1e-5 * 3072**0.5, rel=0.01)
