# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
#
# This file is uploaded beside a model's weights. The imports from this package are changed there into imports of the
# files that are uploaded with it.
"""
The steps of [`FlowBackPipeline`] and [`FlowBackClassificationPipeline`] as Modular blocks.

Each block calls one method of a pipeline. Its inputs are the method's arguments, with the same names and defaults,
except `denoise`.
"""

import inspect

import diffusers
import torch
from diffusers import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.models import AutoencoderKL
from diffusers.modular_pipelines import (
    ConditionalPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)

from flowback_hf.models.transformer_reverse import TarFlowReverseTransformer2DModel
from flowback_hf.models.transformer_tarflow import TarFlowTransformer2DModel
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline
from flowback_hf.pipelines.pipeline_flowback_classification import FlowBackClassificationPipeline


# A Modular repository names the class of a component, which diffusers then looks up in diffusers itself.
diffusers.TarFlowTransformer2DModel = TarFlowTransformer2DModel
diffusers.TarFlowReverseTransformer2DModel = TarFlowReverseTransformer2DModel

COMPONENT_CLASSES = {
    "transformer": TarFlowTransformer2DModel,
    "vae": AutoencoderKL,
    "reverse_transformer": TarFlowReverseTransformer2DModel,
}


class ProgressBarMixin:
    """Blocks of blocks, which hand the options of the progress bar on to those that have one."""

    def set_progress_bar_config(self, **kwargs):
        for block in self.sub_blocks.values():
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**kwargs)


