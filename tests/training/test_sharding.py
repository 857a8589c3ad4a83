"""Sharded runs (FSDP2) on two processes of a CPU: their gradients, and the same training as without sharding."""

import functools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from flowback_hf import FlowBackPipeline
from flowback_hf.files import read_metrics_log
from flowback_hf.training import list_checkpoints, load_averaged_parameters
from flowback_hf.training.checkpoints import check_files, read_progress
from flowback_hf.training.sharding import Sharding, ShardingAccelerator, check_accelerator, read_sharding

from ..conftest import REPOSITORY
from ..drills.runs import Process, send_at_line, start_group
from ..drills.test_planted_pickles import plant


GRADIENTS = Path(__file__).with_name("sharded_gradients.py")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def set_environment(variables: dict[str, str], _: int):
    os.environ |= variables


def end(processes: list[Process], code: int = 0):
    for process in processes:
        assert process.wait(120) == code, process.log


def losses_of(folder: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics_log(folder) if "loss" in record}


def pipeline_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_run(folder: Path, expected: Path):
    """The same averaged weights and the same figures, but for float32's rounding."""
    weights, expected_weights = pipeline_of(folder), pipeline_of(expected)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert losses_of(folder).keys() == losses_of(expected).keys()
    for step, record in losses_of(expected).items():
        for name in ("loss", "nll", "alignment", "gradient_norm", "learning_rate"):
            assert losses_of(folder)[step][name] == pytest.approx(record[name], rel=1e-4)


@pytest.fixture
def run(arguments, tmp_path):
    """A function that starts a run of four images a step on some processes, sharded unless told otherwise."""

    def start_run(name: str, num_processes: int, variables=FSDP, **options) -> list[Process]:
        options = {"max_train_steps": 6, "validation_steps": 3, "label_dropout": 0.5} | options
        # Adam would otherwise make steps of the rounding of gradients that are zero.
        options |= {"output_dir": tmp_path / name, "train_batch_size": 4 // num_processes, "adam_epsilon": 1e-3}
        (tmp_path / "logs").mkdir(exist_ok=True)
        prepare = functools.partial(set_environment, variables)
        return start_group(tmp_path / "logs", [arguments(**options)] * num_processes, prepare)

    return start_run


# Gradients


def check_gradients(tmp_path: Path, num_processes: int, *line: str):
    end(start_group(tmp_path, [list(line)] * num_processes, script=GRADIENTS))


def test_gradients_are_those_of_one_process(tmp_path):
    """With accumulation, and the optimizer's steps. The whole matrix is a drill."""
    check_gradients(tmp_path, 2, "--strategies", "forward", "detach", "reverse-1")


# Runs


def test_a_sharded_run_goes_on_with_another_number_of_processes(run, tmp_path):
    """It trains as one process does. Of four processes, some have no row of the class tables."""
    end(run("whole", 1, variables={}))
    folder = tmp_path / "run"
    end(run("run", 2))
    assert_same_run(folder, tmp_path / "whole")
    first, second, third = list_checkpoints(folder)
    names = sorted(path.name for path in third.iterdir())
    shards = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    assert names == ["metrics.jsonl", "progress.json", *shards, "training_args.json"]
    kept = pipeline_of(folder)
    for name in (".metadata", "optimizer.bin", "random_states_0.pkl"):
        plant(first / name, tmp_path / "proof")
    shutil.rmtree(second)
    shutil.rmtree(third)
    end(run("run", 4, resume_from_checkpoint="latest"))
    assert_same_run(folder, tmp_path / "whole")
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in pipeline_of(folder).items())
    assert not (tmp_path / "proof").exists()
    assert len(list(list_checkpoints(folder)[-1].glob("shard-*"))) == 4
    flow = FlowBackPipeline.from_pretrained(folder).transformer
    load_averaged_parameters(first, flow.parameters())
    load_averaged_parameters(list_checkpoints(folder)[-1], flow.parameters())
    assert all(torch.equal(tensor, pipeline_of(folder)[name]) for name, tensor in flow.state_dict().items())


def test_mixed_precision_is_that_without_sharding(run, tmp_path):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 3}
    end(run("copies", 2, variables={}, **options))
    end(run("run", 2, **options))
    assert_same_run(tmp_path / "run", tmp_path / "copies")
    losses = [record["loss"] for record in losses_of(tmp_path / "run").values()]
    assert losses == pytest.approx([record["loss"] for record in losses_of(tmp_path / "copies").values()], rel=1e-6)


def test_checkpoints_of_the_other_kind_are_refused(run, tmp_path):
    """In one sentence, on the main process alone."""
    short = {"max_train_steps": 2, "alignment": "none"}
    sentence = "`--resume_from_checkpoint` cannot be combined with this accelerate config: the run to resume was {}"
    for variables, others, was in ((FSDP, {}, "sharded by FSDP"), ({}, FSDP, "not sharded")):
        end(run(was, 2, variables, **short))
        processes = run(was, 2, others, resume_from_checkpoint="latest", **short)
        end(processes, 2)
        assert sentence.format(was) in processes[0].sentence and "error: " not in processes[1].log


def test_a_step_that_is_not_finite_ends_a_sharded_run(run, tmp_path):
    processes = run("run", 2, learning_rate=1e30, lr_warmup_steps=0, logging_steps=100, checkpointing_steps=100)
    end(processes, 1)
    assert "Step 2: the loss is nan" in processes[0].log
    assert not list_checkpoints(tmp_path / "run")


