# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.

import contextlib
import copy
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from flowback_hf import (
    AlignedFlowObjective,
    AlignedFlowOutput,
    FlowBackClassificationPipeline,
    FlowBackPipeline,
    RepresentationTeacher,
)
from flowback_hf.data import ImageSource, LatentSource, RowGenerator, Stream, add_noise, collate, make_generator
from flowback_hf.files import write_json
from flowback_hf.places import place_name
from flowback_hf.reporting import check_matplotlib
from flowback_hf.training.adapters import save_adapter, trained_parameters, trains_class_tables
from flowback_hf.training.checkpoints import (
    SETTINGS_FILE,
    BackgroundWriter,
    find_checkpoint,
    find_sane_checkpoint,
    is_sane,
    leave_out_frozen_parameters,
    load_checkpoint,
    save_checkpoint,
)
from flowback_hf.training.compilation import compile_layers
from flowback_hf.training.processes import SharedSignal, check_shared, decide
from flowback_hf.training.run_folder import (
    BRANCH_SETTINGS,
    BRANCHES,
    DIVISION_SETTINGS,
    OWNER_FILE,
    RESUMABLE_SETTINGS,
    MetricsLog,
    check_run_folder,
    describe_branch,
    describe_processes,
    describe_total_batch_size,
    lock_run_folder,
    save_pipeline,
    set_aside_later_checkpoints,
)
from flowback_hf.training.sampler import EpochSampler
from flowback_hf.training.sharding import ShardingAccelerator, check_accelerator, own_part, read_sharding, whole
from flowback_hf.training.signals import StopSignals, leave_process_group
from flowback_hf.training.step_values import StepValues
from flowback_hf.training.streaming import StreamLoader
from flowback_hf.training.validation import draw_samples, validate
from flowback_hf_cli.training import TrainingArguments


logger = get_logger(__name__, log_level="INFO")

# Processes that load data, beside each process that trains on another device than the CPU.
NUM_WORKERS = 2

# Trackers whose package an extra of the same name installs.
TRACKER_EXTRAS = ("tensorboard", "wandb")


def check_tracker(name: str | None):
    """
    Check that a tracker can be logged to. Accelerate itself trains on without one whose package is missing.

    Args:
        name (`str`, *optional*): A tracker of Accelerate's, or `"all"` that are installed. `None` logs to none.
    Raises:
        ValueError: if there is no such tracker.
        ImportError: if its package is missing. The message says what to install.
    """
    names = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    installed = [str(kind) for kind in get_available_trackers()]
    if name is None or name in installed or (name == "all" and installed):
        return
    if name not in [*names, "all"]:
        raise ValueError(f"`--report_to` must be one of {', '.join(names)} and all, but is {name!r}.")
    tracker = TRACKER_EXTRAS[0] if name == "all" else name
    package = f'"flowback_hf[{tracker}]"' if tracker in TRACKER_EXTRAS else tracker
    raise ImportError(
        f"`--report_to` {name} needs a package that is not installed: pip install {package}. Or leave it out:"
        " metrics.jsonl is always written."
    )


def make_accelerator(arguments: TrainingArguments) -> ShardingAccelerator:
    """
    Make the accelerator of a run, set up its logging, and seed the global generators.

    Raises:
        ValueError, ImportError: as [`check_tracker`], [`read_sharding`] and [`ShardingAccelerator`].
    """
    check_tracker(arguments.report_to)
    folder = Path(arguments.output_dir)
    accelerator = ShardingAccelerator(
        read_sharding(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / arguments.logging_dir)),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=arguments.ddp_timeout))],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    datasets.utils.logging.set_verbosity_error()
    set_seed(arguments.seed)
    if arguments.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


