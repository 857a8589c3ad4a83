"""Files that hold code instead of numbers. It never runs, whatever reads them, and the answer is a sentence."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from flowback_hf import FlowBackPipeline, TarFlowTransformer2DModel

from ..conftest import REPOSITORY
from .runs import SCRIPT, assert_one_sentence, start


class Code:
    """Unpickled, it writes a file. Its pickle needs no class of the tests."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def plant(path: Path, proof: Path, as_torch_saves: bool = False):
    """Put a pickle into a file that writes `proof` when it is loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_torch_saves:
        torch.save({"state": Code(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(Code(proof), protocol=2))


def believe(checkpoint: Path):
    """Let `progress.json` say that the files of a checkpoint are as they were saved, as whoever planted them would."""
    progress = json.loads((checkpoint / "progress.json").read_text())
    for name in progress["file_sizes"]:
        content = (checkpoint / name).read_bytes()
        progress["file_sizes"][name] = len(content)
        progress["file_checksums"][name] = hashlib.sha256(content).hexdigest()
    del progress["checksum"]
    progress["checksum"] = hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
    (checkpoint / "progress.json").write_text(json.dumps(progress))


def test_the_planted_code_would_run(tmp_path):
    plant(tmp_path / "file", tmp_path / "proof")
    pickle.loads((tmp_path / "file").read_bytes())
    plant(tmp_path / "file", tmp_path / "proof-of-torch", as_torch_saves=True)
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "proof").exists() and (tmp_path / "proof-of-torch").exists()


CHECKPOINT_FILES = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "training_args.json",
    "metrics.jsonl",
    "progress.json",
)


def long(names: tuple[str, ...]) -> list[tuple]:
    """Each of these, planted in both formats, for the long form."""
    return [
        pytest.param(name, as_torch_saves, marks=pytest.mark.drill)
        for name in names
        for as_torch_saves in (False, True)
    ]


@pytest.mark.parametrize(
    "name, as_torch_saves", [("optimizer.bin", False), ("random_states_0.pkl", True), *long(CHECKPOINT_FILES)]
)
def test_a_checkpoint(whole_run, line, tmp_path, drill, name, as_torch_saves):
    """With its checksum, which the planter also wrote, so that nothing but the reading itself protects."""
    folder, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(whole_run.folder, folder)
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == set(CHECKPOINT_FILES)
    plant(folder / "checkpoint-4" / name, proof, as_torch_saves)
    if name != "progress.json":
        believe(folder / "checkpoint-4")
    process = start(tmp_path / "log", line(folder, max_train_steps=5))
    process.wait()
    assert not proof.exists(), process.log
    if name in ("progress.json", "training_args.json", "metrics.jsonl"):  # there are others, or it can do without
        assert process.wait() == 0, process.log
    else:
        assert_one_sentence(
            process, rf"checkpoint-4 was not loaded: .*{'could run code' if '.safe' not in name else ''}"
        )
    drill("Planted pickles", files=1, code_run=0)


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "pytorch_model.bin", "scheduler.bin"]
)
@pytest.mark.drill
def test_a_file_that_a_checkpoint_should_not_have(whole_run, line, tmp_path, drill, name):
    folder, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(whole_run.folder, folder)
    plant(folder / "checkpoint-4" / name, proof)
    process = start(tmp_path / "log", line(folder, max_train_steps=5))
    assert process.wait() in (0, 2) and not proof.exists(), process.log
    drill("Planted pickles", files=1, code_run=0)


MODELS = ("teacher", "pretrained", "vae", "convert")


@pytest.mark.parametrize("option, as_torch_saves", [("teacher", True), ("convert", False), *long(MODELS)])
def test_a_model(images, teacher, line, tmp_path, drill, option, as_torch_saves):
    """Weights as older versions of the libraries saved them, with a pickle inside."""
    proof, model, script = tmp_path / "proof", tmp_path / "model", SCRIPT
    if option == "teacher":
        shutil.copytree(teacher, model)
        (model / "model.safetensors").unlink()
        plant(model / "pytorch_model.bin", proof, as_torch_saves)
        command = line(tmp_path / "run", teacher_model_name_or_path=model)
    elif option == "pretrained":
        flow = TarFlowTransformer2DModel(8, 2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=4)
        FlowBackPipeline(flow).save_pretrained(model)
        (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        plant(model / "transformer" / "diffusion_pytorch_model.bin", proof, as_torch_saves)
        script = REPOSITORY / "pipelines" / "sample.py"
        command = ["--model", str(model), "--output", str(tmp_path / "out.png")]
    elif option == "vae":
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=1).save_pretrained(model)
        (model / "diffusion_pytorch_model.safetensors").unlink()
        plant(model / "diffusion_pytorch_model.bin", proof, as_torch_saves)
        script = REPOSITORY / "training" / "precompute_latents.py"
        command = ["--train_data_dir", str(images), "--vae_model_name_or_path", str(model), "--resolution", "8"]
        command += ["--output_dir", str(tmp_path / "latents")]
    else:
        plant(model / "flow.pth", proof, as_torch_saves)
        script = REPOSITORY / "pipelines" / "convert_tarflow.py"
        command = ["--checkpoint", str(model / "flow.pth"), "--output_dir", str(tmp_path / "out")]
        command += ["--sample_size", "8", "--noise_std", "0.05"]
    process = start(tmp_path / "log", command, script=script)
    process.wait()
    assert not proof.exists(), process.log
    assert_one_sentence(process, r"was not loaded|cannot be loaded|damaged")
    drill("Planted pickles", files=1, code_run=0)


@pytest.mark.parametrize("file", ["config.json", pytest.param("preprocessor_config.json", marks=pytest.mark.drill)])
def test_a_teacher_with_its_own_code(teacher, line, tmp_path, drill, file):
    """transformers would ask whether to run it, and wait for an answer."""
    proof, model = tmp_path / "proof", tmp_path / "teacher"
    shutil.copytree(teacher, model)
    (model / "planted.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((model / file).read_text())
    config |= {"auto_map": {"AutoConfig": "planted.Config", "AutoImageProcessor": "planted.Processor"}}
    config |= {"model_type": "planted"} if file == "config.json" else {"image_processor_type": "Planted"}
    (model / file).write_text(json.dumps(config))
    process = start(tmp_path / "log", line(tmp_path / "run", teacher_model_name_or_path=model))
    assert_one_sentence(process, "it brings code of its own, which is not run")
    assert not proof.exists() and "y/N" not in process.log
    drill("Planted pickles", files=1, code_run=0)


@pytest.mark.parametrize("name", ["metadata.pkl", "train/cat/image.pkl", "metadata.jsonl", "train/cat/0.png"])
@pytest.mark.drill
def test_a_data_set(images, line, tmp_path, drill, name):
    folder, proof = tmp_path / "images", tmp_path / "proof"
    shutil.copytree(images, folder)
    plant(folder / name, proof)
    process = start(tmp_path / "log", line(tmp_path / "run", train_data_dir=folder))
    assert process.wait() in (0, 2) and not proof.exists(), process.log
    drill("Planted pickles", files=1, code_run=0)