def signal_main(folder: Path, variables: dict[str, str], rank: int):
    set_environment(variables, rank)
    if rank == 0:
        send_at_line(folder, 3, "SIGTERM")


def test_a_signal_saves_shards(arguments, tmp_path):
    """In the background or not, they are whole when the processes end."""
    (tmp_path / "logs").mkdir()
    for name, options in (("run", {}), ("background", {"async_checkpointing": True})):
        folder = tmp_path / name
        line = arguments(output_dir=folder, train_batch_size=2, max_train_steps=6, checkpointing_steps=100, **options)
        processes = start_group(tmp_path / "logs", [line] * 2, functools.partial(signal_main, folder, FSDP))
        end(processes, 128 + signal.SIGTERM)
        (checkpoint,) = list_checkpoints(folder)
        check_files(checkpoint, read_progress(checkpoint))
        assert "SIGTERM: saved up to step 3" in processes[0].log and "Traceback" not in processes[1].log


def test_a_sharded_adapter_is_that_of_one_process(run, tmp_path):
    end(run("flow", 1, variables={}, max_train_steps=1, alignment="none"))
    options = {"pretrained_model_name_or_path": tmp_path / "flow", "lora_rank": 2, "lora_train_class_embed": True}
    sizes = ["patch_size", "num_blocks", "num_layers", "num_attention_heads", "attention_head_dim", "resolution"]
    options |= dict.fromkeys(sizes)
    end(run("whole", 1, variables={}, **options))
    end(run("run", 2, **options))
    adapters = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "whole")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    end(run("run", 2, resume_from_checkpoint="latest", **options))


# Accelerate's configs


@pytest.fixture
def launch(monkeypatch):
    """A function that sets the environment as `accelerate launch` does, and returns the number of processes."""

    def set_environment(config: str, *line: str) -> int:
        path = REPOSITORY / "training" / "configs" / "accelerate" / f"{config}.yaml"
        args = launch_command_parser().parse_args(["--config_file", str(path), *line, "script.py"])
        args, *_ = _validate_launch_command(args)
        for name, value in (prepare_multi_gpu_env(args) | {"WORLD_SIZE": str(args.num_processes)}).items():
            monkeypatch.setenv(name, value)
        return args.num_processes

    return set_environment


@pytest.mark.parametrize(
    "config, num_processes, sharding",
    [
        ("one", 1, None),
        ("ddp", 8, None),
        ("multi_node", 16, None),
        ("fsdp2", 8, Sharding(("TarFlowBlock",), True)),
        ("hsdp", 16, Sharding(("TarFlowBlock",), True, num_replicas=2)),
    ],
)
def test_configs(launch, config, num_processes, sharding):
    assert launch(config) == num_processes
    assert read_sharding() == sharding
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_PARALLELISM_CONFIG" not in os.environ


def test_options_of_configs(launch):
    launch("fsdp2", "--fsdp_transformer_layer_cls_to_wrap", "TarFlowLayer", "--fsdp_reshard_after_forward", "false")
    assert read_sharding() == Sharding(("TarFlowLayer",), reshard_after_forward=False)
    launch("fsdp2", "--fsdp_auto_wrap_policy", "NO_WRAP")
    assert read_sharding() == Sharding(())


@pytest.mark.parametrize(
    "config, line, message",
    [
        ("fsdp2", ["--fsdp_version", "1"], "must have `fsdp_version: 2`: .* not supported. Take .*fsdp2.yaml"),
        ("fsdp2", ["--fsdp_offload_params", "true"], "`fsdp_offload_params: true`"),
        ("fsdp2", ["--fsdp_activation_checkpointing", "true"], "--gradient_checkpointing does it"),
        ("fsdp2", ["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"], "SIZE_BASED_WRAP"),
        ("fsdp2", ["--fsdp_transformer_layer_cls_to_wrap", "Block"], "among TarFlowBlock, TarFlowLayer, but is Block"),
        ("hsdp", ["--num_processes", "12"], "must be the number of processes, 12, but is 2 times 8"),
        ("hsdp", ["--parallelism_config_tp_size", "2"], "tensor, context or sequence parallelism"),
    ],
)
def test_configs_that_are_not_supported(launch, config, line, message):
    launch(config, *line)
    with pytest.raises(ValueError, match=message):
        read_sharding()


@pytest.mark.parametrize(
    "num_processes, variables, options, message",
    [
        (
            2,
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {},
            "must not use DeepSpeed, which is not supported",
        ),
        (2, {"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "must not use Megatron-LM, which is not supported"),
        (2, FSDP | {"FSDP_VERSION": "1"}, {}, "must have `fsdp_version: 2`: the first one is not supported"),
        (2, FSDP, {"mixed_precision": "fp16"}, "`--mixed_precision` fp16 is not supported with FSDP: choose bf16"),
    ],
)
def test_what_is_not_supported_is_refused_on_the_main_process_alone(run, num_processes, variables, options, message):
    processes = run("run", num_processes, variables, **options)
    end(processes, 2)
    assert message in processes[0].sentence
    assert all("error: " not in process.log for process in processes[1:])


def test_a_process_without_a_group_cannot_be_sharded():
    with pytest.raises(ValueError, match="asks for FSDP, but this process was started alone: start .*torchrun"):
        ShardingAccelerator(Sharding(), [], cpu=True)


def test_an_accelerator_that_shards_by_itself_is_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="must come from `flowback_hf.training.make_accelerator`, .* uses FSDP"):
        check_accelerator(accelerator)
