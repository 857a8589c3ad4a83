# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""The flags of `training/train_rra.py`, and those of them that [`flowback_hf.training.Trainer`] reads."""

import argparse
from dataclasses import dataclass, fields

from flowback_hf_cli.command import add_debug_argument
from flowback_hf_cli.data import add_data_arguments, check_data_arguments
from flowback_hf_cli.numbers import COUNT, SEED, Number, check_number_fields, number_field, number_of


DESCRIPTION = """
Train a class-conditional normalizing flow with reverse representation alignment.

    accelerate launch training/train_rra.py --train_data_dir path/to/images --output_dir outputs/flow --resolution 64

The output folder then holds the pipeline (`FlowBackPipeline.from_pretrained("outputs/flow")`), `metrics.jsonl`,
`loss_curve.png`, `samples/` with a grid for each validation, `training_args.json`, and `checkpoint-*` to resume from.
"""

# Literal, because the modules that define them import torch; a test compares them.
STRATEGIES = ("none", "forward", "detach", "reverse")
PROJECTOR_TYPES = ("mlp", "conv")
POSITION_EMBEDDINGS = ("learned", "rope")
ACTIVATION_FNS = ("gelu", "swiglu")
NOISE_TYPES = ("gaussian", "uniform")
# What a scheduler may send before it ends a job. SIGTERM and SIGINT are always listened to.
SAVE_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP")
# All linear layers of a transformer layer whose activation is gelu or swiglu.
LORA_TARGET_MODULES = ("to_qkv", "to_out.0", "ff.net.0.proj", "ff.net.2")
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)


@dataclass
class TrainingArguments:
    """
    How a run is trained, logged, validated and saved. Names and defaults are those of the flags of
    `training/train_rra.py`, whose `--help` describes each.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        ```py
        >>> from flowback_hf.training import TrainingArguments

        >>> arguments = TrainingArguments(output_dir="outputs/flow", max_train_steps=1000)
        >>> arguments.train_batch_size, arguments.learning_rate
        (32, 0.0001)
        ```
    """

    output_dir: str
    train_batch_size: int = number_field(32, COUNT)
    eval_batch_size: int = number_field(32, COUNT)
    num_train_epochs: int = number_field(100, COUNT)
    max_train_steps: int | None = number_field(None, COUNT)
    gradient_accumulation_steps: int = number_field(1, COUNT)
    gradient_checkpointing: bool = False
    mixed_precision: str | None = None
    allow_tf32: bool = False
    torch_compile: bool = False
    learning_rate: float = number_field(1e-4, Number(float, at_least=0))
    scale_lr: bool = False
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = number_field(500, Number(int, at_least=0))
    adam_beta1: float = number_field(0.9, Number(float, at_least=0, below=1))
    adam_beta2: float = number_field(0.95, Number(float, at_least=0, below=1))
    adam_weight_decay: float = number_field(1e-4, Number(float, at_least=0))
    adam_epsilon: float = number_field(1e-8, Number(float, above=0))
    max_grad_norm: float = number_field(1.0, Number(float, at_least=0))
    label_dropout: float = number_field(0.1, Number(float, at_least=0, at_most=1))
    random_flip: bool = False
    shuffle_buffer_size: int | None = number_field(None, COUNT)
    dataloader_num_workers: int | None = number_field(None, Number(int, at_least=0))
    use_ema: bool = True
    ema_decay: float = number_field(0.9999, Number(float, at_least=0, below=1))
    logging_dir: str = "logs"
    seed: int = number_field(0, SEED)
    logging_steps: int = number_field(10, COUNT)
    checkpointing_steps: int = number_field(500, COUNT)
    checkpoints_total_limit: int | None = number_field(None, COUNT)
    async_checkpointing: bool = False
    ddp_timeout: int = number_field(1800, COUNT)
    resume_from_checkpoint: str | None = None
    save_on_signal: str | None = None
    validation_steps: int = number_field(500, COUNT)
    validation_class_labels: list[int | str] | None = None
    validation_guidance_scale: float = number_field(1.0, Number(float, at_least=1))
    report_to: str | None = None
    tracker_project_name: str = "flowback_hf"

    def __post_init__(self):
        check_number_fields(self)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "TrainingArguments":
        """Those of the flags that a [`~flowback_hf.training.Trainer`] reads."""
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line of `training/train_rra.py`.

    Args:
        arguments (`list[str]`, *optional*): Flags and values. Default: those of this process.
    Raises:
        SystemExit: after a message, for a wrong flag or value.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser.add_argument_group("data"))
    add_latents_arguments(parser.add_argument_group("latent flows"))
    add_loading_arguments(parser.add_argument_group("augmentation and loading"))
    add_model_arguments(parser.add_argument_group("model"))
    add_adapter_arguments(parser.add_argument_group("adapter"))
    add_alignment_arguments(parser.add_argument_group("alignment"))
    add_optimization_arguments(parser.add_argument_group("optimization"))
    run = parser.add_argument_group("run")
    add_run_arguments(run)
    add_validation_guidance_argument(
        run,
        "Guidance scale of the sample grids, and the default that the pipeline is saved with; 1.0 is off. Default: the"
        " pretrained pipeline's; 1.0 for a new flow.",
    )
    add_hub_arguments(parser.add_argument_group("publishing"))
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def add_latents_argument(group: argparse._ArgumentGroup):
    group.add_argument(
        "--latents", help="Train on a folder of latents, made by training/precompute_latents.py, instead of images."
    )


