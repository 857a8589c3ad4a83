import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from flowback_hf import RepresentationTeacher


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
FEED_FORWARD = {"intermediate_size": 32}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

# For each kind of folder: the model saved in it, its image processor, and the tokens before its patches.
KINDS = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES)), BitImageProcessorPil, 1),
    "dinov2 classifier": (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES)), BitImageProcessorPil, 1),
    "dinov2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        BitImageProcessorPil,
        4,
    ),
    "clip": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**SIZES, **FEED_FORWARD})),
        CLIPImageProcessorPil,
        1,
    ),
    "clip vision tower": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **FEED_FORWARD)),
        CLIPImageProcessorPil,
        1,
    ),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config={**SIZES, **FEED_FORWARD})),
        SiglipImageProcessorPil,
        0,
    ),
    "siglip vision tower": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **FEED_FORWARD)),
        SiglipImageProcessorPil,
        0,
    ),
    "mae": (lambda: ViTMAEModel(ViTMAEConfig(**SIZES, **FEED_FORWARD)), ViTImageProcessorPil, 1),
    "mae with decoder": (
        lambda: ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **FEED_FORWARD)),
        ViTImageProcessorPil,
        1,
    ),
    "convnext": (
        lambda: ConvNextV2Model(
            ConvNextV2Config(num_stages=1, hidden_sizes=[16], depths=[2], image_size=28, patch_size=7)
        ),
        ConvNextImageProcessorPil,
        0,
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that returns the folder with a tiny encoder of a kind and its image processor."""
    folders = {}

    def build(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("teacher")
            model, processor, _ = KINDS[kind]
            torch.manual_seed(0)
            model = model()
            # With the usual small initial weights attention is uniform: all patches would affect a patch alike.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data.normal_(std=0.5 * parameter[0].numel() ** -0.5)
            model.save_pretrained(folders[kind])
            processor(image_mean=MEAN, image_std=STD).save_pretrained(folders[kind])
        return folders[kind]

    return build


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@every_kind
def test_features_are_the_encoders_patch_tokens_of_normalized_images(folder, kind):
    teacher = RepresentationTeacher.from_pretrained(folder(kind), grid_size=4)
    images = random_images(2, 3, 28, 28)  # 4 patches of 7 pixels: no resizing
    pixel_values = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    vision_classes = {"dinov2 classifier": Dinov2Model, "clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    vision_classes |= {"mae with decoder": ViTMAEModel}
    encoder = vision_classes.get(kind, type(KINDS[kind][0]())).from_pretrained(folder(kind)).eval()
    arguments = {}
    if kind.startswith("mae"):
        encoder.config.mask_ratio = 0.0
        arguments["noise"] = torch.linspace(0, 1, 16).expand(2, -1)
    with torch.no_grad():
        expected = encoder(pixel_values, **arguments).last_hidden_state
    if kind == "convnext":
        expected = expected.permute(0, 2, 3, 1).reshape(2, 16, 16)
    num_prefix_tokens = KINDS[kind][2]
    assert expected.shape[1] == 16 + num_prefix_tokens
    features = teacher(images)
    assert features.shape == (2, 16, 16) and teacher.feature_dim == 16
    torch.testing.assert_close(features, expected[:, num_prefix_tokens:], rtol=0, atol=1e-5)


@every_kind
def test_patch_k_of_the_features_sees_patch_k_of_the_image(folder, kind):
    teacher = RepresentationTeacher.from_pretrained(folder(kind), grid_size=4)
    images = random_images(1, 3, 28, 28)
    features = teacher(images)
    for patch in range(16):
        row, column = divmod(patch, 4)
        changed = images.clone()
        changed[..., 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] *= -1
        moved = (teacher(changed) - features).norm(dim=-1)[0]
        assert moved.argmax() == patch


@every_kind
@pytest.mark.parametrize("grid_size", [2, 3, 8])
def test_another_grid_sees_the_same_place(folder, kind, grid_size):
    """Corners stay corners, whether the images or the features are resized."""
    teacher = RepresentationTeacher.from_pretrained(folder(kind), grid_size=grid_size)
    images, size = random_images(1, 3, 56, 56), 56 // grid_size
    features = teacher(images)
    assert features.shape == (1, grid_size**2, 16)
    for corner, token in enumerate([0, grid_size - 1, grid_size**2 - grid_size, grid_size**2 - 1]):
        rows, columns = (slice(-size, None) if bit else slice(size) for bit in divmod(corner, 2))
        changed = images.clone()
        changed[..., rows, columns] *= -1
        moved = (teacher(changed) - features).norm(dim=-1)[0]
        assert moved.argmax() == token


def test_dinov2_takes_the_flows_grid_and_the_others_are_resampled_bilinearly(folder):
    assert RepresentationTeacher.from_pretrained(folder("dinov2"), grid_size=6).image_size == 42
    own = RepresentationTeacher.from_pretrained(folder("clip"), grid_size=4)
    resampled = RepresentationTeacher.from_pretrained(folder("clip"), grid_size=6)
    assert own.image_size == resampled.image_size == 28
    images = random_images(2, 3, 24, 24)
    grid = own(images).transpose(1, 2).reshape(2, 16, 4, 4)
    expected = F.interpolate(grid, size=(6, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resampled(images), expected, rtol=0, atol=1e-6)


def test_mae_sees_every_patch_in_place_every_time(folder):
    teacher = RepresentationTeacher.from_pretrained(folder("mae"), grid_size=4)
    images = random_images(2, 3, 28, 28)
    assert torch.equal(teacher(images), teacher(images))


@every_kind
def test_it_is_frozen_and_in_its_own_dtype(folder, kind):
    teacher = RepresentationTeacher.from_pretrained(folder(kind), grid_size=4, dtype=torch.bfloat16).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    features = teacher(torch.zeros(1, 3, 28, 28))
    assert not features.requires_grad and features.dtype == torch.bfloat16


@every_kind
def test_gradients_flow_to_images_that_require_them(folder, kind):
    """What is trained by the features of its images needs them."""
    teacher = RepresentationTeacher.from_pretrained(folder(kind), grid_size=4)
    images = random_images(1, 3, 20, 20).requires_grad_()
    teacher(images)[0, 5].square().sum().backward()
    assert images.grad.abs().amax(dim=1).min() > 0 or kind == "convnext"  # whose patches see their neighbours only
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_convnexts_later_stages_halve_its_grid():
    config = ConvNextV2Config(num_stages=3, hidden_sizes=[8, 12, 20], depths=[1, 1, 1], image_size=64, patch_size=4)
    teacher = RepresentationTeacher(ConvNextV2Model(config), grid_size=4)
    assert teacher.feature_dim == 20 and teacher(random_images(2, 3, 64, 64)).shape == (2, 16, 20)
    assert RepresentationTeacher(ConvNextV2Model(config), grid_size=6)(random_images(2, 3, 64, 64)).shape[1] == 36


def test_grey_images_are_repeated(folder):
    teacher = RepresentationTeacher.from_pretrained(folder("dinov2"), grid_size=4)
    grey = random_images(2, 1, 28, 28)
    assert torch.equal(teacher(grey), teacher(grey.repeat(1, 3, 1, 1)))


def test_the_text_tower_is_not_reported(folder, library_log):
    RepresentationTeacher.from_pretrained(folder("clip"), grid_size=4)
    assert "text_model" not in library_log.text
    CLIPVisionModel.from_pretrained(folder("clip"))
    assert "text_model" in library_log.text  # by itself, transformers reports it


@pytest.mark.parametrize(
    "model",
    [
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)),
    ],
    ids=["pooled CNN", "text model"],
)
def test_a_model_without_patch_tokens_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    known = "DINOv2, DINOv2 with registers, CLIP, SigLIP, ViT-MAE, ConvNeXt V2"
    message = f"patch tokens lie on a grid, one of {known}, but its model type is '{model.config.model_type}'"
    with pytest.raises(ValueError, match=message):
        RepresentationTeacher.from_pretrained(tmp_path, grid_size=4)
    with pytest.raises(ValueError, match=message):
        RepresentationTeacher(model, grid_size=4)


def test_missing_weights_are_an_error_not_random_features(tmp_path):
    encoder = Dinov2Model(Dinov2Config(**SIZES))
    state_dict = {name: tensor for name, tensor in encoder.state_dict().items() if "layer.1." not in name}
    encoder.save_pretrained(tmp_path, state_dict=state_dict)
    BitImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold every weight of its encoder, but .* missing, such as 'encoder"):
        RepresentationTeacher.from_pretrained(tmp_path, grid_size=4)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_folder_says_what_it_lacks(tmp_path, missing):
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    message = f"must hold config.json, preprocessor_config.json, model.safetensors, but {missing} cannot be read"
    with pytest.raises(FileNotFoundError, match=message):
        RepresentationTeacher.from_pretrained(tmp_path, grid_size=4)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_named(folder, tmp_path, share):
    source = folder("dinov2")
    shutil.copytree(source, tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(ValueError, match=r"teacher' was not loaded: its weights are truncated or damaged \(.*Save or"):
        RepresentationTeacher.from_pretrained(tmp_path / "teacher", grid_size=4)


def test_a_hub_id_offline_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "'facebook/dinov2-nowhere' is not an existing folder, and config.json, preprocessor_config.json,"
    message += (
        f" model.safetensors were found neither on the Hub nor in its cache, {tmp_path}/models--facebook--dinov2"
    )
    with pytest.raises(FileNotFoundError, match=message):
        RepresentationTeacher.from_pretrained("facebook/dinov2-nowhere", grid_size=4, cache_dir=tmp_path)