class Trainer:
    """
    Trains a flow: optimizer steps, averaged weights, validations, checkpoints and a log, resumable at any moment.

    A flow with an attached adapter (`flow.add_adapter(peft.LoraConfig(...))`) is left as it is: only parameters that
    require gradients are trained, averaged and kept in checkpoints.

    A run's folder holds `training_args.json`, `metrics.jsonl` (losses and speed every few steps, validations),
    `loss_curve.png`, `samples/`, `checkpoint-*` and, when it is done, the pipeline or the adapter. On a CPU a resumed
    run ends with the weights of one that was never interrupted, to the bit. A run may be resumed on another number of
    processes if its steps take as many images as before: what is drawn at random belongs to a step and to an image's
    place in it, whichever process sees it.

    Args:
        objective ([`AlignedFlowObjective`]): The flow and its loss.
        source ([`ImageSource`] or [`LatentSource`]): Training and validation data, and what a batch is.
        arguments ([`TrainingArguments`]): How to train, log, validate and save.
        teacher ([`RepresentationTeacher`], *optional*): Not needed for the strategy `"none"` or with stored features.
        id2label (`dict[int, str]`, *optional*): The flow's class names, which the pipeline keeps.
        settings (`dict`, *optional*):
            What `training_args.json` holds; a resumed run must have the same. Default: `arguments` and the alignment.
        accelerator ([`~accelerate.Accelerator`], *optional*): Default: [`make_accelerator`] of `arguments`.
        guidance_rule (`str`, defaults to `"linear"`): The pipeline's. Its default scale is that of the sample grids.
    Raises:
        ValueError: before anything is written, if the output folder holds another run, a validation label is unknown,
            there are fewer images than a step takes or none that can be used, or the flow has several adapters.

    Example:
        ```py
        >>> import datasets
        >>> import tempfile
        >>> import PIL.Image
        >>> from flowback_hf import AlignedFlowObjective, TarFlowTransformer2DModel
        >>> from flowback_hf.data import ImageSource, Splits
        >>> from flowback_hf.training import Trainer, TrainingArguments

        >>> features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
        >>> images = [PIL.Image.new("L", (8, 8), 9 * shade) for shade in range(4)]
        >>> rows = datasets.Dataset.from_dict({"image": images, "label": [0] * 4}, features)
        >>> flow = TarFlowTransformer2DModel(8, 4, 1, num_blocks=2, num_layers=1, num_attention_heads=2,
        ...     attention_head_dim=8, num_classes=1)
        >>> source = ImageSource(Splits(rows, rows, ["cat"]), flow.config, label_ids=[0])
        >>> arguments = TrainingArguments(tempfile.mkdtemp() + "/run", train_batch_size=2, max_train_steps=1)
        >>> pipeline = Trainer(AlignedFlowObjective(flow, "none"), source, arguments, id2label={0: "cat"}).fit()
        >>> pipeline(class_labels=["cat"]).images[0].size
        (8, 8)
        ```

    References: Zhai et al., Normalizing Flows are Capable Generative Models, https://arxiv.org/abs/2412.06329;
    Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment,
    https://arxiv.org/abs/2511.22345
    """

    # The figure that tells good weights from ruined ones: logged, and measured at each checkpoint. Lower is better.
    measure = "nll"

    def __init__(
        self,
        objective: AlignedFlowObjective,
        source: ImageSource | LatentSource,
        arguments: TrainingArguments,
        teacher: RepresentationTeacher | None = None,
        id2label: dict[int, str] | None = None,
        settings: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        guidance_rule: str = "linear",
    ):
        check_matplotlib()  # the loss curve needs it, hours from now
        self.arguments = arguments
        self.source = source
        self.teacher = teacher
        self.guidance_rule = guidance_rule
        self.accelerator = make_accelerator(arguments) if accelerator is None else accelerator
        check_accelerator(self.accelerator)
        self.folder = Path(arguments.output_dir)
        settings = self._describe(objective) if settings is None else settings
        self.settings = settings | describe_processes(arguments, self.accelerator)
        decide(self.accelerator, check_run_folder, self.folder, self.settings, arguments.resume_from_checkpoint)
        self.flow = objective.flow
        if len(self.flow.attached_adapters) > 1:
            raise ValueError(
                "`objective` must hold a flow with at most one adapter, which is then trained, but"
                f" {self.flow.attached_adapters} are attached."
            )
        # A copy holds the averaged weights when they are looked at: the trained ones are never touched, and compiled
        # layers never run token by token.
        self.model = objective.model
        device = self.accelerator.device
        self.evaluated_model = copy.deepcopy(self.model).to(device).eval().requires_grad_(False)
        self.pipeline = self._make_pipeline(id2label)
        self.pipeline.set_progress_bar_config(disable=True)
        self.validation_class_labels = self._normalize_class_labels()
        self.images_per_step = self.settings["total_batch_size"]
        self.is_streaming = isinstance(source.train_dataset, Stream)
        if self.is_streaming:
            if arguments.max_train_steps is None:
                raise ValueError("`max_train_steps` must be given for a stream, whose epochs have no known length.")
        else:
            self._check_batch_size()
            # What is left over does not fill a step. Which images that are changes from epoch to epoch.
            self.steps_per_epoch = len(source.train_dataset) // self.images_per_step
            source.train_dataset[0]  # raises if none of its images can be used
        source.validation_dataset[0]
        self._prepare(objective)

        self.global_step = 0
        self._saved_step = 0
        self.num_skipped = 0
        self.skipped_files: set[str] = set()
        self._step_values = StepValues(self.accelerator)
        self._last_batch: tuple[torch.Tensor | None, ...] | None = None
        self._timed_steps, self._timed_since = 0, time.perf_counter()
        names = ["SIGTERM", "SIGINT", arguments.save_on_signal]
        self._stop_signals = StopSignals(signal.Signals[name] for name in names if name is not None)
        self._shared_signal = SharedSignal(self.accelerator)
        self._background = BackgroundWriter(self.accelerator) if arguments.async_checkpointing else None

    def fit(self) -> FlowBackPipeline:
        """
        Train to the last step, from the checkpoint if the run is resumed.

        SIGTERM, SIGINT and the signal of `save_on_signal` let the running step end, save a checkpoint and end the
        process. A second signal ends it at once. Of several processes it is enough that one receives the signal. This
        holds in the main thread.

        Returns:
            [`FlowBackPipeline`]: with the averaged weights, as they were saved in the output folder.
        Raises:
            ValueError: before training, if another process writes to the output folder, or no checkpoint can be read.
            FloatingPointError: if the loss, the gradient or weights are not finite. Says which checkpoint is good.
            SystemExit: with 128 plus the signal's number, after a signal.
        """
        self.accelerator.wait_for_everyone()  # the main process has looked at the output folder
        with contextlib.ExitStack() as lock:
            decide(self.accelerator, lambda: lock.enter_context(lock_run_folder(self.folder)))
            check_shared(self.accelerator, self.folder / OWNER_FILE, "--output_dir")
            if self._background is not None:
                lock.callback(self._background.finish)  # before the folder is given free
            self._open_folder()
            with self._stop_signals:
                self._train()
            return self._save()

    def _train(self):
        with tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
        ) as progress_bar:
            if self.global_step == 0:
                self._evaluate()
            self._timed_since = time.perf_counter()
            while self.global_step < self.max_train_steps:
                self._train_epoch(progress_bar)

    # What is trained

    def _describe(self, objective: AlignedFlowObjective) -> dict[str, Any]:
        """What tells this run from others, as far as the trainer knows it."""
        order = objective.num_neumann_terms if objective.strategy == "reverse" else None
        alignment = {"alignment": objective.strategy, "alignment_weight": objective.weight, "alignment_order": order}
        return asdict(self.arguments) | alignment

    def _make_pipeline(self, id2label: dict[int, str] | None) -> FlowBackPipeline:
        """The pipeline that samples with the averaged weights, and is saved in the end."""
        self.evaluated_model.register_to_config(inverse_profile=None)  # it was measured with other weights
        self.classifier = FlowBackClassificationPipeline(self.evaluated_model)
        self.classifier.set_progress_bar_config(disable=True)
        is_guided = self.flow.config.num_classes is not None
        guidance_scale = self.arguments.validation_guidance_scale if is_guided else 1.0
        return FlowBackPipeline(self.evaluated_model, self.source.vae, id2label, guidance_scale, self.guidance_rule)

    def _compile(self, objective: AlignedFlowObjective):
        compile_layers(self.accelerator, objective, self.arguments.train_batch_size)

    def _compute(self, batch: dict[str, Any], generator: RowGenerator) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch, and a flat table of scalars for the log."""
        teacher_features = batch.get("teacher_features") if self.teacher is None else self.teacher(batch["images"])
        clean_sample = self.source.clean_sample(batch, generator)
        noisy_sample = add_noise(clean_sample, self.flow.config, generator)
        class_labels = None if self.flow.config.num_classes is None else batch["class_labels"]
        self._last_batch = (noisy_sample, class_labels, teacher_features)
        output = self.objective(*self._last_batch)
        return output.loss, scalars_of(output)

    def _measure(self) -> torch.Tensor:
        """The nll of the trained weights as they are now, on the last batch, in nats per dimension."""
        return self.objective(*self._last_batch).nll  # through what was prepared, which gathers sharded weights

    def _validate(self) -> dict[str, float]:
        """Figures of the averaged weights on the validation data; one of them is `validation_<measure>`."""
        return validate(self.accelerator, self.classifier, self.validation_dataloader, self.source)

    def _draw_samples(self, path: Path):
        guidance_scale = self.arguments.validation_guidance_scale
        draw_samples(self.pipeline, self.validation_class_labels, guidance_scale, self.arguments.seed, path)

    # Before the first step

    def _normalize_class_labels(self) -> list[int] | None:
        labels = self.arguments.validation_class_labels
        if labels is None:
            return None
        labels = self.pipeline.normalize_class_labels(labels)
        self.pipeline.check_inputs(labels, self.arguments.validation_guidance_scale)
        return labels

    def _check_batch_size(self):
        num_images = len(self.source.train_dataset)
        if num_images < self.images_per_step:
            raise ValueError(
                f"`--train_batch_size` {describe_total_batch_size(self.settings)} needs {self.images_per_step} images"
                f" a step, but the training split has {num_images}."
            )

    def _prepare(self, objective: AlignedFlowObjective):
        """Build the optimizer, the data loaders, the schedule and the average, and hand them to Accelerate."""
        arguments, accelerator = self.arguments, self.accelerator
        if arguments.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if arguments.torch_compile:
            self._compile(objective)
        # Before the optimizer is made, because sharding makes new parameters.
        self.objective = accelerator.prepare_model(objective)
        learning_rate = arguments.learning_rate
        if arguments.scale_lr:
            learning_rate *= self.images_per_step
        optimizer = torch.optim.AdamW(
            trained_parameters(objective),
            lr=learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.adam_weight_decay,
            eps=arguments.adam_epsilon,
            fused=True,  # the one that can skip a step without asking the device
        )
        self.max_train_steps = arguments.max_train_steps
        if self.max_train_steps is None:
            self.max_train_steps = arguments.num_train_epochs * self.steps_per_epoch
        # Not prepared: Accelerate's counts the steps of all processes, which may be more or fewer when it goes on.
        self.lr_scheduler = get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=arguments.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
        )
        num_workers = arguments.dataloader_num_workers
        if num_workers is None:
            num_workers = 0 if accelerator.device.type == "cpu" else NUM_WORKERS
            if self.is_streaming:
                num_workers = min(num_workers, self.source.train_dataset.num_shards // accelerator.num_processes)
        options = {
            "collate_fn": collate,
            "num_workers": num_workers,
            "worker_init_fn": leave_process_group,
            "persistent_workers": num_workers > 0,
            "pin_memory": accelerator.device.type == "cuda",
        }
        if self.is_streaming:
            self.train_dataloader = StreamLoader(
                accelerator,
                self.source.train_dataset,
                arguments.train_batch_size,
                arguments.seed,
                arguments.shuffle_buffer_size,
                **options,
            )
        else:
            num_used = self.steps_per_epoch * self.images_per_step
            sampler = EpochSampler(len(self.source.train_dataset), num_used, arguments.seed)
            train_dataloader = torch.utils.data.DataLoader(
                self.source.train_dataset, arguments.train_batch_size, sampler=sampler, drop_last=True, **options
            )
            self.train_dataloader = accelerator.prepare(train_dataloader)
        validation_dataloader = torch.utils.data.DataLoader(
            self.source.validation_dataset, arguments.eval_batch_size, **options
        )
        self.optimizer, self.validation_dataloader = accelerator.prepare(optimizer, validation_dataloader)
        accelerator.register_save_state_pre_hook(leave_out_frozen_parameters)
        self.ema = None
        if arguments.use_ema:
            self.ema = EMAModel(trained_parameters(self.model), arguments.ema_decay, foreach=True)

    def _open_folder(self):
        """Write the settings of a new run, or load the checkpoint of one that is resumed, and open the log."""
        accelerator, resume = self.accelerator, self.arguments.resume_from_checkpoint
        # Again, because another run may have written to the folder since.
        earlier = decide(accelerator, check_run_folder, self.folder, self.settings, resume)
        found = decide(accelerator, find_checkpoint, self.folder, resume) if resume else None
        folder, progress = found or (None, None)
        if folder is None:
            settings = self.settings | {"validation_class_labels": self.validation_class_labels}
            if resume:
                logger.warning(f"There is no checkpoint to resume from in {self.folder}: starting at step 0.")
        else:
            settings = self._resume(folder, progress, earlier)
        if accelerator.is_main_process:
            if self.source.hold_out is not None:
                self.source.hold_out.write(self.folder)
            write_json(self.folder / SETTINGS_FILE, settings)
            self.metrics_log = MetricsLog(self.folder, folder, self.global_step)
            tracked = {name: value for name, value in self.settings.items() if isinstance(value, int | float | str)}
            accelerator.init_trackers(self.arguments.tracker_project_name, tracked)

    def _resume(self, checkpoint: Path, progress: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
        """Load a checkpoint. Returns the settings of the run, which has another branch if they have changed."""
        logger.info(f"Resuming from {checkpoint}.")
        if "figures" in progress and not is_sane(progress):
            figures = progress["figures"]
            logger.warning(
                f"The weights in {checkpoint} are ruined: their {self.measure} is {figures[self.measure]:.4g}, but the"
                f" run had reached {figures[f'lowest_{self.measure}']:.4g}. {self._advise()}"
            )
        load_checkpoint(self.accelerator, checkpoint, self.ema)
        use_fused_steps(self.optimizer)
        self.global_step = self._saved_step = progress["global_step"]
        set_learning_rates(self.optimizer, self.lr_scheduler, self.global_step)
        changes = describe_branch(earlier, self.settings)
        # Later checkpoints that `latest` passed over are damaged, and will be written again.
        if self.accelerator.is_main_process and (changes or self.arguments.resume_from_checkpoint != "latest"):
            set_aside_later_checkpoints(self.folder, self.global_step)
        changeable = [*DIVISION_SETTINGS, *RESUMABLE_SETTINGS, *BRANCH_SETTINGS]
        settings = earlier | {name: self.settings[name] for name in changeable if name in self.settings}
        settings["validation_class_labels"] = self.validation_class_labels
        if changes:
            logger.warning(f"A new branch of the run starts at step {self.global_step}: {', '.join(changes)}.")
            branch = {"from_step": self.global_step, "changes": changes}
            settings[BRANCHES] = [*earlier.get(BRANCHES, []), branch]
        return settings

    # Steps

    def _remaining_batches(self) -> Iterable[dict[str, Any]]:
        """The batches of an epoch that have not been seen. Those of a stream have no end."""
        if self.is_streaming:
            return self.train_dataloader
        epoch, num_done = divmod(self.global_step, self.steps_per_epoch)
        self.train_dataloader.set_epoch(epoch)
        if not num_done:
            return self.train_dataloader
        num_batches = num_done * self.arguments.gradient_accumulation_steps
        return self.accelerator.skip_first_batches(self.train_dataloader, num_batches)

    def _epoch(self) -> int:
        """The epoch of the last step; of a stream, that of the main process."""
        if self.is_streaming:
            return self.train_dataloader.epoch
        return (self.global_step - 1) // self.steps_per_epoch

    def _train_epoch(self, progress_bar: tqdm):
        """Train on the batches of an epoch that have not been seen, or up to the last step."""
        for batch in self._until_stopped(self._remaining_batches()):
            self._train_on(batch)
            self._report_skipped(batch["skipped"])
            if not self.accelerator.sync_gradients:
                continue
            self.global_step += 1
            self._timed_steps += 1
            progress_bar.update()
            self._end_step(progress_bar)
            self._exit_if_stopped()
            if self.global_step == self.max_train_steps:
                return
        if self.accelerator.num_processes == 1 and self._stop_signals.received is not None:
            self._save_and_exit(self._stop_signals.received)

    def _until_stopped(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """
        The batches, up to a signal that also ended the processes that load them. What the steps before it made can be
        saved, unless it came in the middle of a step of several batches, or other processes wait for this one.
        """
        try:
            yield from batches
        except Exception:  # of many kinds, depending on what the loader was doing
            is_alone = self.accelerator.num_processes == 1
            if self._stop_signals.received is None or not self.accelerator.sync_gradients or not is_alone:
                raise

    def _row_generator(self) -> RowGenerator:
        """What draws this process's share of the running step's noise."""
        accelerator, batch_size = self.accelerator, self.arguments.train_batch_size
        generator = make_generator(self.arguments.seed, self.global_step, device=accelerator.device)
        number = self._step_values.num_batches * accelerator.num_processes + accelerator.process_index
        return RowGenerator(generator, self.images_per_step, first_row=number * batch_size)

    def _train_on(self, batch: dict[str, Any]):
        """Take one batch's share of an optimizer step. Nothing waits for the device."""
        accelerator, generator = self.accelerator, self._row_generator()
        batch = self._augment(batch, generator)
        with accelerator.accumulate(self.objective):
            loss, scalars = self._compute(batch, generator)
            # A loss that is not finite makes the gradient NaN, and all processes see it.
            accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
            self._step_values.add(scalars)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(
                    self.objective.parameters(), self.arguments.max_grad_norm or math.inf
                )
                has_failed = self._step_values.end_step(self.global_step + 1, gradient_norm)
                if accelerator.scaler is None:
                    self.optimizer.optimizer.found_inf = has_failed
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                self.lr_scheduler.step()
                if self.ema is not None:
                    self.ema.step(trained_parameters(self.model))

    def _augment(self, batch: dict[str, Any], generator: RowGenerator) -> dict[str, Any]:
        """Mirror half of the images, if that is asked for, and drop a share of the labels."""
        class_labels = batch["class_labels"]
        mirrored, dropped = generator.rand((len(class_labels),)), generator.rand((len(class_labels),))
        batch = self.source.mirror(batch, (mirrored < 0.5) & self.arguments.random_flip)
        return batch | {"class_labels": class_labels.masked_fill(dropped < self.arguments.label_dropout, -1)}

    def _read_step(self) -> dict[str, float]:
        """The values of the last step. Raises FloatingPointError if one since the last look was not finite."""
        try:
            return self._step_values.read()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._advise()}") from None

    def _check_finite_weights(self, parameters: list[torch.Tensor], what: str):
        is_finite = torch.stack([own_part(parameter).isfinite().all() for parameter in parameters]).all()
        if not self.accelerator.gather(is_finite[None]).all():
            raise FloatingPointError(
                f"Step {self.global_step}: the {what} are not finite, and were not saved. {self._advise()}"
            )

    def _advise(self) -> str:
        """What to do with a run that diverged."""
        changes = "a lower --learning_rate or --max_grad_norm, or more --lr_warmup_steps"
        checkpoint = find_sane_checkpoint(self.folder)
        if checkpoint is None:
            return f"No checkpoint is known to hold good weights: start again, in another folder, with {changes}."
        return (
            f"The last checkpoint with good weights is {checkpoint}: go on from it with --resume_from_checkpoint"
            f" {checkpoint.name} and {changes}."
        )

    def _report_skipped(self, names: list[str]):
        """Warn once of each file that cannot be used."""
        self.num_skipped += len(names)
        for name in set(names) - self.skipped_files:
            logger.warning(f"Skipped an image: {name}.", main_process_only=False)
        self.skipped_files.update(names)

    # Between steps

    def _end_step(self, progress_bar: tqdm):
        """Log, validate and save, each when it is due."""
        arguments, step = self.arguments, self.global_step
        intervals = (arguments.logging_steps, arguments.validation_steps, arguments.checkpointing_steps)
        logs, validates, saves = (step % interval == 0 or step == self.max_train_steps for interval in intervals)
        if not (logs or validates or saves):
            return
        if self._background is not None:
            self._background.check()
        values = self._read_step()
        progress_bar.set_postfix(loss=f"{values['loss']:.4f}")
        if logs:
            elapsed = time.perf_counter() - self._timed_since
            self._record(
                values
                | {
                    "epoch": self._epoch(),
                    "learning_rate": self.lr_scheduler.get_last_lr()[0],
                    "images_per_second": self._timed_steps * self.images_per_step / elapsed,
                    "images_skipped": self.num_skipped,
                }
            )
            self._timed_steps, self._timed_since = 0, time.perf_counter()
        before = time.perf_counter()
        # What was logged before a checkpoint is kept when the run is resumed from it: it comes last.
        if validates:
            self._evaluate()
        if saves:
            self._save_checkpoint()
        self._timed_since += time.perf_counter() - before  # the speed is that of training

    def _save_checkpoint(self):
        figures = {self.measure: self._measure_weights()}
        if self.accelerator.is_main_process:
            figures[f"lowest_{self.measure}"] = self.metrics_log.lowest(self.measure)
            self.metrics_log.flush()
        limit = self.arguments.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.folder, self.global_step, figures, limit, self.ema, self._background)
        self._saved_step = self.global_step

    @torch.no_grad()
    def _measure_weights(self) -> float:
        """
        Measure the trained weights as they are now. The loss of a step is that of the weights before it: it does not
        tell what the step made of them.

        Raises:
            FloatingPointError: unless it and the averaged weights are finite.
        """
        with self.accelerator.autocast():
            value = self.accelerator.reduce(self._measure(), reduction="mean").item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"Step {self.global_step} ruined the weights: their {self.measure} is {value}. They were not saved."
                f" {self._advise()}"
            )
        if self.ema is not None:
            self._check_finite_weights(self.ema.shadow_params, "averaged weights")
        return value

    def _exit_if_stopped(self):
        """Called by every process after every step: save and end if one of them has received a signal."""
        received = self._shared_signal.share(self._stop_signals.received)
        if received is not None:
            self._save_and_exit(received)

    def _save_and_exit(self, received: int):
        """Save the steps so far and end the process, after a signal."""
        self._shared_signal.finish()
        if self.global_step != self._saved_step:
            self._read_step()
            self._save_checkpoint()
        if self._background is not None:
            self._background.finish()
        name = signal.Signals(received).name
        logger.warning(f"{name}: saved up to step {self.global_step}. Go on with --resume_from_checkpoint latest.")
        self.accelerator.end_training()
        raise SystemExit(128 + received)

    def _record(self, values: dict[str, float]):
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            self.metrics_log.write({"step": self.global_step, **values})

    def _evaluate(self):
        """Validate the averaged weights, and draw samples and the loss curve."""
        self._update_evaluated_model()
        metrics = self._validate()
        value = metrics[f"validation_{self.measure}"]
        if not math.isfinite(value):
            raise FloatingPointError(
                f"Step {self.global_step}: the {self.measure} of the validation images is {value}. {self._advise()}"
            )
        self._record(metrics)
        if self.accelerator.is_main_process:
            self._draw_samples(self.folder / "samples" / f"step-{self.global_step:07d}.png")
            self.metrics_log.draw(self.folder / "loss_curve.png")
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _update_evaluated_model(self):
        averaged = trained_parameters(self.model) if self.ema is None else self.ema.shadow_params
        self._check_finite_weights(averaged, "weights to validate and save")
        pairs = zip(self.model.parameters(), self.evaluated_model.parameters())
        evaluated = [evaluated for trained, evaluated in pairs if trained.requires_grad]
        for parameter, average in zip(evaluated, averaged, strict=True):
            parameter.copy_(whole(average))
        for evaluated_buffer, buffer in zip(self.evaluated_model.buffers(), self.model.buffers()):
            evaluated_buffer.copy_(buffer)

    def _save(self) -> FlowBackPipeline:
        self._update_evaluated_model()
        if self.accelerator.is_main_process:
            if self.flow.attached_adapters:
                save_adapter(self.pipeline, self.folder, trains_class_tables(self.flow))
            else:
                save_pipeline(self.pipeline, self.folder)
            skipped = f"; skipped {len(self.skipped_files)} files that cannot be used" if self.skipped_files else ""
            kind = "adapter" if self.flow.attached_adapters else "pipeline"
            logger.info(f"Saved the {kind} in {self.folder}{skipped}.")
        self.accelerator.wait_for_everyone()
        return self.pipeline


def use_fused_steps(optimizer: torch.optim.Optimizer):
    """Make an optimizer fused whose state was loaded, and which may have been saved by another kind of steps."""
    for group in optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)


def set_learning_rates(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, step: int):
    """
    Set a schedule to a step. An optimizer that was loaded has the learning rates that it was saved with.

    Args:
        optimizer (`torch.optim.Optimizer`): With the scheduler's parameter groups.
        scheduler (`torch.optim.lr_scheduler.LambdaLR`): A function of the number of steps and nothing else.
        step (`int`): How many there were.
    """
    scheduler.last_epoch = step
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = base, base * factor(step)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def scalars_of(output: AlignedFlowOutput) -> dict[str, torch.Tensor]:
    """The output of an objective as one flat table of scalars."""
    table = {"loss": output.loss, "nll": output.nll}
    if output.alignment is not None:
        table["alignment"] = output.alignment
        for place, cosine in output.cosine_similarity.items():
            table[f"cosine_similarity/{place_name(place)}"] = cosine
    for block, growth in (output.neumann_growth or {}).items():
        table[f"neumann_growth/block{block}"] = growth
    table["max_log_scale"] = output.max_log_scale
    return {name: value.detach().float() for name, value in table.items()}
