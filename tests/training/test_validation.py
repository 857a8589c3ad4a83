import pytest
import torch
from accelerate import Accelerator

from flowback_hf import FlowBackClassificationPipeline
from flowback_hf.data import ImageSource, RowGenerator, Splits, add_noise, make_generator
from flowback_hf.training.validation import validate

from ..conftest import image_rows


def test_validation_accuracy_is_the_classifiers_by_one_gradient(randomised_model):
    classifier = FlowBackClassificationPipeline(randomised_model(num_classes=5, noise_std=0.1))
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = classifier.transformer.config
    # what the likelihood sees, too
    noisy_images = add_noise(images, config, RowGenerator(make_generator(0, 0), 6))
    predictions = classifier.log_prob_and_class_gradient(noisy_images[None])[1].argmax(dim=1)
    assert len(predictions.unique()) > 1
    labels = predictions.clone()
    labels[:2] = (labels[:2] + 1) % 5
    labels[2] = -1  # unknown: not counted
    batch = {"images": images, "class_labels": labels}
    source = ImageSource(Splits(image_rows(2), image_rows(2), ["cat"]), config, label_ids=[0])
    validated = validate(Accelerator(cpu=True), classifier, [batch], source)
    assert validated["validation_accuracy"] == pytest.approx(0.6)
    batch["class_labels"] = torch.full((6,), -1)
    assert set(validate(Accelerator(cpu=True), classifier, [batch], source)) == {"validation_nll"}
