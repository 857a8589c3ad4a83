"""Training the learned inverse of a flow, as its users do."""

import dataclasses
import functools
import json
import shutil
import signal
from types import SimpleNamespace

import datasets
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel
from flowback_hf.alignment import reverse_objective
from flowback_hf.data import HoldOut, load_splits
from flowback_hf.hub import write_repository
from flowback_hf.models.transformer_reverse import HEADS_FILE
from flowback_hf.training import TrainingArguments, check_run_folder, reverse, validation
from flowback_hf_cli import reverse_training, training

from ..conftest import REPOSITORY, command_line, load_script, randomise_weights
from ..drills.runs import start, start_group, wait_until
from .test_sharding import FSDP, set_environment
from .test_train_rra import names, read_metrics


SCRIPT = REPOSITORY / "training" / "train_reverse.py"


@pytest.fixture(scope="module")
def train_reverse():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    """A pipeline of a flow with random weights, of the classes of the fixture `images`."""
    folder = tmp_path_factory.mktemp("flow") / "flow"
    flow = TarFlowTransformer2DModel(
        8, 4, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_classes=2, noise_std=0.1
    )
    randomise_weights(flow, seed=0)
    for block in flow.blocks:
        block.proj_out.weight.data.mul_(0.2)
    FlowBackPipeline(flow, id2label={0: "dog", 1: "cat"}, guidance_scale=1.5).save_pretrained(folder)
    return folder


@pytest.fixture
def line(images, flow_folder, tmp_path):
    """The command line of a tiny run, without --output_dir, as a function of what differs."""

    def build(**options):
        tiny = {
            "model": flow_folder,
            "train_data_dir": images,
            "cache_dir": tmp_path / "cache",
            "train_batch_size": 4,
            "max_train_steps": 4,
            "lr_warmup_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "validation_steps": 4,
            "checkpointing_steps": 2,
        }
        return command_line(**(tiny | options))

    return build


def test_a_stream_gives_the_statistics_and_the_steps(train_reverse, line, images, tmp_path):
    for split, rows in datasets.load_dataset("imagefolder", data_dir=str(images)).items():
        rows.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    output_dir = tmp_path / "run"
    options = {"train_data_dir": None, "dataset_name": tmp_path / "parquet", "streaming": True, "max_train_steps": 2}
    train_reverse.main(train_reverse.parse_args(line(output_dir=output_dir, **options)))
    assert (output_dir / "checkpoint-2" / "stream-00000.json").exists()
    assert FlowBackPipeline.from_pretrained(output_dir)(class_labels=["cat"], solver="learned").images


