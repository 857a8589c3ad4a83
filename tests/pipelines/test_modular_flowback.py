"""Modular blocks; tests/test_hub.py loads them from repositories."""

import pytest
import torch
from diffusers import ModularPipeline

from flowback_hf import (
    FlowBackBlocks,
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    TarFlowReverseTransformer2DModel,
)
from flowback_hf.pipelines.modular_flowback import FlowBackBlock, FlowBackScoreBlock

from ..conftest import randomise_weights


ID2LABEL = {0: "cat, felis", 1: "dog"}


@pytest.fixture
def pipe(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(noise_std=0.1).float(), id2label=ID2LABEL, guidance_scale=1.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def latent_pipe(randomised_model, tiny_vae):
    return FlowBackPipeline(randomised_model(in_channels=4, noise_std=0.1).float(), tiny_vae, id2label=ID2LABEL)


def make_modular(pipeline, blocks=None) -> ModularPipeline:
    modular = (blocks or FlowBackBlocks()).init_pipeline()
    modular.update_components(**{name: part for name, part in pipeline.components.items() if part is not None})
    modular.update_components(**{name: pipeline.config[name] for name in ("id2label", "guidance_scale")})
    return modular


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_progress_bar_can_be_turned_off(pipe, capfd):
    modular = make_modular(pipe)
    modular(class_labels=["cat"], output="images")
    assert "3/3" in capfd.readouterr().err
    modular.set_progress_bar_config(disable=True)
    modular(class_labels=["cat"], output="images")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fixture", ["pipe", "latent_pipe"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"class_labels": ["felis", 4, -1], "num_images_per_prompt": 2},
        {"class_labels": torch.tensor([2]), "guidance_scale": 2.0, "guidance_rule": "product", "solver": "jacobi"},
        {"class_labels": 1, "latents": torch.randn(1, 4, 4, 4, generator=seeded(1)), "output_type": "latent"},
    ],
    ids=["no-class", "names", "guided", "given-noise"],
)
def test_blocks_give_the_images_of_the_pipeline_to_the_bit(request, fixture, arguments):
    pipeline = request.getfixturevalue(fixture)
    arguments = {"output_type": "pt", **arguments}
    if "latents" in arguments:
        arguments["latents"] = arguments["latents"][:, : pipeline.transformer.config.in_channels]
    expected = pipeline(generator=seeded(), **arguments).images
    images = make_modular(pipeline)(generator=seeded(), output="images", **arguments)
    assert torch.equal(images, expected) and images.std() > 0.01


@pytest.mark.parametrize("denoises", [True, False])
@pytest.mark.parametrize("fixture", ["pipe", "latent_pipe"])
def test_a_learned_inverse_gives_the_images_of_the_pipeline_to_the_bit(request, fixture, denoises):
    pipeline = request.getfixturevalue(fixture)
    reverse_transformer = TarFlowReverseTransformer2DModel.for_flow(
        pipeline.transformer, max_guidance_scale=3.0, denoises=denoises
    )
    randomise_weights(reverse_transformer, seed=1)
    pipeline.register_modules(reverse_transformer=reverse_transformer.eval())
    modular = make_modular(pipeline)
    seen = []
    arguments = {"class_labels": ["felis", 4], "guidance_scale": 2.0, "num_images_per_prompt": 2, "output_type": "pt"}
    for solver in ("learned", "auto"):
        images = modular(
            solver=solver,
            generator=seeded(),
            output="images",
            callback_on_step_end=lambda _, step, block, tensors: seen.append((step, block)),
            **arguments,
        )
        assert torch.equal(images, pipeline(solver=solver, generator=seeded(), **arguments).images)
        assert images.std() > 0.01
    assert seen == [(0, 0), (0, 3), (1, 2), (2, 1)]
    steps = modular.blocks.sub_blocks["generate"].get_execution_blocks(solver="learned").sub_blocks
    assert [type(step).__name__ for step in steps.values()][3] == "FlowBackReverseTransformerBlock"