def add_latents_arguments(group: argparse._ArgumentGroup):
    add_latents_argument(group)
    group.add_argument(
        "--vae_model_name_or_path",
        help="The VAE to save with the pipeline: its id on the Hub or a folder. Default: the one that made the"
        " latents.",
    )
    group.add_argument(
        "--vae_subfolder",
        help="The folder of the VAE inside a pipeline, usually vae. Default: the VAE is a model of its own.",
    )


def add_loading_arguments(group: argparse._ArgumentGroup):
    defaults = TrainingArguments
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images at random.")
    # The defaults of these two are None, as in the settings of earlier runs, which do not name them.
    group.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="Read --dataset_name or --latents while training, instead of preparing a copy on the disk first. Needs"
        " --max_train_steps, and at least one file of training data for each process that loads them.",
    )
    group.add_argument(
        "--shuffle_buffer_size",
        type=number_of(TrainingArguments, "shuffle_buffer_size"),
        help="Rows that each process which loads a stream shuffles at a time, and holds in memory. Default: 1000.",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=number_of(TrainingArguments, "dataloader_num_workers"),
        default=defaults.dataloader_num_workers,
        help="Processes that load images, beside each training process; 0 loads in the training process. Default: 2,"
        " and 0 on a CPU.",
    )


def add_model_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="A pipeline to fine-tune: its id on the Hub or a folder. Classes that it does not know are added.",
    )
    group.add_argument(
        "--model_config",
        help="A JSON file with the model's arguments, as in training/configs, instead of the flags below.",
    )
    group.add_argument(
        "--resolution",
        type=COUNT,
        help="Resize and center-crop images to this height and width, in pixels. Default: 64.",
    )
    group.add_argument(
        "--in_channels", type=int, choices=[1, 3], help="Channels of the images: 1 for grey, 3 for RGB. Default: 3."
    )
    group.add_argument("--patch_size", type=COUNT, help="Height and width of a token, in pixels. Default: 4.")
    group.add_argument("--num_blocks", type=COUNT, help="Flow blocks. Default: 8.")
    group.add_argument(
        "--num_layers",
        type=COUNT,
        nargs="+",
        help="Transformer layers in each flow block: one number for all, or one for each from the image side."
        " Default: 8.",
    )
    group.add_argument("--num_attention_heads", type=COUNT, help="Attention heads. Default: 16.")
    group.add_argument(
        "--attention_head_dim",
        type=COUNT,
        help="Width of an attention head. The model is heads times this wide. Default: 64.",
    )
    group.add_argument(
        "--position_embedding", choices=POSITION_EMBEDDINGS, help="How tokens know their positions. Default: learned."
    )
    group.add_argument(
        "--activation_fn", choices=ACTIVATION_FNS, help="The activation of the feed-forward layers. Default: gelu."
    )
    group.add_argument(
        "--noise_std",
        type=Number(float, at_least=0),
        help="Standard deviation of the Gaussian noise added to the data; images are in [-1, 1]. Default: 0.05.",
    )
    group.add_argument(
        "--noise_type",
        choices=NOISE_TYPES,
        help="The noise added to the data: uniform dequantizes 8-bit pixels and trains a density model. Default:"
        " gaussian.",
    )