def state_of(folder):
    """All weights of a run's last checkpoint and of its learned inverse, with its heads."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = {f"objective.{name}": tensor for name, tensor in load_file(last / "model.safetensors").items()}
    for name in ("diffusion_pytorch_model.safetensors", HEADS_FILE):
        state |= load_file(folder / "reverse_transformer" / name)
    return state


def test_a_run_leaves_a_pipeline_with_both_networks(train_reverse, line, flow_folder, tmp_path):
    output_dir = tmp_path / "run"
    train_reverse.main(train_reverse.parse_args(line(output_dir=output_dir)))
    assert names(output_dir) == [
        "checkpoint-2",
        "checkpoint-4",
        "loss_curve.png",
        "metrics.jsonl",
        "model_index.json",
        "reverse_transformer",
        "samples",
        "training_args.json",
        "transformer",
    ]
    assert names(output_dir / "reverse_transformer") == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        HEADS_FILE,
    ]
    # two classes: four images of the exact sampler and four learned ones
    assert PIL.Image.open(output_dir / "samples" / "step-0000004.png").size == (8 * 64, 2 * 64)
    metrics = read_metrics(output_dir)
    assert [record["step"] for record in metrics] == [0, 1, 2, 3, 4, 4]
    assert {"loss", "reconstruction", "hidden", "gradient_norm"} <= set(metrics[1])
    assert metrics[1]["loss"] == pytest.approx(metrics[1]["reconstruction"] + metrics[1]["hidden"], abs=1e-5)
    assert metrics[-1]["validation_reconstruction"] != metrics[0]["validation_reconstruction"]

    # What is published says what it is, and has the heads, which were not loaded.
    write_repository(FlowBackPipeline.from_pretrained(output_dir), tmp_path / "repository", "flow", output_dir)
    assert HEADS_FILE in names(tmp_path / "repository" / "reverse_transformer")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "samples with a learned inverse, in one evaluation" in card
    assert "It takes a `guidance_scale` from 1 to 3." in card
    assert "| trained | the learned inverse of a flow that was given; supervision heads |" in card
    assert "| learned inverse, stages | 3 of 1 layers |" in card and "restored from their latents |" in card
    assert "nll" not in card

    # The flow is as it was, and its weights are in no checkpoint.
    pipeline, flow_pipeline = (
        FlowBackPipeline.from_pretrained(output_dir),
        FlowBackPipeline.from_pretrained(flow_folder),
    )
    for name, tensor in flow_pipeline.transformer.state_dict().items():
        assert torch.equal(pipeline.transformer.state_dict()[name], tensor)
    checkpoint = load_file(output_dir / "checkpoint-4" / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"reverse_transformer"}
    assert pipeline.labels == {"dog": 0, "cat": 1} and pipeline.config.guidance_scale == 1.5
    assert pipeline.reverse_transformer.config.max_guidance_scale == 3.0
    # The averaged weights are saved, the statistics beside the heads.
    last = checkpoint["reverse_transformer.stages.0.proj_in.weight"]
    assert 0 < (last - pipeline.reverse_transformer.stages[0].proj_in.weight).abs().max() < 0.1
    assert (load_file(output_dir / "reverse_transformer" / HEADS_FILE)["std"] - 1).abs().min() > 1e-3
    image = pipeline(class_labels=["cat"], solver="learned", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (8, 8)


def test_images_that_the_flow_has_not_seen_stay_unseen(train_reverse, line, images, flow_folder, tmp_path):
    flow = tmp_path / "flow"
    shutil.copytree(flow_folder, flow)
    data = {"train_data_dir": images / "train", "cache_dir": tmp_path / "cache"}
    of_the_flow = command_line(**data, train_val_split=0.4, seed=7, output_dir=flow)
    record = load_splits(training.parse_args(of_the_flow)).hold_out
    held_out = {}
    for name, num_images in {"of the flow": record.num_images, "other data": record.num_images + 1}.items():
        dataclasses.replace(record, num_images=num_images).write(flow)
        options = data | {"model": flow, "max_train_steps": 1, "output_dir": tmp_path / name}
        train_reverse.main(train_reverse.parse_args(line(**options)))
        held_out[name] = HoldOut.read(tmp_path / name, str(images / "train"))
    assert held_out["of the flow"] == record and record.checksum is not None
    assert (held_out["other data"].share, held_out["other data"].seed) == (0.05, 0)


def test_it_learns_to_undo_the_flow(train_reverse, line, tmp_path):
    options = {"max_train_steps": 100, "validation_steps": 100, "checkpointing_steps": 100, "logging_steps": 100}
    options |= {"num_attention_heads": 4, "attention_head_dim": 8, "max_guidance_scale": 1.0, "ema_decay": 0.9}
    train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", **options)))
    metrics = read_metrics(tmp_path / "run")
    # the images are uniform noise, whose second moment is 1/3
    assert metrics[0]["validation_reconstruction"] == pytest.approx(1 / 3, abs=0.02)
    assert metrics[-2]["reconstruction"] < 0.07 and metrics[-1]["validation_reconstruction"] < 0.27


# A compiler without a cache takes half a minute.
@pytest.mark.drill
def test_a_compiled_run_learns_what_a_plain_one_does_and_goes_on(train_reverse, line, tmp_path, fresh_compiler):
    def run(name, **options):
        options |= {"output_dir": tmp_path / name, "checkpointing_steps": 3, "max_guidance_scale": 1.0}
        train_reverse.main(train_reverse.parse_args(line(**options)))
        return [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]

    plain = run("plain")
    assert not torch._dynamo.utils.counters["frames"]
    compiled = run("compiled", torch_compile=True)
    assert len(plain) == 4 and compiled == pytest.approx(plain, abs=1e-4) and plain[3] != plain[0]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    expected = state_of(tmp_path / "compiled")
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    assert run("compiled", torch_compile=True, resume_from_checkpoint="latest") == compiled
    for name, tensor in state_of(tmp_path / "compiled").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_killed_run_goes_on_exactly(line, tmp_path):
    """With pairs of the sampler, which are drawn once."""
    options = {"max_train_steps": 12, "gradient_accumulation_steps": 2, "random_flip": True, "validation_steps": 3}
    options |= {"pairs": "both", "num_sampled_pairs": 6, "sampled_guidance_scale": 1.5}
    options |= {"checkpointing_steps": 5}  # checkpoint-5 is in the middle of an epoch
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(tmp_path / "log-whole", line(output_dir=whole, **options), script=SCRIPT)
    process = start(tmp_path / "log-killed", line(output_dir=killed, **options), script=SCRIPT)
    wait_until(lambda: (killed / "checkpoint-5").exists(), process)
    process.kill()
    assert not (killed / "model_index.json").exists(), "the run ended before it was killed"
    (pairs,) = (killed / reverse.PAIRS_FOLDER).iterdir()
    written = pairs.stat().st_mtime_ns

    resuming = line(output_dir=killed, resume_from_checkpoint="latest", **options)
    process = start(tmp_path / "log-resumed", resuming, script=SCRIPT)
    assert process.wait() == 0, process.log
    assert reference.wait() == 0, reference.log
    expected, actual = state_of(whole), state_of(killed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert pairs.stat().st_mtime_ns == written
    assert names(whole) == names(killed)


@pytest.mark.parametrize(
    "options, logged, config",
    [
        ({"supervision": "final"}, {"reconstruction"}, {}),
        ({"supervision": "data_space"}, {"hidden"}, {"through_data_space": True}),
        ({"no_denoising": True, "no_normalization": True}, {"hidden"}, {"denoises": False}),
        ({"hidden_weight": 0.3}, {"hidden"}, {}),
        ({"adaptive_power": 1.0, "adaptive_offset": 1000.0, "hidden_weight": 0.3}, {"hidden"}, {}),
        ({"max_guidance_scale": 1.0}, {"hidden"}, {"max_guidance_scale": 1.0}),
        ({"patch_size": 2, "num_layers": 2, "attention_head_dim": 8}, {"hidden"}, {"patch_size": 2, "num_layers": 2}),
        (
            {"pairs": "sampler", "num_sampled_pairs": 3, "sampled_guidance_scale": 2.0},
            {"hidden"},
            {"min_guidance_scale": 2.0, "max_guidance_scale": 2.0},
        ),
        (
            {"pairs": "sampler", "num_sampled_pairs": 3},  # at the pipeline's own scale
            {"hidden"},
            {"min_guidance_scale": 1.5, "max_guidance_scale": 1.5},
        ),
        ({"pairs": "both", "num_sampled_pairs": 3}, {"hidden"}, {"max_guidance_scale": 3.0}),
        ({"gradient_checkpointing": True, "mixed_precision": "bf16"}, {"hidden"}, {}),
    ],
    ids=str,
)
def test_options(train_reverse, line, tmp_path, options, logged, config):
    options = options | {"max_train_steps": 1}
    train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", **options)))
    record = read_metrics(tmp_path / "run")[1]
    assert logged <= set(record)
    assert ("hidden" in record) == (options.get("supervision") != "final")
    # next to so large an offset, all samples have the same adaptive weight
    total = record["reconstruction"] + options.get("hidden_weight", 1.0) * record.get("hidden", 0.0)
    rel = 1e-2 if "adaptive_offset" in options else 1e-5
    assert record["loss"] * options.get("adaptive_offset", 1.0) == pytest.approx(total, rel=rel)
    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "run")
    for name, value in config.items():
        assert pipeline.reverse_transformer.config[name] == value
    assert (tmp_path / "run" / "reverse_transformer" / HEADS_FILE).exists() == ("hidden" in logged)
    assert (tmp_path / "run" / reverse.PAIRS_FOLDER).exists() == ("pairs" in options)
    # At the pipeline's own guidance scale, which is now one that the learned inverse takes.
    assert len(pipeline(class_labels=[0], solver="learned").images) == 1


def test_a_teacher_compares_features(train_reverse, line, teacher, tmp_path):
    options = {"teacher_model_name_or_path": teacher, "perceptual_weight": 0.5, "max_train_steps": 1}
    train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", **options)))
    record = read_metrics(tmp_path / "run")[1]
    total = record["reconstruction"] + record["hidden"] + 0.5 * record["perceptual"]
    assert record["loss"] == pytest.approx(total, abs=1e-5) and record["perceptual"] > 0


# Latent flows


@pytest.fixture
def latent_line(line, images, tiny_vae, tmp_path):
    """As `line`, on latents of the training images: 4x4 with 4 channels. There is no validation split."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    script = load_script(REPOSITORY / "training" / "precompute_latents.py")
    source = {"train_data_dir": images / "train", "vae_model_name_or_path": tmp_path / "vae", "resolution": 8}
    script.main(script.parse_args(command_line(**source, output_dir=tmp_path / "latents")))
    config = {"num_blocks": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "num_classes": 2}
    flow = TarFlowTransformer2DModel(4, 2, in_channels=4, noise_std=0.1, **config)
    randomise_weights(flow, seed=0)
    FlowBackPipeline(flow, tiny_vae, id2label={0: "dog", 1: "cat"}).save_pretrained(tmp_path / "latent_flow")
    return lambda **options: line(
        **{"model": tmp_path / "latent_flow", "train_data_dir": None, "latents": tmp_path / "latents", **options}
    )


