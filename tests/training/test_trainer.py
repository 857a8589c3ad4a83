"""The trainer as Python calls it, without the script."""

import json
import os
import socket
import threading

import pytest
import torch
from filelock import FileLock

from flowback_hf import AlignedFlowObjective, FlowBackPipeline, RepresentationTeacher, TarFlowTransformer2DModel
from flowback_hf.data import ImageSource, RowGenerator, Splits, make_generator
from flowback_hf.files import read_json_lines, write_json
from flowback_hf.hub import write_repository
from flowback_hf.training import Trainer, TrainingArguments, list_checkpoints
from flowback_hf.training.checkpoints import find_sane_checkpoint
from flowback_hf.training.run_folder import LOCK_FILE, OWNER_FILE, lock_run_folder

from ..conftest import image_rows


@pytest.fixture
def make_trainer(teacher, tmp_path):
    """A function of the arguments that differ: a tiny trainer with a teacher."""

    def make(name="run", **options):
        torch.manual_seed(0)
        # positional, which diffusers' config takes for defaults
        flow = TarFlowTransformer2DModel(
            8, 2, num_blocks=2, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_classes=1
        )
        source = ImageSource(Splits(image_rows(9), image_rows(3), ["cat"]), flow.config, label_ids=[0])
        encoder = RepresentationTeacher.from_pretrained(teacher, grid_size=4)
        objective = AlignedFlowObjective(flow, places=[(2, 1)], teacher_dim=encoder.feature_dim, projector_dim=8)
        tiny = {"train_batch_size": 4, "max_train_steps": 4, "logging_steps": 1, "checkpointing_steps": 2}
        tiny |= {"learning_rate": 1e-2, "lr_warmup_steps": 1, "validation_steps": 4}
        arguments = TrainingArguments(str(tmp_path / name), **(tiny | options))
        return Trainer(objective, source, arguments, encoder, {0: "cat"})

    return make


def test_it_returns_the_pipeline_that_it_saves(make_trainer, tmp_path):
    pipeline = make_trainer(validation_guidance_scale=1.5).fit()
    saved = FlowBackPipeline.from_pretrained(tmp_path / "run")
    assert saved.labels == {"cat": 0} and saved.config.guidance_scale == 1.5
    for name, tensor in saved.transformer.state_dict().items():
        assert torch.equal(tensor, pipeline.transformer.state_dict()[name])
    settings = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert settings["train_batch_size"] == 4 and settings["lr_scheduler"] == "cosine"
    assert [record["step"] for record in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


def test_it_goes_on_where_it_was_and_refuses_other_arguments(make_trainer, tmp_path):
    make_trainer(max_train_steps=2).fit()
    before = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(ValueError, match="already holds a run: add --resume_from_checkpoint latest"):
        make_trainer()
    with pytest.raises(ValueError, match=r"--adam_beta2 \(0.95 then, 0.5 now\)"):
        make_trainer(adam_beta2=0.5, resume_from_checkpoint="latest")
    trainer = make_trainer(resume_from_checkpoint="latest")
    trainer.fit()
    # no step is repeated: the speeds of the first ones would not be
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in before] == [0, 1, 2, 2] and records[:4] == before
    assert [record["step"] for record in records[4:]] == [3, 4, 4]
    assert trainer.global_step == 4 and (tmp_path / "run" / "checkpoint-4").exists()


def test_a_norm_of_0_does_not_clip(make_trainer):
    def weights(name: str, max_grad_norm: float) -> torch.Tensor:
        flow = make_trainer(name, max_grad_norm=max_grad_norm, use_ema=False).fit().transformer
        return torch.cat([parameter.flatten() for parameter in flow.parameters()])

    unclipped = weights("unclipped", 0)
    assert torch.equal(unclipped, weights("hardly", 1e9))
    assert not torch.equal(unclipped, weights("clipped", 1e-4))


