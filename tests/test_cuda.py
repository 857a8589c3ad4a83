"""What a CUDA device computes is what the CPU computes. `benchmarks/gpu.sh` runs these where there is one."""

import pytest
import torch

from flowback_hf import AlignedFlowObjective, FlowBackPipeline


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("strategy, order", [("none", None), ("forward", None), ("detach", None), ("reverse", 1)])
def test_cuda_computes_the_gradients_of_the_cpu(randomised_model, strategy, order):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    features = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64)
    gradients = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        objective = AlignedFlowObjective(
            randomised_model(sample_size=8), strategy, [(2, 1), (3, 1)], order, teacher_dim=5, projector_dim=6
        )
        objective.double().to(device)
        objective(sample.to(device), torch.tensor([2, -1], device=device), features.to(device)).loss.backward()
        gradients[device] = [parameter.grad.cpu() for parameter in objective.parameters()]
    for actual, expected in zip(gradients["cuda"], gradients["cpu"], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "auto"])
def test_a_seed_gives_the_same_sample_on_cuda(randomised_model, solver):
    samples = {}
    for device in ("cpu", "cuda"):
        pipe = FlowBackPipeline(randomised_model(sample_size=8)).to(device)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        options = {"guidance_scale": 2.0, "solver": solver, "tolerance": 1e-12, "output_type": "latent"}
        samples[device] = pipe(class_labels=[1, 4], generator=generator, **options).images.cpu()
    assert samples["cpu"].abs().max() > 0
    torch.testing.assert_close(samples["cuda"], samples["cpu"], rtol=0, atol=1e-8)
