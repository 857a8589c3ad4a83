"""Normalizing flows for the Hugging Face ecosystem: train, sample, score, classify and share them."""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from flowback_hf.alignment.objective import AlignedFlowObjective, AlignedFlowOutput
from flowback_hf.alignment.reverse_objective import ReverseFlowObjective, ReverseFlowOutput
from flowback_hf.alignment.teacher import RepresentationTeacher
from flowback_hf.models.transformer_reverse import TarFlowReverseOutput, TarFlowReverseTransformer2DModel
from flowback_hf.models.transformer_tarflow import TarFlowOutput, TarFlowTransformer2DModel
from flowback_hf.pipelines.modular_flowback import FlowBackBlocks
from flowback_hf.pipelines.pipeline_flowback import FlowBackPipeline
from flowback_hf.pipelines.pipeline_flowback_classification import FlowBackClassificationPipeline


__version__ = "0.1.0"

__all__ = [
    "AlignedFlowObjective",
    "AlignedFlowOutput",
    "FlowBackBlocks",
    "FlowBackClassificationPipeline",
    "FlowBackPipeline",
    "RepresentationTeacher",
    "ReverseFlowObjective",
    "ReverseFlowOutput",
    "TarFlowReverseOutput",
    "TarFlowReverseTransformer2DModel",
    "TarFlowOutput",
    "TarFlowTransformer2DModel",
]

# A saved pipeline then names its flow's library "flowback_hf", not the module that happens to hold it, and diffusers
# imports this package to load it, also by Hub id.
LOADABLE_CLASSES.setdefault(
    "flowback_hf",
    {
        model_class.__name__: ["save_pretrained", "from_pretrained"]
        for model_class in (TarFlowTransformer2DModel, TarFlowReverseTransformer2DModel)
    },
)
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["flowback_hf"])
# `DiffusionPipeline.from_pretrained` looks up the pipeline class that a `model_index.json` names in diffusers itself.
for pipeline_class in (FlowBackPipeline, FlowBackClassificationPipeline):
    setattr(diffusers, pipeline_class.__name__, pipeline_class)