def test_a_step_that_is_not_finite_changes_nothing(make_trainer, tmp_path):
    """The run ends when it next looks, before it saves anything."""
    options = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "validation_steps": 100, "checkpointing_steps": 100}
    expected = make_trainer("short", max_train_steps=1, use_ema=False, **options).fit().transformer.state_dict()
    trainer = make_trainer(max_train_steps=6, logging_steps=4, **options)
    clean_sample = trainer.source.clean_sample

    def spoil(batch, generator):
        sample = clean_sample(batch, generator)
        return sample.where(torch.tensor(trainer.global_step != 1), torch.nan)

    trainer.source.clean_sample = spoil
    with pytest.raises(FloatingPointError, match="Step 2: the loss is nan and the gradient's norm nan. Training stop"):
        trainer.fit()
    assert trainer.global_step == 4 and not list_checkpoints(tmp_path / "run")
    for name, parameter in trainer.flow.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_host_reads_the_device_only_to_log(make_trainer, monkeypatch, accumulation):
    """Between two logs nothing waits for the device."""
    trainer = make_trainer(
        max_train_steps=8, logging_steps=4, validation_steps=100, checkpointing_steps=100,
        gradient_accumulation_steps=accumulation, train_batch_size=2 // accumulation, max_grad_norm=1.0,
    )  # fmt: skip
    # It looks at labels on the CPU, and on no other device.
    monkeypatch.setattr("flowback_hf.alignment.objective.check_class_labels", lambda *arguments: None)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *arguments, name=name, method=method: reads.append(name) or method(*arguments)
        )
    train_on, end_step, reads_of_steps, reads_of_ends = trainer._train_on, trainer._end_step, [], []

    def count(function, counts, *arguments):
        before = len(reads)
        function(*arguments)
        counts.append(len(reads) - before)

    trainer._train_on = lambda *arguments: count(train_on, reads_of_steps, *arguments)
    trainer._end_step = lambda *arguments: count(end_step, reads_of_ends, *arguments)
    trainer.fit()
    assert reads_of_steps == [0] * 8 * accumulation
    assert reads_of_ends[:7] == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("validation_steps", [1, 100])
def test_averaged_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path, validation_steps):
    trainer = make_trainer(checkpointing_steps=1, validation_steps=validation_steps)
    step = trainer.ema.step

    def spoil(parameters):
        step(parameters)
        if trainer.global_step == 1:  # the second step is running
            trainer.ema.shadow_params[3].view(-1)[0] = torch.inf

    trainer.ema.step = spoil
    with pytest.raises(
        FloatingPointError, match=r"Step 2: the (averaged )?weights .*not finite.*good weights is .*-1:"
    ):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "model_index.json").exists() and not (tmp_path / "run" / ".lock").exists()


def test_the_last_good_checkpoint_is_kept(make_trainer, tmp_path):
    """Whatever the limit, while newer ones hold ruined weights."""
    trainer = make_trainer(checkpointing_steps=1, checkpoints_total_limit=1)
    measure = trainer._measure_weights
    trainer._measure_weights = lambda: measure() + 5.0 * (trainer.global_step > 2)
    trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert find_sane_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_a_second_trainer_is_told_who_uses_the_folder(make_trainer, tmp_path):
    with lock_run_folder(tmp_path / "run"):
        with pytest.raises(
            ValueError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}: wait until"
        ):
            make_trainer().fit()
    make_trainer(max_train_steps=1).fit()


def test_a_process_that_has_just_taken_the_folder_is_named(tmp_path):
    """It holds the lock a moment before it has written who it is."""
    with FileLock(tmp_path / LOCK_FILE):
        write = threading.Timer(0.3, write_json, [tmp_path / OWNER_FILE, {"host": "node", "pid": 7}])
        write.start()
        with pytest.raises(ValueError, match="in use by process 7 on node"), lock_run_folder(tmp_path):
            pass
        write.join()


def test_what_it_trains_can_be_published(make_trainer, tmp_path):
    pipeline = make_trainer(max_train_steps=1).fit()
    write_repository(pipeline, tmp_path / "repository", "flow", tmp_path / "run")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "| alignment | reverse, order 0, weight 0.1 |" in card and "| teacher | not recorded |" in card
    assert "| data | not recorded |" in card and "| steps | 1 |" in card


@pytest.mark.parametrize("random_flip, label_dropout", [(False, 0.0), (True, 0.5), (True, 1.0)])
def test_augmentation_is_what_was_asked_for(make_trainer, random_flip, label_dropout):
    trainer = make_trainer(random_flip=random_flip, label_dropout=label_dropout)
    images = torch.arange(8.0).expand(400, 3, 8, 8)
    batch = {"images": images, "class_labels": torch.zeros(400, dtype=torch.long)}
    augmented = trainer._augment(batch, RowGenerator(make_generator(0), 400))
    is_mirrored = (augmented["images"] == images.flip(-1)).all(dim=(1, 2, 3))
    is_same = (augmented["images"] == images).all(dim=(1, 2, 3))
    assert (is_mirrored ^ is_same).all()
    assert is_mirrored.float().mean() == pytest.approx(0.5 if random_flip else 0.0, abs=0.1)
    is_dropped = augmented["class_labels"] == -1
    assert is_dropped.float().mean() == pytest.approx(label_dropout, abs=0.1)
    assert (batch["class_labels"] == 0).all(), "the batch itself is left alone"
