"""Tests of the inverse's solvers: they agree, are as exact as they say, and cost what they should."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowback_hf import TarFlowTransformer2DModel
from flowback_hf.models import transformer_tarflow
from flowback_hf.models.transformer_tarflow import STEP_COSTS, TRIAL_SWEEPS, Guidance, SolverSettings, StepCosts


ARCHITECTURES = {
    "plain": {},
    "deep-shallow-rope-swiglu": {"position_embedding": "rope", "activation_fn": "swiglu", "num_layers": [2, 1, 1]},
}
GUIDANCE = {
    "unguided": {},
    "linear": {"guidance_scale": 2.5},
    "product-annealed-tempered": {
        "guidance_scale": 2.5,
        "guidance_rule": "product",
        "guidance_schedule": "linear",
        "guidance_temperature": 1.5,
    },
}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
each_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)


def noise(model, batch_size=3, seed=1, dtype=torch.float64):
    size = model.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, model.config.in_channels, size, size, generator=generator, dtype=dtype)


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def record_sweeps(model, monkeypatch):
    """Record a copy of the state after every sweep of any block, and the last settled tokens before and after it."""
    records = []
    sweep_window = transformer_tarflow.sweep_window

    def recorded(block, state, last, window_size, cached_positions, tolerance):
        settled = sweep_window(block, state, last, window_size, cached_positions, tolerance)
        caches = tuple(cache.clone() for cache in state.key_value_caches)
        records.append((state._replace(tokens=state.tokens.clone(), key_value_caches=caches), last, settled))
        return settled

    for block in model.blocks:
        monkeypatch.setattr(block, "sweep_window", recorded)
    return records


# One answer


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid_size=st.integers(1, 5),
    window_size=st.integers(1, 25),
    labels=st.lists(st.integers(-1, 4), min_size=1, max_size=4),
    architecture=st.sampled_from(list(ARCHITECTURES)),
    guidance=st.sampled_from(list(GUIDANCE)),
    seed=st.integers(0, 1000),
)
@example(5, 7, [0, 2], "deep-shallow-rope-swiglu", "unguided", 751)  # its overflow is final
@example(4, 3, [0, 0], "plain", "linear", 1)  # its last block starts from latents that have overflowed
def test_sweeps_without_tolerance_give_the_sequential_answer(
    randomised_model, grid_size, window_size, labels, architecture, guidance, seed
):
    model = randomised_model(seed, sample_size=2 * grid_size, **ARCHITECTURES[architecture])
    latents, class_labels = noise(model, len(labels), seed), torch.tensor(labels)
    options = {"inverse": True, "output_report": True, **GUIDANCE[guidance]}
    expected = model(latents, class_labels, solver="sequential", **options)
    window_size = min(window_size, grid_size**2)
    actual = model(latents, class_labels, solver="jacobi", tolerance=0, window_size=window_size, **options)
    scale = max(1.0, expected.sample.nan_to_num(0, 0, 0).abs().max().item())
    for got, exact in ((actual.sample, expected.sample), (actual.log_abs_det, expected.log_abs_det)):
        assert torch.equal(got.isfinite(), exact.isfinite())
        assert_close(got[exact.isfinite()], exact[exact.isfinite()], atol=1e-9 * scale)
    for sweeps in actual.report.sweeps.values():
        assert sweeps.max() <= grid_size**2 - 1
        if grid_size > 1:
            assert sweeps.min() >= -(-(grid_size**2 - 1) // window_size)


@each_guidance
@each_architecture
@pytest.mark.parametrize("window_size", [2, 7, 15, 16])
def test_after_k_sweeps_the_first_k_tokens_are_exact(
    randomised_model, monkeypatch, architecture, guidance, window_size
):
    model = randomised_model(sample_size=8, **architecture)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    for block in (1, 2):  # one of each order
        options = {"inverse": True, "blocks": [block], **guidance}
        exact = model.patchify(model(latents, class_labels, solver="sequential", **options).sample)
        exact = exact if block == 1 else exact.flip(1)
        with monkeypatch.context() as patch:
            records = record_sweeps(model, patch)
            model(latents, class_labels, solver="jacobi", tolerance=0, window_size=window_size, **options)
        for number, (state, last, settled) in enumerate(records, start=1):
            assert (settled >= last + 1).all() and (settled >= min(number, 15)).all()
            if len(state.tokens) < len(exact):  # samples have been swapped
                break
            for sample, position in enumerate(settled.tolist()):
                assert_close(state.tokens[sample, : position + 1], exact[sample, : position + 1], atol=1e-10)


@each_guidance
def test_cached_keys_and_values_are_those_of_the_converged_tokens(randomised_model, monkeypatch, guidance):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model, 1), torch.tensor([2])
    records = record_sweeps(model, monkeypatch)
    options = {"inverse": True, "blocks": [1], "solver": "jacobi", "tolerance": 0, **guidance}
    model(latents, class_labels, window_size=4, **options)
    by_windows = records[-1][0].key_value_caches
    records.clear()
    model(latents, class_labels, window_size=1, **options)
    one_by_one = records[-1][0].key_value_caches
    for actual, expected in zip(by_windows, one_by_one, strict=True):
        assert expected[..., :15, :].abs().amin(dim=(0, 1, 2, 3, 5)).min() > 0
        assert_close(actual[..., :15, :], expected[..., :15, :], atol=1e-11)


def plain_jacobi(block, latents, class_labels, num_sweeps):
    tokens = latents
    for _ in range(num_sweeps):
        log_scale, shift, _ = block.predict(tokens, class_labels, ())
        tokens = shift + torch.exp(log_scale) * latents
    return tokens


@each_guidance
@pytest.mark.parametrize("initial_guess", ["latents", "zeros"])
@pytest.mark.parametrize("window_size", [1, 3, 15])
def test_intermediate_overflow_is_contained(randomised_model, guidance, initial_guess, window_size):
    """The data are of ordinary size, but their latents are so large that the network overflows on them."""
    model = randomised_model(sample_size=8, num_blocks=1)
    (block,) = model.blocks
    block.proj_out.bias.data[: block.proj_out.out_features // 2] -= 400.0
    class_labels = torch.tensor([2, -1, 4, 0])
    latents = block(model.patchify(noise(model, 4)), class_labels).tokens
    latents[:, 0] = 0.1  # data and latents share the first token
    assert latents.abs().max() > 1e160
    assert not plain_jacobi(block, latents, class_labels, 3).isfinite().all()
    guidance = Guidance(**{name.removeprefix("guidance_"): value for name, value in guidance.items()})
    expected = block(latents, class_labels, inverse=True, guidance=guidance).tokens
    settings = SolverSettings(window_size, initial_guess, tolerance=0.0)
    actual = block(latents, class_labels, inverse=True, guidance=guidance, settings=settings).tokens
    assert expected.isfinite().all()
    assert_close(actual, expected, atol=1e-9 * expected.abs().max().item())


def test_true_overflow_marks_only_its_sample(randomised_model):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    latents[1, 0, 0, 0] = 1e308
    finite = []
    for solver in ({"solver": "sequential"}, {"solver": "jacobi", "tolerance": 0, "window_size": 5}):
        output = model(latents, class_labels, inverse=True, output_report=True, **solver)
        finite.append(output.sample.isfinite())
        assert finite[-1].flatten(1).all(dim=1).tolist() == [True, False, True]
        assert output.report.residual.isfinite().tolist() == [True, False, True]
    assert torch.equal(*finite)


def test_keys_whose_overflow_is_final_are_not_hidden(randomised_model):
    model = randomised_model(sample_size=8, num_blocks=1)
    model.blocks[0].layers[0].attn.to_qkv.weight.data[8:16] *= 1e308  # the keys'
    latents = noise(model)
    for solver in ({"solver": "sequential"}, {"solver": "jacobi", "window_size": 5}):
        assert not model(latents, inverse=True, **solver).sample.flatten(1).isfinite().all(dim=1).any()


# Tolerance


@pytest.fixture(scope="module")
def trained_model():
    """A float32 flow, trained for 150 steps on smooth images of three classes: its tokens depend on each other."""
    torch.manual_seed(0)
    model = TarFlowTransformer2DModel(
        sample_size=12, patch_size=2, in_channels=1, num_blocks=3, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, num_classes=3,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    grid = torch.linspace(-1, 1, 12)
    for _ in range(150):
        class_labels = torch.randint(3, (32,))
        waves = torch.sin((class_labels[:, None, None] + 1) * (grid[:, None] + grid + 2 * torch.rand(32, 1, 1)))
        images = waves.unsqueeze(1) + 0.2 * torch.randn(32, 1, 12, 12)
        loss = -model.log_prob(images, class_labels).mean() / 144
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6  # a Gaussian has 1.42
    return model.eval().requires_grad_(False)


@each_guidance
@pytest.mark.parametrize("tolerance", [None, 1e-4, 1e-2])
@pytest.mark.parametrize(
    "solver", [{"solver": "auto"}, *({"solver": "jacobi", "window_size": w} for w in (5, 16, 35))]
)
def test_trained_flow_is_sampled_to_the_tolerance(trained_model, solver, tolerance, guidance):
    latents, class_labels = noise(trained_model, 6, dtype=torch.float32), torch.tensor([0, 1, 2, -1, 0, 1])
    options = {"inverse": True, "output_report": True, **guidance}
    expected = trained_model(latents, class_labels, solver="sequential", **options)
    actual = trained_model(latents, class_labels, tolerance=tolerance, **solver, **options)
    bound = 1e-4 if tolerance is None else tolerance  # rounding in float32 is amplified by later blocks
    assert (actual.sample - expected.sample).abs().max() <= bound
    assert actual.report.residual.max() <= bound
    if solver["solver"] == "jacobi":
        assert actual.report.network_evaluations[1] < 35


def test_looser_tolerance_takes_fewer_sweeps_and_leaves_more(trained_model):
    latents = noise(trained_model, 4, dtype=torch.float32).double()
    model = copy.deepcopy(trained_model).double()
    expected = model(latents, inverse=True, solver="sequential").sample
    evaluations, distances = [], []
    for tolerance in (0, 1e-10, 1e-6, 1e-2):
        output = model(latents, inverse=True, solver="jacobi", tolerance=tolerance, window_size=12, output_report=True)
        evaluations.append(sum(output.report.network_evaluations.values()))
        distances.append((output.sample - expected).abs().max().item())
        assert distances[-1] <= max(tolerance, 1e-11)
    assert evaluations == sorted(evaluations, reverse=True) and evaluations[0] > evaluations[-1]
    assert distances[-1] > 100 * distances[0]


@pytest.mark.parametrize("dtype, default", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_default_tolerance_is_that_of_the_dtype(trained_model, dtype, default):
    model = copy.deepcopy(trained_model).to(dtype)
    latents = noise(model, 2, dtype=dtype)
    options = {"inverse": True, "solver": "jacobi", "window_size": 12}
    assert torch.equal(model(latents, **options).sample, model(latents, tolerance=default, **options).sample)
    assert not torch.equal(model(latents, **options).sample, model(latents, tolerance=100 * default, **options).sample)


# Cost


def test_finished_samples_cost_nothing(randomised_model, monkeypatch):
    model = randomised_model(sample_size=8, num_blocks=1)
    (block,) = model.blocks
    # The embedding of class 1 is so large that tokens no longer matter, and the output does not read it. Samples of
    # this class are settled at once.
    for weight in (block.proj_in.weight, block.proj_in.bias, block.pos_embed, block.class_embed):
        weight.data *= 0.03
    direction = torch.zeros(8, dtype=torch.float64)
    direction[0] = 1e4
    block.class_embed.data[1] = direction
    block.proj_out.weight.data[:, 0] = 0.0
    latents, class_labels = noise(model, 5), torch.tensor([2, 1, 1, 4, 1])
    records = record_sweeps(model, monkeypatch)
    options = {"inverse": True, "tolerance": 1e-3, "output_report": True}
    output = model(latents, class_labels, solver="jacobi", window_size=5, **options)
    sizes = [len(state.tokens) for state, _, _ in records]
    assert sizes[0] == 5 and sizes[-1] <= 2 and sizes == sorted(sizes, reverse=True)
    sweeps = output.report.sweeps[1]
    assert sum(sizes) == sweeps.sum() and len(sizes) == output.report.network_evaluations[1] == sweeps.max()
    assert sweeps[[1, 2, 4]].max() < sweeps[[0, 3]].min()
    assert_close(output.sample, model(latents, class_labels, inverse=True, solver="sequential").sample, atol=1e-3)


def test_large_windows_take_a_part_of_the_batch_at_a_time(randomised_model, monkeypatch):
    model = randomised_model(sample_size=32, num_blocks=1)  # 256 tokens
    latents, class_labels = noise(model, 5), torch.tensor([2, 1, -1, 4, 0])
    options = {"inverse": True, "guidance_scale": 2.0, "output_report": True}
    expected = model(latents, class_labels, solver="sequential", **options).sample
    records = record_sweeps(model, monkeypatch)
    for window_size, largest in ((200, 1), (100, 2), (40, 5)):
        records.clear()
        output = model(latents, class_labels, solver="jacobi", window_size=window_size, **options)
        assert_close(output.sample, expected, atol=1e-8)
        sizes = [len(state.tokens) for state, _, _ in records]
        assert max(sizes) == largest and sum(sizes) == output.report.sweeps[1].sum()


@each_guidance
def test_report_tells_what_was_done(randomised_model, guidance):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    options = {"inverse": True, "output_report": True, **guidance}
    report = model(latents, class_labels, solver="sequential", blocks=[1, 3], **options).report
    assert report.solvers == {1: "sequential", 3: "sequential"}
    assert {block: sweeps.tolist() for block, sweeps in report.sweeps.items()} == {1: [15] * 3, 3: [15] * 3}
    assert report.network_evaluations == {1: 15, 3: 15}
    assert report.residual.shape == (3,) and report.residual.max() < 1e-11

    output = model(latents, class_labels, solver="jacobi", tolerance=1e-1, window_size=8, **options)
    assert set(output.report.solvers.values()) == {"jacobi"}
    # The residual also shows a wrong answer. Without guidance, the forward pass gives the same residual.
    assert output.report.residual.max() > 1e-9
    if not guidance:
        again = (model(output.sample, class_labels).sample - latents).abs().amax(dim=(1, 2, 3))
        assert_close(output.report.residual, again, atol=1e-12)
    assert model(latents, class_labels, inverse=True).report is None
    assert len(model(latents, class_labels, inverse=True, output_report=True, return_dict=False)) == 3


# Choice


def test_auto_weighs_the_profile_against_the_costs(randomised_model, monkeypatch):
    model = randomised_model(sample_size=8)
    for block in model.blocks[:2]:
        block.proj_out.weight.data *= 1e-3  # few sweeps settle them
    latents, class_labels = noise(model, 2), torch.tensor([2, 4])
    monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(1e9, 1, 1e9)})  # rows cost nothing
    profile = model.profile_inverse(latents, class_labels, guidance_scale=2.0)
    assert profile == model.config.inverse_profile
    assert profile["num_tokens"] == 16 and profile["num_layers"] == [1, 1, 1] and profile["window_sizes"] == [4, 15]
    counted = [sweeps for by_window in profile["sweeps"] for sweeps in by_window if sweeps is not None]
    assert [None in sweeps for sweeps in profile["sweeps"]] == [False, False, True]
    assert all(1 < sweeps <= 0.75 * 15 for sweeps in counted)
    options = {"inverse": True, "output_report": True}
    expected = model(latents, class_labels, solver="sequential", **options)

    output = model(latents, class_labels, **options)
    evaluations = [output.report.network_evaluations[block] for block in (1, 2, 3)]
    for block, (evaluated, sweeps) in enumerate(zip(evaluations, profile["sweeps"]), start=1):
        assert output.report.solvers[block] == ("sequential" if set(sweeps) == {None} else "jacobi")
        assert evaluated <= 15
    assert_close(output.sample, expected.sample, atol=1e-9)

    monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(0, 1, 0)})  # only rows cost
    output = model(latents, class_labels, **options)
    assert set(output.report.solvers.values()) == {"sequential"}
    assert torch.equal(output.sample, expected.sample)


def test_auto_without_a_profile_stops_sweeping_if_sweeps_settle_too_few_tokens(randomised_model, monkeypatch):
    model = randomised_model(sample_size=12, num_blocks=2)  # 36 tokens
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(20, 1, 60)})
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    options = {"inverse": True, "output_report": True}
    expected = model(latents, class_labels, solver="sequential", **options).sample
    output = model(latents, class_labels, **options)
    assert_close(output.sample, expected, atol=1e-9)
    assert output.report.solvers == {1: "jacobi", 2: "jacobi"}
    for evaluations in output.report.network_evaluations.values():
        assert TRIAL_SWEEPS < evaluations <= 35
    swept = model(latents, class_labels, solver="jacobi", window_size=16, **options).report
    assert output.report.network_evaluations != swept.network_evaluations
    assert model.config.inverse_profile is None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_auto_sweeps_windows_of_the_given_size_where_sweeps_pay(randomised_model, monkeypatch):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    sizes, sweep_window = [], transformer_tarflow.sweep_window

    def recorded(block, state, last, window_size, *arguments):
        sizes.append(window_size)
        return sweep_window(block, state, last, window_size, *arguments)

    for block in model.blocks:
        monkeypatch.setattr(block, "sweep_window", recorded)

    def used(**options):
        sizes.clear()
        sample = model(latents, class_labels, inverse=True, **options).sample
        assert_close(sample, expected, atol=1e-9)
        return set(sizes)

    expected = model(latents, class_labels, inverse=True, solver="sequential").sample
    for profile in (None, model.profile_inverse(latents, class_labels)):
        model.register_to_config(inverse_profile=profile)
        monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(1e9, 1, 1e9)})  # rows cost nothing
        assert used(window_size=5) == {5} and 5 not in used()
        monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(0, 1, 0)})  # only rows cost
        assert used(window_size=5) == set()


def test_profile_counts_the_sweeps_that_the_report_counts(randomised_model, monkeypatch):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(1e9, 1e9, 1)})  # sweeps cost nothing
    profile = model.profile_inverse(latents, class_labels, guidance_scale=2.0)
    options = {"inverse": True, "solver": "jacobi", "guidance_scale": 2.0, "output_report": True}
    for index, window_size in enumerate(profile["window_sizes"]):
        report = model(latents, class_labels, window_size=window_size, **options).report
        for number, sweeps in report.sweeps.items():
            assert profile["sweeps"][number - 1][index] == pytest.approx(sweeps.float().mean().item())


def test_profile_gives_up_where_sweeps_cannot_win(randomised_model, monkeypatch):
    model = randomised_model(sample_size=8)
    latents, class_labels = noise(model), torch.tensor([2, -1, 4])
    records = record_sweeps(model, monkeypatch)
    numbers = {}
    for name, costs in {"always": StepCosts(1e9, 1e9, 1), "rarely": StepCosts(1, 1, 8)}.items():
        monkeypatch.setitem(STEP_COSTS, "cpu", {False: costs})
        records.clear()
        profile = model.profile_inverse(latents, class_labels)
        numbers[name] = len(records)
        assert [[sweeps is None for sweeps in by_window] for by_window in profile["sweeps"]] == (
            [[name == "rarely"] * 2] * 3
        )
    assert numbers["rarely"] <= 3 * 2 * (2 + 1) < numbers["always"]

    # Here they cannot win. A device of another type tries for itself, as without a profile.
    options = {"inverse": True, "output_report": True}
    assert set(model(latents, class_labels, **options).report.solvers.values()) == {"sequential"}
    monkeypatch.setitem(STEP_COSTS, "cpu", {False: StepCosts(20, 1, 20)})
    assert set(model(latents, class_labels, **options).report.solvers.values()) == {"sequential"}
    model.register_to_config(inverse_profile={**profile, "device_type": "cuda"})
    assert set(model(latents, class_labels, **options).report.solvers.values()) == {"jacobi"}
    # Asked to sweep, the flow sweeps.
    model.register_to_config(inverse_profile=profile)
    output = model(latents, class_labels, solver="jacobi", **options)
    assert set(output.report.solvers.values()) == {"jacobi"} and output.report.residual.max() < 1e-8


def test_profile_travels_with_the_model(randomised_model, tmp_path):
    model = randomised_model(sample_size=8)
    profile = model.profile_inverse(noise(model, 2))
    model.save_pretrained(tmp_path)
    assert TarFlowTransformer2DModel.from_pretrained(tmp_path).config.inverse_profile == profile


def test_profile_of_another_architecture_is_refused(randomised_model):
    profile = randomised_model(sample_size=8).profile_inverse(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`inverse_profile` must be of this architecture, 4 tokens .* of 16 tokens"):
        randomised_model(inverse_profile=profile)
    with pytest.raises(ValueError, match=r"\[2, 2, 2\] layers in the blocks, but is of 16 tokens and \[1, 1, 1\] lay"):
        randomised_model(sample_size=8, num_layers=2, inverse_profile=profile)


@pytest.mark.parametrize(
    "call, match",
    [
        ({"solver": "newton"}, r"`solver` must be one of \('auto', 'sequential', 'jacobi'\), but is 'newton'"),
        ({"tolerance": -1e-3}, "`tolerance` must be a finite number of at least 0.0, but is -0.001"),
        ({"tolerance": float("nan")}, "`tolerance` must be a finite number of at least 0.0, but is nan"),
        ({"window_size": 0}, "`window_size` must be a whole number of at least 1 and at most 4, but is 0"),
        ({"window_size": 5}, "`window_size` must be a whole number of at least 1 and at most 4, but is 5"),
        (
            {"window_size": 2, "solver": "sequential"},
            "`window_size` needs `solver='jacobi'` or `'auto'`, but `solver` is 'sequential' and `window_size` is 2",
        ),
        ({"tolerance": "1e-4"}, "`tolerance` must be a finite number of at least 0.0, but is '1e-4'"),
        ({"output_report": True, "inverse": False}, "`output_report` need `inverse=True`, but `inverse` is False"),
        ({"solver": "jacobi", "inverse": False}, "`solver`, .* need `inverse=True`, but `inverse` is False"),
    ],
)
def test_bad_call_is_refused(randomised_model, call, match):
    model = randomised_model()
    with pytest.raises(ValueError, match=match):
        model(noise(model), **{"inverse": True, **call})


# Threads and compilers


def test_two_threads_may_sweep_with_one_model(randomised_model):
    model = randomised_model(sample_size=8)
    arguments = [(noise(model, seed=seed), torch.tensor([seed, -1, 0])) for seed in (1, 2)]

    def sample(latents, class_labels):
        return model(latents, class_labels, inverse=True, solver="jacobi", window_size=5, guidance_scale=2.0).sample

    serial = [sample(*each) for each in arguments]
    with ThreadPoolExecutor(2) as executor:
        for _ in range(5):
            parallel = list(executor.map(lambda each: sample(*each), arguments))
            assert torch.equal(parallel[0], serial[0]) and torch.equal(parallel[1], serial[1])


@each_architecture
@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_steps_compile_whole_and_not_again_for_each_token(randomised_model, fresh_compiler, architecture, solver):
    model = randomised_model(sample_size=20, num_blocks=4, **{**architecture, "num_layers": 1})  # 100 tokens
    latents, class_labels = noise(model, 2), torch.tensor([2, 4])
    options = {"inverse": True, "solver": solver, "guidance_scale": 2.0}
    expected = model(latents, class_labels, **options).sample
    for block in model.blocks:
        block.compile_steps(backend="aot_eager", fullgraph=True)
    assert_close(model(latents, class_labels, **options).sample, expected, atol=1e-9)
    model(noise(model, 2, seed=3), class_labels, **options)
    # Graphs for the first part of the cache, for longer parts and for all of it. Samples that finish change the batch
    # size, which may add graphs.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (3 if solver == "sequential" else 6)


@each_architecture
def test_compiled_products_of_few_rows_are_sums(randomised_model, fresh_compiler, monkeypatch, architecture):
    monkeypatch.setattr(transformer_tarflow, "MKL_SUITS_CPU", False)
    model = randomised_model(num_blocks=2, **{**architecture, "num_layers": 1}).requires_grad_(False)
    options = {"inverse": True, "solver": "sequential", "guidance_scale": 2.0}
    expected = model(noise(model, 1), torch.tensor([2]), **options).sample
    products = []

    def count_products(graph, inputs):
        nodes = [node.target for node in graph.graph.nodes]
        products.append((nodes.count(torch.nn.functional.linear) + nodes.count(torch._C._nn.linear), len(nodes)))
        return graph

    for block in model.blocks:
        block.compile_steps(backend=count_products, fullgraph=True)
    assert_close(model(noise(model, 1), torch.tensor([2]), **options).sample, expected, atol=1e-9)
    assert products and all(number == 0 for number, _ in products)

    # The weights' dtype decides the precision of the sums, not that of the result.
    weight, bias = torch.randn(40, 30).bfloat16(), torch.randn(40).bfloat16()
    states = torch.randn(2, 1, 30).bfloat16()
    product = torch.compile(transformer_tarflow.linear, backend="eager")(states, weight, bias)
    assert product.dtype == torch.bfloat16
    exact = torch.nn.functional.linear(states.double(), weight.double(), bias.double())
    torch.testing.assert_close(product.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_inductor_inverts_batches_of_any_size(randomised_model, fresh_compiler, solver, tuned):
    # Tokens and windows are large enough to fill vector registers. Inductor does not vectorize smaller ones.
    model = randomised_model(sample_size=20, patch_size=4, num_blocks=1, num_layers=1).float().requires_grad_(False)
    options = {"inverse": True, "solver": solver, "window_size": 16 if solver == "jacobi" else None}
    latents, class_labels = noise(model, 5).float(), torch.tensor([2, 4, 0, -1, 1])
    expected = model(latents, class_labels, guidance_scale=2.0, **options).sample
    model.compile_repeated_blocks(fullgraph=True)
    with torch._inductor.config.patch(freezing=tuned, max_autotune=tuned):
        for part in (slice(0, 3), slice(0, 5), slice(0, 1)):
            sample = model(latents[part], class_labels[part], guidance_scale=2.0, **options).sample
            assert_close(sample, expected[part], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_the_token_step(randomised_model):
    block = randomised_model(sample_size=8).blocks[0].cuda()
    latents, class_labels = torch.randn(2, 16, 12, dtype=torch.float64).cuda(), torch.tensor([2, 4]).cuda()
    guidance = Guidance(scale=2.0)
    expected = block(latents, class_labels, inverse=True, guidance=guidance).tokens
    with torch.no_grad():
        state = transformer_tarflow.allocate_state(block, latents, class_labels, guidance, SolverSettings())
        position = torch.zeros(1, 1, dtype=torch.long, device="cuda")
        cached_positions = torch.arange(16, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up run
            transformer_tarflow.decode_token(block, state, position, cached_positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            transformer_tarflow.decode_token(block, state, position, cached_positions)
        position.zero_()
        for _ in range(15):
            graph.replay()
    assert_close(state.tokens, expected, atol=1e-10)


def test_copies_of_a_compiled_model_compute_with_their_own_weights(randomised_model, fresh_compiler):
    model = randomised_model()
    latents = noise(model)
    before = model(latents, inverse=True).sample
    model.compile_repeated_blocks(backend="eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(latents, inverse=True).sample, before)
        twin.blocks[0].proj_out.bias.data += 1.0
        assert not torch.equal(twin(latents, inverse=True).sample, before)
    assert_close(model(latents, inverse=True).sample, before, atol=1e-12)


def test_block_inverts_by_itself(randomised_model):
    model = randomised_model(sample_size=8)
    block, tokens = model.blocks[1], model.patchify(noise(model))
    settings = SolverSettings(window_size=4, tolerance=0.0, initial_guess="zeros")
    output = block(tokens, inverse=True, settings=settings)
    assert_close(output.tokens, output.shift + output.log_scale.exp() * tokens, atol=1e-12)
    assert_close(block(output.tokens).tokens, tokens, atol=1e-10)
    assert output.sweeps.shape == (3,) and output.hidden_states == {}