def test_a_latent_flow_from_latents_to_samples(train_reverse, latent_line, teacher, tiny_vae, tmp_path):
    output_dir = tmp_path / "run"
    options = {"output_dir": output_dir, "teacher_model_name_or_path": teacher, "perceptual_weight": 0.5}
    options |= {"pairs": "both", "num_sampled_pairs": 6}
    train_reverse.main(train_reverse.parse_args(latent_line(**options)))
    metrics = read_metrics(output_dir)
    total = metrics[1]["reconstruction"] + metrics[1]["hidden"] + 0.5 * metrics[1]["perceptual"]
    assert metrics[1]["loss"] == pytest.approx(total, abs=1e-5) and metrics[1]["perceptual"] > 0
    assert metrics[-1]["validation_reconstruction"] != metrics[0]["validation_reconstruction"]
    # decoded images of 8x8 pixels
    assert PIL.Image.open(output_dir / "samples" / "step-0000004.png").size == (8 * 64, 2 * 64)
    checkpoint = load_file(output_dir / "checkpoint-4" / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"reverse_transformer"}

    pipeline = FlowBackPipeline.from_pretrained(output_dir)
    for name, tensor in tiny_vae.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], tensor)
    options = {"class_labels": ["cat", "dog"], "generator": torch.Generator().manual_seed(0), "solver": "learned"}
    latents = pipeline(**options, output_type="latent").images
    assert latents.shape == (2, 4, 4, 4) and latents.std() > 0.01
    assert pipeline(**options).images[0].size == (8, 8)