def add_adapter_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--lora_rank",
        type=COUNT,
        help="Train a LoRA adapter of this rank and leave the pretrained flow as it is. Default: train the flow"
        " itself.",
    )
    group.add_argument(
        "--lora_alpha",
        type=Number(float, above=0),
        help="What the adapter adds is multiplied by this, divided by the rank. Default: the rank.",
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        help="The linear layers that get an adapter, by the last parts of their names. Queries, keys and values are"
        f" one layer, to_qkv. Default: {' '.join(LORA_TARGET_MODULES)}.",
    )
    group.add_argument(
        "--lora_train_class_embed",
        action="store_true",
        default=None,  # as in the settings of earlier runs, which do not name it
        help="Also train the tables of class embeddings, which new classes need, and save them beside the adapter.",
    )


def add_alignment_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--alignment",
        choices=STRATEGIES,
        default="reverse",
        help="Where the gradient of the alignment goes: forward, through the likelihood pass, to the aligned block and"
        " those nearer the image; detach, to the aligned block only; reverse, through the generative pass, to the"
        " aligned block and those nearer the noise. none trains without a teacher. Default: %(default)s.",
    )
    group.add_argument(
        "--teacher_model_name_or_path",
        help="The vision encoder to align with, DINOv2, CLIP, SigLIP, ViT-MAE or ConvNeXt V2: its id on the Hub or a"
        " folder. Default: facebook/dinov2-base.",
    )
    group.add_argument(
        "--teacher_features",
        help="Read the teacher's features from a folder, made by training/precompute_features.py, instead of running"
        " a teacher.",
    )
    group.add_argument(
        "--alignment_blocks",
        type=COUNT,
        nargs="+",
        help="Flow blocks to align, counted from 1 at the image. Default: the last two.",
    )
    group.add_argument(
        "--alignment_layer",
        type=COUNT,
        help="Layer to align in each of these blocks, counted from 1. Default: three quarters up the block.",
    )
    group.add_argument(
        "--alignment_weight",
        type=Number(float, at_least=0),
        default=0.1,
        help="Weight of the alignment in the loss. Default: %(default)s.",
    )
    group.add_argument(
        "--alignment_order",
        type=order_type,
        help="Terms after the first of the series that is the gradient of --alignment reverse: 0, 1, 2, ... or exact,"
        " which is the slowest. Default: 0.",
    )
    group.add_argument(
        "--projector_dim", type=COUNT, default=1024, help="Hidden width of MLP projectors. Default: %(default)s."
    )
    group.add_argument(
        "--projector_type",
        choices=PROJECTOR_TYPES,
        default="conv",
        help="The network that maps hidden states to the teacher's features: conv, a convolution of 3x3 tokens, or"
        " mlp, three layers on each token, as in the paper. Default: %(default)s.",
    )
    group.add_argument(
        "--normalize_teacher_features",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Standardize the teacher's features over the patches of each image, so that only differences between"
        " patches count. The paper does not. Default: %(default)s.",
    )


def order_type(text: str) -> int | str:
    if text != "exact" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be 0, 1, 2, ... or exact, but is {text!r}")
    return text if text == "exact" else int(text)