def test_steps_can_be_left_out_and_run_on(pipe):
    blocks = FlowBackBlocks().sub_blocks["generate"]
    blocks.sub_blocks.pop("denoise")
    state = make_modular(pipe, blocks)(class_labels=[1, 2], generator=seeded(), output_type="pt")
    expected = pipe([1, 2], generator=seeded(), output_type="pt", denoise=False).images
    assert torch.equal(state.images, expected)
    assert state.latents.shape == state.sample.shape == (2, 3, 4, 4) and state.class_labels.tolist() == [1, 2]

    classifier = FlowBackClassificationPipeline.from_pipe(pipe)
    # The state holds images and their classes: score them.
    log_prob = make_modular(pipe)(state=state, generator=seeded(1), output="log_prob")
    assert torch.equal(log_prob, classifier.log_prob(expected, [1, 2], generator=seeded(1)))


def test_callbacks_see_every_block(pipe):
    seen = []

    def callback(pipeline, step, block, tensors):
        seen.append((step, block, tensors["latents"].shape))

    make_modular(pipe)(class_labels=[1], callback_on_step_end=callback)
    assert [(step, block) for step, block, _ in seen] == [(0, 3), (1, 2), (2, 1)]
    assert {shape for _, _, shape in seen} == {(1, 3, 4, 4)}


def test_images_are_scored_and_classified(latent_pipe):
    images = torch.rand(3, 3, 8, 8, generator=seeded())
    modular, classifier = make_modular(latent_pipe), FlowBackClassificationPipeline.from_pipe(latent_pipe)
    assert modular(images=images, output="classes") == classifier(images)
    options = {"method": "gradient", "top_k": 2, "generator": seeded(3)}
    assert modular(images=images, output="classes", **options) == classifier(
        images, **{**options, "generator": seeded(3)}
    )
    log_prob = modular(images=images, class_labels=["felis", -1, 3], num_noise_draws=2, output="log_prob")
    assert torch.equal(log_prob, classifier.log_prob(images, ["felis", -1, 3], num_noise_draws=2))


def test_an_unconditional_flow_is_scored_by_its_own_block(randomised_model):
    pipeline = FlowBackPipeline(randomised_model(num_classes=None).float())
    images = torch.rand(2, 3, 4, 4, generator=seeded())
    log_prob = make_modular(pipeline, FlowBackScoreBlock())(images=images, output="log_prob")
    assert torch.equal(log_prob, FlowBackClassificationPipeline.from_pipe(pipeline).log_prob(images))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": ["bird"]}, "`class_labels` must be known names or numbers, but 'bird' is not one"),
        ({"guidance_scale": -0.5}, "`guidance_scale` must be a finite number of at least 0.0"),
        ({"output_type": "gif"}, "`output_type` must be one of"),
        ({"solver": "learned"}, "`solver='learned'` needs a learned inverse, but .* no `reverse_transformer`. Train"),
    ],
)
def test_mistakes_raise_before_any_work(pipe, monkeypatch, arguments, message):
    monkeypatch.setattr(type(pipe.transformer), "forward", lambda *args, **kwargs: pytest.fail("the flow ran"))
    with pytest.raises(ValueError, match=message):
        make_modular(pipe)(**arguments)


def test_components_must_be_loaded_first():
    with pytest.raises(ValueError, match=r"no `transformer` yet. Call its `load_components\(\)` first"):
        FlowBackBlocks().init_pipeline()(class_labels=[1])


def test_every_block_describes_itself():
    def leaves(block):
        return [leaf for sub_block in block.sub_blocks.values() for leaf in leaves(sub_block)] or [block]

    blocks = leaves(FlowBackBlocks())
    assert len(blocks) == 9 and all(isinstance(block, FlowBackBlock) for block in blocks)
    assert all(block.description.endswith(".") for block in blocks)
    # an input that exact solvers would ignore
    assert "denoise" not in {param.name for block in blocks for param in block.inputs}
    text = FlowBackBlocks().init_pipeline().doc
    assert "TODO" not in text and "As in `FlowBackPipeline.invert_blocks`." in text