def test_latents_that_the_flow_has_not_seen_stay_unseen(train_reverse, latent_line, tmp_path):
    options = {"output_dir": tmp_path / "run", "train_batch_size": 20, "train_val_split": 0.1}
    flow_arguments = {"latents": str(tmp_path / "latents"), "train_val_split": 0.4, "seed": 7}
    for written, num_left in ((None, 18), (flow_arguments, 12)):
        (tmp_path / "latent_flow" / "training_args.json").write_text(json.dumps(written or {}))
        with pytest.raises(ValueError, match=f"needs 20 images a step, but the training split has {num_left}"):
            train_reverse.main(train_reverse.parse_args(latent_line(**options)))


def test_latents_and_flows_that_do_not_fit(train_reverse, latent_line, flow_folder, images, tiny_vae, tmp_path):
    tiny_vae.decoder.conv_out.bias.data.add_(1.0)
    shutil.copytree(tmp_path / "latent_flow", tmp_path / "other")
    tiny_vae.save_pretrained(tmp_path / "other" / "vae")
    for options, message in (
        ({"model": flow_folder}, "A latent flow needs `--latents`, .* but this flow has no VAE"),
        ({"latents": None, "train_data_dir": images}, "A latent flow needs `--latents`, .*--latents are not given"),
        ({"model": tmp_path / "other"}, "were made with another VAE .* would be decoded wrongly"),
    ):
        with pytest.raises(ValueError, match=message):
            train_reverse.main(train_reverse.parse_args(latent_line(output_dir=tmp_path / "run", **options)))
        assert not (tmp_path / "run").exists()