class FlowBackBlock(ModularPipelineBlocks):
    """
    A block that calls one method of a pipeline.

    Subclasses set the pipeline's class, the method's name, and the names of what it returns.
    """

    model_name = "flowback"
    pipeline_class = FlowBackPipeline
    method_name: str
    output_names: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return inspect.getdoc(getattr(self.pipeline_class, self.method_name)).partition("\n\n")[0]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        names = ("transformer", *self.pipeline_class._optional_components)
        return [ComponentSpec(name, COMPONENT_CLASSES[name]) for name in names]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("id2label", None), ConfigSpec("guidance_scale", 1.0), ConfigSpec("guidance_rule", "linear")]

    @property
    def inputs(self) -> list[InputParam]:
        _, *parameters = inspect.signature(getattr(self.pipeline_class, self.method_name)).parameters.values()
        # Noise is kept by leaving out a block, not by an input.
        return [self._input_param(parameter) for parameter in parameters if parameter.name != "denoise"]

    def _input_param(self, parameter: inspect.Parameter) -> InputParam:
        required = parameter.default is parameter.empty
        return InputParam(
            parameter.name,
            type_hint=parameter.annotation,
            default=None if required else parameter.default,
            required=required,
            description=f"As in `{self.pipeline_class.__name__}.{self.method_name}`.",
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        description = f"As `{self.pipeline_class.__name__}.{self.method_name}` returns."
        return [OutputParam(name, description=description) for name in self.output_names]

    def set_progress_bar_config(self, **kwargs):
        """Keep the options of the progress bar, which the pipeline hands to its blocks."""
        self._progress_bar_config = kwargs

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        parts = {spec.name: getattr(components, spec.name) for spec in self.expected_components}
        if parts["transformer"] is None:
            raise ValueError("The pipeline has no `transformer` yet. Call its `load_components()` first.")
        configs = {spec.name: components.config[spec.name] for spec in self.expected_configs}
        pipeline = self.pipeline_class(**parts, **configs)
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        outputs = getattr(pipeline, self.method_name)(**self.get_block_state(state).as_dict())
        for name, output in zip(self.output_names, outputs if len(self.output_names) > 1 else [outputs]):
            state.set(name, output)
        return components, state


class FlowBackCheckInputsBlock(FlowBackBlock):
    method_name = "check_inputs"


class FlowBackEncodeLabelsBlock(FlowBackBlock):
    method_name = "encode_labels"
    output_names = ("class_labels", "num_images")


class FlowBackPrepareLatentsBlock(FlowBackBlock):
    method_name = "prepare_latents"
    output_names = ("latents",)


class FlowBackInvertBlock(FlowBackBlock):
    method_name = "invert_blocks"
    output_names = ("sample",)


class FlowBackReverseTransformerBlock(FlowBackBlock):
    method_name = "apply_reverse_transformer"
    output_names = ("sample",)


class FlowBackInvertBlocks(ProgressBarMixin, ConditionalPipelineBlocks):
    """Map noise to data: with the learned inverse if `solver` is `"learned"`, else block by block."""

    block_names = ["exact", "learned"]
    block_classes = [FlowBackInvertBlock, FlowBackReverseTransformerBlock]
    block_trigger_inputs = ["solver"]
    default_block_name = "exact"

    @property
    def description(self) -> str:
        return inspect.getdoc(FlowBackInvertBlocks)

    def select_block(self, solver: str | None = None) -> str:
        return "learned" if solver == "learned" else "exact"


class FlowBackDenoiseBlock(FlowBackBlock):
    method_name = "denoise"
    output_names = ("sample",)


class FlowBackDecodeBlock(FlowBackBlock):
    method_name = "decode"
    output_names = ("images",)


class FlowBackScoreBlock(FlowBackBlock):
    pipeline_class = FlowBackClassificationPipeline
    method_name = "log_prob"
    output_names = ("log_prob",)


class FlowBackClassifyBlock(FlowBackBlock):
    pipeline_class = FlowBackClassificationPipeline
    method_name = "__call__"
    output_names = ("classes",)


class FlowBackGenerateBlocks(ProgressBarMixin, SequentialPipelineBlocks):
    """Generate images. Without the block `"denoise"`, those of exact solvers keep the noise of training."""

    block_names = ["check_inputs", "encode_labels", "prepare_latents", "invert", "denoise", "decode"]
    block_classes = [
        FlowBackCheckInputsBlock,
        FlowBackEncodeLabelsBlock,
        FlowBackPrepareLatentsBlock,
        FlowBackInvertBlocks,
        FlowBackDenoiseBlock,
        FlowBackDecodeBlock,
    ]

    @property
    def description(self) -> str:
        return inspect.getdoc(FlowBackGenerateBlocks)


class FlowBackBlocks(ProgressBarMixin, ConditionalPipelineBlocks):
    """
    Generate, score or classify images, depending on what is given.

    - Without `images`, generate them. Output: `images`.
    - With `images`, classify them. Output: `classes`.
    - With `images` and `class_labels`, compute the likelihood of each image given its class. Output: `log_prob`.

    Example:
        ```py
        >>> from flowback_hf import FlowBackBlocks, TarFlowTransformer2DModel

        >>> transformer = TarFlowTransformer2DModel(
        ...     sample_size=8, patch_size=2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        ...     num_classes=3,
        ... )
        >>> pipe = FlowBackBlocks().init_pipeline()
        >>> pipe.update_components(transformer=transformer)
        >>> images = pipe(class_labels=[1, 2], output="images")
        >>> [len(classes) for classes in pipe(images=images, output="classes")]
        [3, 3]
        >>> pipe(images=images, class_labels=[1, 2], output="log_prob").shape
        torch.Size([2])
        ```
    """

    block_names = ["generate", "score", "classify"]
    block_classes = [FlowBackGenerateBlocks, FlowBackScoreBlock, FlowBackClassifyBlock]
    block_trigger_inputs = ["images", "class_labels"]
    default_block_name = "generate"

    @property
    def description(self) -> str:
        return inspect.getdoc(FlowBackBlocks).partition("\n\nExample:")[0]

    def select_block(self, images=None, class_labels=None) -> str:
        if images is None:
            return "generate"
        return "classify" if class_labels is None else "score"
