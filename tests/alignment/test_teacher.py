import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from flowback_hf import RepresentationTeacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = Dinov2Config(image_size=28, patch_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def test_features_are_the_encoders_patch_tokens_of_normalized_images(folder):
    teacher = RepresentationTeacher.from_pretrained(folder, grid_size=4)
    images = torch.rand(2, 3, 28, 28) * 2 - 1  # 4 patches of 7 pixels: no resizing
    pixel_values = ((images + 1) / 2 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder)(pixel_values).last_hidden_state[:, 1:]
    features = teacher(images)
    assert features.shape == (2, 16, 16) and teacher.feature_dim == 16
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid_size, image_size", [(4, 16), (2, 64), (6, 28)])
def test_the_grid_is_the_flows_whatever_the_image_size(folder, grid_size, image_size):
    teacher = RepresentationTeacher.from_pretrained(folder, grid_size=grid_size)
    assert teacher(torch.zeros(1, 3, image_size, image_size)).shape == (1, grid_size**2, 16)


def test_patch_k_of_the_features_sees_patch_k_of_the_image(folder):
    teacher = RepresentationTeacher.from_pretrained(folder, grid_size=4)
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = teacher(images)
    for patch in range(16):
        row, column = divmod(patch, 4)
        changed = images.clone()
        changed[..., 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] *= -1
        moved = (teacher(changed) - features).norm(dim=-1)[0]
        assert moved.argmax() == patch


def test_grey_images_are_repeated(folder):
    teacher = RepresentationTeacher.from_pretrained(folder, grid_size=4)
    grey = torch.rand(2, 1, 28, 28) * 2 - 1
    assert torch.equal(teacher(grey), teacher(grey.repeat(1, 3, 1, 1)))


def test_it_is_frozen(folder):
    teacher = RepresentationTeacher.from_pretrained(folder, grid_size=4, dtype=torch.bfloat16).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.zeros(1, 3, 28, 28, requires_grad=True)
    features = teacher(images)
    assert not features.requires_grad and features.dtype == torch.bfloat16


def test_another_architecture_is_refused(tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a DINOv2 encoder .* but has the model type 'vit'"):
        RepresentationTeacher.from_pretrained(tmp_path, grid_size=4)


def test_a_folder_without_a_model_says_what_it_looked_for(tmp_path):
    with pytest.raises((OSError, ValueError), match="config.json"):
        RepresentationTeacher.from_pretrained(tmp_path, grid_size=4)