def add_optimization_arguments(group: argparse._ArgumentGroup):
    defaults = TrainingArguments

    def add(name: str, help: str, **options):
        number = number_of(defaults, name)
        options |= {} if number is None else {"type": number}
        group.add_argument(
            f"--{name}", default=getattr(defaults, name), help=f"{help} Default: %(default)s.", **options
        )

    add("train_batch_size", "Images per process and batch.")
    add("eval_batch_size", "Validation images per process and batch.")
    add("num_train_epochs", "Passes over the training images, if --max_train_steps is not given.")
    group.add_argument(
        "--max_train_steps",
        type=number_of(TrainingArguments, "max_train_steps"),
        help="Optimizer steps. Default: what --num_train_epochs make.",
    )
    add("gradient_accumulation_steps", "Batches whose gradients are summed up to one optimizer step.")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Keep the inputs of the layers only and compute the rest again: less memory, a third more time.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="The precision of matrix products. Default: as configured in Accelerate.",
    )
    group.add_argument(
        "--allow_tf32", action="store_true", help="Let NVIDIA GPUs round the factors of float32 products to TF32."
    )
    group.add_argument(
        "--torch_compile",
        action="store_true",
        help="Compile the transformer layers. For an aligned flow, a few steps are timed with all layers compiled and"
        " with some, and the faster is kept.",
    )
    add("learning_rate", "Largest learning rate, reached after the warm-up.")
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by the number of images per optimizer step, of all processes together.",
    )
    add("lr_scheduler", "How the learning rate falls after the warm-up.", choices=LR_SCHEDULERS)
    add("lr_warmup_steps", "Optimizer steps over which the learning rate grows from 0.")
    add("adam_beta1", "AdamW's decay of the gradient's mean.")
    add("adam_beta2", "AdamW's decay of the squared gradient's mean.")
    add("adam_weight_decay", "AdamW's weight decay.")
    add("adam_epsilon", "AdamW's epsilon, added to the denominator.")
    add("max_grad_norm", "Clip the norm of all gradients together to this; 0 does not clip.")
    add("label_dropout", "Share of the labels that are replaced by no class, which guidance needs.")
    add(
        "use_ema",
        "Average the weights exponentially, and validate and save the average.",
        action=argparse.BooleanOptionalAction,
    )
    add("ema_decay", "Largest decay of that average, per optimizer step.")


def add_validation_guidance_argument(group: argparse._ArgumentGroup, help: str):
    """Add the flag of the sample grids' guidance. What it is by default is decided later, and `help` says how."""
    group.add_argument(
        "--validation_guidance_scale", type=number_of(TrainingArguments, "validation_guidance_scale"), help=help
    )


def add_run_arguments(group: argparse._ArgumentGroup):
    defaults = TrainingArguments
    group.add_argument("--output_dir", required=True, help="The folder to write everything to.")
    group.add_argument(
        "--logging_dir",
        default=defaults.logging_dir,
        help="The folder of the trackers' logs, inside the output folder. Default: %(default)s.",
    )
    group.add_argument(
        "--seed",
        type=number_of(TrainingArguments, "seed"),
        default=defaults.seed,
        help="Seed of the initial weights, the order of the images, the noise and what is held out. Default:"
        " %(default)s.",
    )
    group.add_argument(
        "--logging_steps",
        type=number_of(TrainingArguments, "logging_steps"),
        default=defaults.logging_steps,
        help="Optimizer steps between two lines in metrics.jsonl. Default: %(default)s.",
    )
    group.add_argument(
        "--checkpointing_steps",
        type=number_of(TrainingArguments, "checkpointing_steps"),
        default=defaults.checkpointing_steps,
        help="Optimizer steps between two checkpoints. Default: %(default)s.",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=number_of(TrainingArguments, "checkpoints_total_limit"),
        help="Keep this many checkpoints, and the last one whose weights were good; older ones are deleted once a new"
        " one is safe. Default: keep all.",
    )
    group.add_argument(
        "--async_checkpointing",
        action="store_true",
        help="Write checkpoints while training goes on, from a copy in the memory of the host: 16 bytes per parameter,"
        " all of them in the main process or, with FSDP, each process its share. Default: training waits.",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        help="Go on from a checkpoint of the output folder: its name, or latest. The number of processes may be"
        " another one if each step takes as many images as before. With another --learning_rate, --lr_warmup_steps or"
        " --max_grad_norm, a new branch of the run starts there. Default: start a new run.",
    )
    group.add_argument(
        "--save_on_signal",
        choices=SAVE_SIGNALS,
        help="Save a checkpoint and end the run on this signal, too, as on SIGTERM and SIGINT: at the end of the"
        " running step, with exit code 128 plus the signal's number. Default: only on those two.",
    )
    group.add_argument(
        "--ddp_timeout",
        type=number_of(TrainingArguments, "ddp_timeout"),
        default=defaults.ddp_timeout,
        help="Seconds that a process waits for the others before the run ends with an error: longer than the main"
        " process takes to draw the samples of a validation. Default: %(default)s.",
    )
    group.add_argument(
        "--validation_steps",
        type=number_of(TrainingArguments, "validation_steps"),
        default=defaults.validation_steps,
        help="Optimizer steps between two validations. Default: %(default)s.",
    )
    group.add_argument(
        "--validation_class_labels",
        nargs="+",
        help="Classes of the sample grids, by name or number; name:7 and id:7 say which is meant. Default: the first"
        " ten.",
    )
    group.add_argument(
        "--report_to",
        help="A tracker to log to beside metrics.jsonl: tensorboard, wandb, another of Accelerate's, or all that are"
        " installed. Default: none.",
    )
    group.add_argument(
        "--tracker_project_name",
        default=defaults.tracker_project_name,
        help="The project's name in the tracker. Default: %(default)s.",
    )
    add_debug_argument(group)