# Pairs


def read_pairs(folder):
    return reverse.Pairs(*torch.utils.data.default_collate(list(reverse.read_pairs(folder))))


def test_pairs_are_what_the_exact_sampler_draws(flow_folder, tmp_path):
    pipeline = FlowBackPipeline.from_pretrained(flow_folder)
    guidance = reverse.Guidance(2.0)
    arguments = {"num_pairs": 7, "guidance": guidance, "batch_size": 3, "dropout": 0.5, "seed": 3}
    reverse.draw_pairs(pipeline, tmp_path / "pairs", **arguments)
    pairs = read_pairs(tmp_path / "pairs")
    assert pairs.class_labels.shape == (7,)
    assert {-1} < set(pairs.class_labels.tolist()) <= {-1, 0, 1}
    latents = reverse_objective.trajectory_of(pipeline.transformer, pairs.noisy_sample, pairs.class_labels, guidance)[
        -1
    ]
    call = {"latents": latents, "class_labels": pairs.class_labels, "guidance_scale": 2.0, "output_type": "latent"}
    for denoise, expected in ((False, pairs.noisy_sample), (True, pairs.clean_sample)):
        actual = pipeline(denoise=denoise, **call).images
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    assert (pairs.clean_sample - pairs.noisy_sample).abs().max() > 1e-3


def test_pairs_are_drawn_by_all_processes_and_once(flow_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reverse, "PAIRS_PER_FILE", 3)
    pipeline = FlowBackPipeline.from_pretrained(flow_folder)
    arguments = {"num_pairs": 8, "guidance": reverse.Guidance(2.0), "batch_size": 2, "dropout": 0.5, "seed": 3}
    reverse.draw_pairs(pipeline, tmp_path / "one", **arguments)
    expected = read_pairs(tmp_path / "one")
    assert len(set(expected.noisy_sample[:, 0, 0, 0].tolist())) == 8 == len(expected.class_labels)
    for process_index in (1, 0):
        reverse.draw_pairs(pipeline, tmp_path / "two", **arguments, process_index=process_index, num_processes=2)
    for one, two in zip(expected, read_pairs(tmp_path / "two")):
        assert torch.equal(one, two)

    # An interrupted drawing goes on where it was, with the same flow and guidance only.
    files = sorted((tmp_path / "one").iterdir())
    files[1].unlink()
    written = files[0].stat().st_mtime_ns
    reverse.draw_pairs(pipeline, tmp_path / "one", **arguments)
    assert files[0].stat().st_mtime_ns == written
    assert torch.equal(read_pairs(tmp_path / "one").noisy_sample, expected.noisy_sample)
    with pytest.raises(ValueError, match="were drawn with another flow or other guidance: .* in a new folder"):
        reverse.draw_pairs(pipeline, tmp_path / "one", **arguments | {"guidance": reverse.Guidance(1.5)})
    pipeline.transformer.blocks[0].proj_out.bias.data.add_(1.0)
    with pytest.raises(ValueError, match="were drawn with another flow or other guidance: .* in a new folder"):
        reverse.draw_pairs(pipeline, tmp_path / "one", **arguments)