def add_hub_arguments(group: argparse._ArgumentGroup):
    group.add_argument(
        "--push_to_hub", action="store_true", help="Publish the pipeline with a model card when training ends."
    )
    group.add_argument("--hub_model_id", help="The repository to publish to. Default: the output folder's name.")
    group.add_argument(
        "--hub_token",
        help="The token to publish with; it is not written anywhere. Default: that of `hf auth login` or HF_TOKEN.",
    )
    group.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End with an error for flags that contradict each other."""
    check_data_arguments(parser, args)
    check_streaming_arguments(parser, args)
    check_adapter_arguments(parser, args)
    if args.streaming and args.teacher_features is not None:
        parser.error("--teacher_features belong to rows that have numbers: leave them out with --streaming.")
    if args.latents is None and (args.vae_model_name_or_path or args.vae_subfolder):
        parser.error("--vae_model_name_or_path and --vae_subfolder belong to --latents.")
    if args.latents is not None and args.teacher_features is not None:
        parser.error("--latents hold their own features: leave --teacher_features out.")
    if args.teacher_features is not None and (args.teacher_model_name_or_path or args.alignment == "none"):
        parser.error("--teacher_features take the place of --teacher_model_name_or_path, and --alignment needs them.")


def check_streaming_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End with an error for flags that a stream does not know, and for a stream whose end nobody knows."""
    if not args.streaming:
        if args.shuffle_buffer_size is not None:
            parser.error("--shuffle_buffer_size belongs to --streaming.")
        return
    if args.train_data_dir is not None:
        parser.error(
            "--streaming reads --dataset_name or --latents. Images of a folder are never copied: leave it out."
        )
    if args.max_train_samples is not None:
        parser.error("--max_train_samples draws images at random, which --streaming cannot: leave one of them out.")
    if args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps: how many images an epoch has is not known before its end.")


def check_adapter_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """End with an error for adapter flags without an adapter, and for an adapter without a pretrained flow."""
    if args.lora_rank is None:
        if args.lora_alpha is not None or args.lora_target_modules or args.lora_train_class_embed:
            parser.error("--lora_alpha, --lora_target_modules and --lora_train_class_embed belong to --lora_rank.")
        return
    if args.pretrained_model_name_or_path is None:
        parser.error("--lora_rank needs a flow to start from: give --pretrained_model_name_or_path.")
    if args.push_to_hub:
        parser.error(
            "--push_to_hub publishes a whole flow: leave it out with --lora_rank, and upload the adapter's files with"
            " `hf upload`."
        )