def test_a_signal_ends_a_run_that_draws_pairs(train_reverse, line, tmp_path, monkeypatch):
    """After the file it is at, which a resumed run keeps."""
    drawn, draw = [], reverse.draw_pairs_of_labels

    def draw_and_signal(*arguments):
        drawn.append(draw(*arguments))
        if len(drawn) == 2:
            signal.raise_signal(signal.SIGTERM)
        return drawn[-1]

    monkeypatch.setattr(reverse, "PAIRS_PER_FILE", 3)
    monkeypatch.setattr(reverse, "draw_pairs_of_labels", draw_and_signal)
    options = {"output_dir": tmp_path / "run", "pairs": "sampler", "num_sampled_pairs": 10, "max_train_steps": 1}
    options |= {"resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit) as error:
        train_reverse.main(train_reverse.parse_args(line(**options)))
    files = ["00000000.safetensors", "00000003.safetensors"]
    assert error.value.code == 128 + signal.SIGTERM and names(tmp_path / "run" / "sampled_pairs") == files
    train_reverse.main(train_reverse.parse_args(line(**options)))
    assert len(drawn) == len(names(tmp_path / "run" / "sampled_pairs")) == 4


def test_processes_look_for_signals_equally_often(flow_folder, tmp_path, monkeypatch):
    """They do it together: a process without a file in the last round would let the others wait."""
    monkeypatch.setattr(reverse, "PAIRS_PER_FILE", 3)
    pipeline, counts = FlowBackPipeline.from_pretrained(flow_folder), [0, 0]

    def count(process_index):
        counts[process_index] += 1

    for process_index in (0, 1):
        arguments = (7, reverse.Guidance(2.0), 3, 0.0, 0, process_index, 2)
        reverse.draw_pairs(pipeline, tmp_path / "pairs", *arguments, functools.partial(count, process_index))
    assert counts == [2, 2] and len(names(tmp_path / "pairs")) == 3


def test_pairs_that_overflow_are_refused(flow_folder, tmp_path):
    pipeline = FlowBackPipeline.from_pretrained(flow_folder)
    pipeline.transformer.blocks[0].proj_out.bias.data.fill_(200.0)
    with pytest.raises(ValueError, match="must draw finite images, but 4 of 4 overflowed"):
        reverse.draw_pairs(pipeline, tmp_path / "pairs", 4, reverse.Guidance(1.5), 2, 0.0, 0)
    assert not list((tmp_path / "pairs").iterdir())


def test_a_run_of_the_samplers_pairs_is_validated_with_their_guidance(train_reverse, line, flow_folder, tmp_path):
    """An untrained learned inverse returns zeros; a perfect one of guided pairs, what the guided flow was given."""
    options = {"pairs": "sampler", "num_sampled_pairs": 3, "sampled_guidance_scale": 2.0, "max_train_steps": 1}
    train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", **options)))
    pipeline, seen = FlowBackPipeline.from_pretrained(tmp_path / "run"), []
    assert pipeline.config.guidance_scale == 2.0

    def perfect(latents, class_labels, scale):
        seen.append(scale)
        noisy_sample = pipeline.invert_blocks(latents, class_labels, scale, pipeline.config.guidance_rule)
        return SimpleNamespace(sample=noisy_sample)

    perfect.config = SimpleNamespace(min_guidance_scale=2.0, denoises=False)
    both = SimpleNamespace(transformer=pipeline.transformer, reverse_transformer=perfect, config=pipeline.config)
    batch = {"class_labels": torch.tensor([0, 1]), "image": torch.rand(2, 3, 8, 8) * 2 - 1}
    source = SimpleNamespace(mirror=lambda batch, rows: batch, clean_sample=lambda batch, generator: batch["image"])
    metrics = validation.validate_learned_inverse(Accelerator(), both, [batch], source)
    assert metrics["validation_reconstruction"] < 1e-6 and seen == [2.0]


# Bad input: one sentence before anything is written


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_guidance_scale": 4.0}, "`validation_guidance_scale` must be between 1.0 and 3.0, for which"),
        (
            {"pairs": "sampler", "validation_guidance_scale": 1.0},
            "`validation_guidance_scale` must be 1.5, for which this learned inverse was trained, but is 1.0",
        ),
        (
            {"pairs": "sampler", "max_guidance_scale": 3.0},
            "Pairs of the sampler teach one guidance scale, .*: leave out `--max_guidance_scale`, which is 3.0, or",
        ),
        (
            {"pairs": "both", "sampled_guidance_scale": 4.0, "max_guidance_scale": 2.0},
            "`--sampled_guidance_scale` must be at most `--max_guidance_scale`, 2.0, but is 4.0",
        ),
        ({"teacher_model_name_or_path": "./nowhere"}, "cannot be loaded.* To train without a teacher, leave it out"),
        ({"train_batch_size": 21}, "`--train_batch_size` 21 on 1 process with .* needs 21 images a step"),
        ({"patch_size": 3}, "`sample_size` must be divisible by `patch_size`"),
        (
            {"latents": "nowhere", "train_data_dir": None},
            "`--latents` must be a folder of training/precompute_latents",
        ),
        ({"unconditional": True}, "The pretrained flow has `num_classes` 2, but the data set has no labels"),
        ({"model": "nowhere"}, "`--model` must be a folder that holds a saved pipeline, or its id on the Hub"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_written(train_reverse, line, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", **options)))
    assert not (tmp_path / "run").exists()


def test_a_guidance_of_the_sampler_without_its_pairs_is_refused(train_reverse, line, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_reverse.parse_args(line(output_dir=tmp_path / "run", sampled_guidance_scale=2.0))
    assert "--sampled_guidance_scale is for --pairs sampler and both" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_flow_in_the_same_folder(train_reverse, line, flow_folder, tmp_path):
    model = shutil.copytree(flow_folder, tmp_path / "flow")
    options = {"model": model, "output_dir": tmp_path / "run", "max_train_steps": 1, "checkpointing_steps": 1}
    train_reverse.main(train_reverse.parse_args(line(**options)))
    flow = TarFlowTransformer2DModel.from_pretrained(model, subfolder="transformer")
    flow.blocks[0].proj_out.bias.data.add_(1.0)
    flow.save_pretrained(model / "transformer")
    options |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="holds a different run; it differs in the flow's weights \\("):
        train_reverse.main(train_reverse.parse_args(line(**options)))


def test_a_run_that_does_not_say_which_weights_its_flow_had_goes_on(tmp_path):
    settings = {"train_batch_size": 2, "num_processes": 1, "gradient_accumulation_steps": 1, "total_batch_size": 2}
    settings |= {"sharding": None, "seed": 0}
    (tmp_path / "training_args.json").write_text(json.dumps(settings))
    now = settings | {"flow_hash": "0" * 64}
    assert check_run_folder(tmp_path, now, "latest") == settings | {"flow_hash": "0" * 64}
    with pytest.raises(ValueError, match="it differs in --seed"):
        check_run_folder(tmp_path, now | {"seed": 1}, "latest")


def test_classes_that_the_flow_does_not_know(train_reverse, line, images, tmp_path):
    flow = TarFlowTransformer2DModel(8, 4, num_blocks=2, num_layers=1, num_attention_heads=2, num_classes=1)
    FlowBackPipeline(flow, id2label={0: "cat"}).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match=r"must know the classes of the data, but does not know \['dog'\]"):
        train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", model=tmp_path / "flow")))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_guidance_scale": 2.0}, "`--max_guidance_scale` and .* must be 1.0 for a flow without classes, but are"),
        (
            {"pairs": "sampler", "sampled_guidance_scale": 2.0},
            "`--sampled_guidance_scale` must be 1.0 for a flow without classes, but",
        ),
        ({"validation_guidance_scale": 2.0}, "`validation_guidance_scale` must be 1.0 for a learned inverse without"),
        ({"unconditional": None}, "The pretrained flow has `num_classes` None, but the data set has labels"),
    ],
)
def test_guidance_and_labels_of_an_unconditional_flow(train_reverse, line, tmp_path, options, message):
    flow = TarFlowTransformer2DModel(8, 4, num_blocks=2, num_layers=1, num_attention_heads=2, num_classes=None)
    FlowBackPipeline(flow).save_pretrained(tmp_path / "flow")
    options = {"model": tmp_path / "flow", "output_dir": tmp_path / "run", "unconditional": True} | options
    with pytest.raises(ValueError, match=message):
        train_reverse.main(train_reverse.parse_args(line(**options)))
    assert not (tmp_path / "run").exists()


def test_a_flow_that_is_not_finite_on_the_data(train_reverse, line, flow_folder, tmp_path):
    pipeline = FlowBackPipeline.from_pretrained(flow_folder)
    pipeline.transformer.blocks[0].proj_out.bias.data.fill_(-200.0)
    pipeline.save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="The flow must be finite on the training data, but"):
        train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", model=tmp_path / "flow")))
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder(train_reverse, line, tmp_path):
    train_reverse.main(train_reverse.parse_args(line(output_dir=tmp_path / "run", max_train_steps=1)))
    arguments = line(output_dir=tmp_path / "run", supervision="final", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"--supervision \('heads' then, 'final' now\)"):
        train_reverse.main(train_reverse.parse_args(arguments))
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["supervision"] == "heads"


# Flags


def test_flags_are_those_of_the_package():
    assert reverse_training.SUPERVISIONS == reverse_objective.SUPERVISIONS
    assert reverse_training.PAIRS == tuple(reverse.SAMPLED_SHARE)
    args = reverse_training.parse_args(["--model", "flow", "--output_dir", "run", "--train_data_dir", "images"])
    # Its default depends on the pairs.
    assert args.validation_guidance_scale is None
    assert reverse.choose_validation_guidance_scale(args) == 1.0
    assert TrainingArguments.from_args(args) == TrainingArguments("run")
    shared = vars(training.parse_args(["--output_dir", "run", "--train_data_dir", "images"]))
    # What both have means the same in both; sizes are the flow's by default.
    different = [name for name, value in vars(args).items() if name in shared and shared[name] != value]
    assert different == []


def test_a_run_is_the_same_on_two_processes(line, tmp_path):
    """Noise, dropped labels and guidance scales belong to the images of a step, whoever computes them."""
    options = {"validation_steps": 100, "adam_epsilon": 1e-3}
    for name, num_processes in (("one", 1), ("two", 2)):
        own = {"output_dir": tmp_path / name, "train_batch_size": 4 // num_processes}
        processes = start_group(tmp_path, [line(**options, **own)] * num_processes, script=SCRIPT)
        for process in processes:
            assert process.wait(120) == 0, process.log
    weights, expected = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_sharding_is_refused(line, tmp_path):
    prepare = functools.partial(set_environment, FSDP)
    processes = start_group(tmp_path, [line(output_dir=tmp_path / "run")] * 2, prepare, SCRIPT)
    assert [process.wait() for process in processes] == [2, 2]
    assert "A learned inverse is trained without FSDP, but the accelerate config asks for it" in processes[0].sentence
    assert "error: " not in processes[1].log and not (tmp_path / "run").exists()
