import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flowback_hf import FlowBackPipeline
from flowback_hf.conversion import convert_tarflow_checkpoint, labels_of_known_data, load_tarflow_checkpoint

from .stand_in_hub import Repository


SCRIPT = Path(__file__).parents[1] / "pipelines" / "convert_tarflow.py"
NOISE_STD = 0.07
WIDTH = 128  # two heads of 64


def make_checkpoint(num_classes, layers=(1, 2, 1), sample_size=8, patch_size=2, in_channels=3, seed=0):
    """A checkpoint in the original's format, with random weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, token_dim = (sample_size // patch_size) ** 2, in_channels * patch_size**2

    def linear(name, rows, columns, scale=1.0):
        weight = scale * torch.randn(rows, columns, generator=generator) / columns**0.5
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(rows, generator=generator)}

    def norm(name):
        weight = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(WIDTH, generator=generator)}

    checkpoint = {"var": torch.ones(num_tokens, token_dim)}
    for i, num_layers in enumerate(layers):
        checkpoint |= linear(f"blocks.{i}.proj_in", WIDTH, token_dim)
        checkpoint[f"blocks.{i}.pos_embed"] = 0.5 * torch.randn(num_tokens, WIDTH, generator=generator)
        if num_classes is not None:
            checkpoint[f"blocks.{i}.class_embed"] = torch.randn(num_classes, 1, WIDTH, generator=generator)
        for j in range(num_layers):
            layer = f"blocks.{i}.attn_blocks.{j}"
            checkpoint |= norm(f"{layer}.attention.norm")
            checkpoint |= linear(f"{layer}.attention.qkv", 3 * WIDTH, WIDTH)
            checkpoint |= linear(f"{layer}.attention.proj", WIDTH, WIDTH)
            checkpoint |= norm(f"{layer}.mlp.norm")
            checkpoint |= linear(f"{layer}.mlp.main.0", 4 * WIDTH, WIDTH)
            checkpoint |= linear(f"{layer}.mlp.main.2", WIDTH, 4 * WIDTH)
        checkpoint |= linear(f"blocks.{i}.proj_out", 2 * token_dim, WIDTH, scale=0.1)
        checkpoint[f"blocks.{i}.attn_mask"] = torch.ones(num_tokens, num_tokens).tril()
    return checkpoint


class Original:
    """The original's arithmetic in float32 on a checkpoint's own names, as far as the format's facts define it."""

    def __init__(self, checkpoint, patch_size):
        self.checkpoint, self.patch_size = checkpoint, patch_size
        names = [name.split(".") for name in checkpoint if name.startswith("blocks.")]
        self.num_blocks = 1 + max(int(name[1]) for name in names)
        self.layers = [
            {int(name[3]) for name in names if name[1] == str(i) and name[2] == "attn_blocks"}
            for i in range(self.num_blocks)
        ]

    def linear(self, name, inputs):
        return F.linear(inputs, self.checkpoint[f"{name}.weight"], self.checkpoint[f"{name}.bias"])

    def norm(self, name, inputs):
        weight, bias = self.checkpoint[f"{name}.weight"], self.checkpoint[f"{name}.bias"]
        return F.layer_norm(inputs, (WIDTH,), weight, bias, eps=1e-5)

    def attention(self, name, inputs, temperature):
        batch_size, num_tokens, _ = inputs.shape
        qkv = self.linear(f"{name}.qkv", self.norm(f"{name}.norm", inputs))
        query, key, value = qkv.view(batch_size, num_tokens, 3, WIDTH // 64, 64).permute(2, 0, 3, 1, 4)
        logits = query @ key.transpose(2, 3) / math.sqrt(64) / temperature
        logits = logits.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.proj", (logits.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def predict(self, i, tokens, class_labels, temperature=1.0):
        """Log-scales and shifts of all tokens, in the block's order; `tokens` may be only the first ones."""
        positions = self.checkpoint[f"blocks.{i}.pos_embed"]
        positions = positions.flip(0) if i % 2 == 1 else positions
        hidden = self.linear(f"blocks.{i}.proj_in", tokens) + positions[: tokens.shape[1]]
        table = self.checkpoint.get(f"blocks.{i}.class_embed")
        if table is not None:
            hidden = hidden + (table.mean(0) if class_labels is None else table[class_labels])
        for j in sorted(self.layers[i]):
            layer = f"blocks.{i}.attn_blocks.{j}"
            hidden = hidden + self.attention(f"{layer}.attention", hidden, temperature)
            inner = F.gelu(self.linear(f"{layer}.mlp.main.0", self.norm(f"{layer}.mlp.norm", hidden)))
            hidden = hidden + self.linear(f"{layer}.mlp.main.2", inner)
        output = self.linear(f"blocks.{i}.proj_out", hidden)
        output = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
        return output.chunk(2, dim=-1)

    def encode(self, images, class_labels):
        """Latents, and the log-determinant per dimension."""
        tokens = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        log_det = torch.zeros(len(images))
        for i in range(self.num_blocks):
            tokens = tokens.flip(1) if i % 2 == 1 else tokens
            log_scale, shift = self.predict(i, tokens, class_labels)
            tokens = (tokens - shift) * (-log_scale).exp()
            tokens = tokens.flip(1) if i % 2 == 1 else tokens
            log_det = log_det - log_scale.mean((1, 2))
        return self.fold(tokens, images.shape[-1]), log_det

    def sample(self, latents, class_labels, guidance, annealed, attn_temp):
        tokens = F.unfold(latents, self.patch_size, stride=self.patch_size).transpose(1, 2)
        num_tokens = tokens.shape[1]
        for i in reversed(range(self.num_blocks)):
            noise = tokens.flip(1) if i % 2 == 1 else tokens
            data = noise[:, :1]
            for k in range(1, num_tokens):
                # one token more, whose prediction is the last
                padded = torch.cat([data, torch.zeros_like(data[:, :1])], dim=1)
                log_scale, shift = (output[:, -1] for output in self.predict(i, padded, class_labels))
                if guidance > 0:
                    weak_scale, weak_shift = (out[:, -1] for out in self.predict(i, padded, None, attn_temp))
                    weight = guidance * k / (num_tokens - 1) if annealed else guidance
                    log_scale = log_scale + weight * (log_scale - weak_scale)
                    shift = shift + weight * (shift - weak_shift)
                data = torch.cat([data, (shift + log_scale.exp() * noise[:, k])[:, None]], dim=1)
            tokens = data.flip(1) if i % 2 == 1 else data
        return self.fold(tokens, latents.shape[-1])

    def fold(self, tokens, size):
        return F.fold(tokens.transpose(1, 2), size, self.patch_size, stride=self.patch_size)


def assert_agree(actual, original):
    assert ((actual - original).abs() <= 1e-5 * original.abs().clamp(min=1)).all(), (actual - original).abs().max()


SHAPES = {"patch-2": (8, 2, 3), "patch-1": (4, 1, 12), "patch-4": (16, 4, 3)}


@pytest.mark.parametrize("num_classes", [None, 3], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("sample_size, patch_size, in_channels", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_latents_and_log_determinants_are_the_originals(num_classes, sample_size, patch_size, in_channels):
    checkpoint = make_checkpoint(num_classes, (1, 2, 1), sample_size, patch_size, in_channels)
    model = convert_tarflow_checkpoint(checkpoint, sample_size, NOISE_STD, in_channels)
    images = torch.randn(2, in_channels, sample_size, sample_size, generator=torch.Generator().manual_seed(1))
    for class_labels in (None,) if num_classes is None else (None, torch.tensor([2, 0])):
        latents, log_det = Original(checkpoint, patch_size).encode(images, class_labels)
        output = model(images, class_labels)
        assert (latents - images).abs().max() > 0.1 and log_det.abs().max() > 1e-3
        assert_agree(output.sample, latents)
        assert_agree(output.log_abs_det / images[0].numel(), log_det)


@pytest.mark.parametrize("num_classes", [None, 3], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("guidance, attn_temp", [(0.0, 1.0), (1.5, 1.0), (1.5, 0.8)])
@torch.no_grad()
def test_guided_samples_are_the_originals(num_classes, annealed, guidance, attn_temp):
    if num_classes is None and guidance > 0 and attn_temp == 1.0:
        pytest.skip("an unconditional flow is guided by its temperature only")
    checkpoint = make_checkpoint(num_classes)
    model = convert_tarflow_checkpoint(checkpoint, 8, NOISE_STD)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    class_labels = None if num_classes is None else torch.tensor([2, 0])
    expected = Original(checkpoint, 2).sample(latents, class_labels, guidance, annealed, attn_temp)
    actual = model(
        latents,
        class_labels,
        inverse=True,
        guidance_scale=1 + guidance,
        guidance_schedule="linear" if annealed else "constant",
        guidance_temperature=attn_temp,
    ).sample
    assert (expected - latents).abs().max() > 0.1
    assert_agree(actual, expected)


def test_the_architecture_is_read_off_the_tensors():
    config = convert_tarflow_checkpoint(make_checkpoint(3), 8, NOISE_STD).config
    expected = {
        "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_blocks": 3, "num_layers": [1, 2, 1],
        "num_attention_heads": 2, "attention_head_dim": 64, "mlp_ratio": 4.0, "num_classes": 3, "noise_std": NOISE_STD,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    even = convert_tarflow_checkpoint(make_checkpoint(None, (2, 2)), 8, NOISE_STD).config
    assert even.num_layers == 2 and even.num_classes is None


def test_labels_of_known_data():
    assert labels_of_known_data(3) == {0: "cat", 1: "dog", 2: "wild"}
    imagenet = labels_of_known_data(1000)
    assert len(imagenet) == 1000
    assert [imagenet[label].split(", ")[0] for label in (0, 1, 207, 999)] == [
        "tench", "goldfish", "golden retriever", "toilet tissue",
    ]  # fmt: skip
    assert labels_of_known_data(7) is None and labels_of_known_data(None) is None


# Bad checkpoints


def without(checkpoint, name):
    return {key: tensor for key, tensor in checkpoint.items() if key != name}


def volume_preserving(checkpoint):
    changed = {name: tensor[:12] for name, tensor in checkpoint.items() if "proj_out" in name}
    return {**checkpoint, **changed}


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: {**c, "blocks.1.extra": torch.zeros(1)}, "none are missing and blocks.1.extra are unexpected"),
        (lambda c: without(c, "blocks.2.pos_embed"), "but blocks.2.pos_embed are missing and none are unexpected"),
        (lambda c: without(c, "blocks.1.class_embed"), "but blocks.1.class_embed are missing"),
        (lambda c: without(c, "var"), "but var are missing"),
        (lambda c: {f"module.{k}": v for k, v in c.items()}, "is not an original TARFlow: .* blocks.0.proj_in.weight"),
        (lambda c: {**c, "var": torch.full((16, 12), 0.5)}, "`var`.* must be ones, .* lies between 0.5 and 0.5"),
        (lambda c: {**c, "var": torch.ones(16, 3)}, r"var \(16, 3\) for \(16, 12\)"),
        (
            lambda c: {**c, "blocks.1.pos_embed": torch.ones(9, WIDTH)},
            r"blocks.1.pos_embed \(9, 128\) for \(16, 128\)",
        ),
        (volume_preserving, "is a volume-preserving flow, whose output has 12 shifts and no log-scales"),
    ],
)
def test_a_checkpoint_that_is_no_original_flow_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        convert_tarflow_checkpoint(change(make_checkpoint(3)), 8, NOISE_STD)


@pytest.mark.parametrize(
    "sample_size, in_channels, match",
    [
        (
            10,
            3,
            "`sample_size` must be a multiple of the side of a square grid of the checkpoint's 16 tokens, .* is 10",
        ),
        (8, 1, "`in_channels` 1 contradicts the checkpoint: .* are 2x2, which makes 4 values each, but they have 12"),
        (
            16,
            3,
            "`in_channels` 3 contradicts the checkpoint: .* are 4x4, which makes 48 values each, but they have 12",
        ),
    ],
)
def test_sizes_that_contradict_the_checkpoint_are_refused(sample_size, in_channels, match):
    with pytest.raises(ValueError, match=match):
        convert_tarflow_checkpoint(make_checkpoint(3), sample_size, NOISE_STD, in_channels)


# The script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_tarflow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_line(tmp_path, **options):
    options = {"checkpoint": tmp_path / "flow.pth", "output_dir": tmp_path / "out", "sample_size": 8,
               "noise_std": NOISE_STD, **options}  # fmt: skip
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_the_command_writes_a_pipeline(script, tmp_path, capsys):
    checkpoint = make_checkpoint(3)
    torch.save(checkpoint, tmp_path / "flow.pth")
    (tmp_path / "out").mkdir()  # an empty folder will do
    script.main(script.parse_args(command_line(tmp_path)))
    assert "3 blocks of [1, 2, 1] layers, width 128, patch 2, 3 classes" in capsys.readouterr().out
    pipeline = FlowBackPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.labels == {"cat": 0, "dog": 1, "wild": 2} and pipeline.transformer.config.noise_std == NOISE_STD
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents, _ = Original(checkpoint, 2).encode(images, torch.tensor([1]))
        assert_agree(pipeline.transformer(images, torch.tensor([1])).sample, latents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flow.pth", "out"]


def wrapped(checkpoint):
    return {"epoch": 3, "state_dict": {"model": checkpoint}, "optimizer": {"state": {}}}


def prefixed(checkpoint):
    return {f"module._orig_mod.{name}": tensor for name, tensor in checkpoint.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda checkpoint: {"state_dict": checkpoint, "epoch": 3},
        lambda checkpoint: {"model": checkpoint},
        wrapped,
        lambda checkpoint: {f"module.{name}": tensor for name, tensor in checkpoint.items()},
        lambda checkpoint: {f"_orig_mod.{name}": tensor for name, tensor in checkpoint.items()},
        prefixed,
        lambda checkpoint: wrapped(prefixed(checkpoint)),
    ],
    ids=["state_dict", "model", "nested", "module", "_orig_mod", "both prefixes", "everything"],
)
def test_what_trainers_put_around_the_weights_is_removed(tmp_path, wrap):
    checkpoint = make_checkpoint(3, (1,))
    torch.save(wrap(checkpoint), tmp_path / "flow.pth")
    assert_same_tensors(load_tarflow_checkpoint(tmp_path / "flow.pth"), checkpoint)


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_prefix_of_some_names_only_is_kept(tmp_path):
    checkpoint = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(checkpoint, tmp_path / "flow.pth")
    assert load_tarflow_checkpoint(tmp_path / "flow.pth").keys() == checkpoint.keys()


def test_a_safetensors_file(script, tmp_path):
    checkpoint = make_checkpoint(3, (1,))
    save_file(prefixed(checkpoint), tmp_path / "flow.safetensors")
    assert_same_tensors(load_tarflow_checkpoint(tmp_path / "flow.safetensors"), checkpoint)
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "flow.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="`checkpoint` '.*damaged.safetensors' was not loaded: "):
        load_tarflow_checkpoint(tmp_path / "damaged.safetensors")


def test_a_file_on_the_hub(script, the_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(make_checkpoint(3, (1,)), tmp_path / "flow.pth")
    repository = the_hub.repositories["group/tarflow"] = Repository()
    repository.files["models/afhq_0.07.pth"] = (tmp_path / "flow.pth").read_bytes()
    script.main(script.parse_args(command_line(tmp_path, checkpoint="group/tarflow:models/afhq_0.07.pth")))
    assert FlowBackPipeline.from_pretrained(tmp_path / "out").labels == {"cat": 0, "dog": 1, "wild": 2}
    for name in ("group/tarflow:other.pth", "group/nothing:flow.pth"):
        with pytest.raises(ValueError, match=f"`checkpoint` '{name}' was not found on the Hub: "):
            load_tarflow_checkpoint(name)
    # a file that is there is not looked for on the Hub
    (tmp_path / "group").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "group" / "tarflow:models")
    assert load_tarflow_checkpoint("group/tarflow:models").keys() == {"a"}


def test_names_from_a_file(script, tmp_path):
    torch.save(make_checkpoint(2, (1,)), tmp_path / "flow.pth")
    (tmp_path / "names.json").write_text(json.dumps({"0": "ant", "1": "bee"}))
    script.main(script.parse_args(command_line(tmp_path, id2label=tmp_path / "names.json")))
    assert FlowBackPipeline.from_pretrained(tmp_path / "out").labels == {"ant": 0, "bee": 1}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_malicious(path):
    torch.save({"var": Malicious(path.with_name("pwned"))}, path)


def write_truncated(path):
    torch.save(make_checkpoint(3), path)
    path.write_bytes(path.read_bytes()[:50_000])


@pytest.mark.parametrize(
    "write, match",
    [
        (write_malicious, "was not loaded: it is damaged, or holds objects that may run code when they are read"),
        (write_truncated, "was not loaded: it is truncated, or not a PyTorch file"),
        (lambda path: path.write_bytes(b""), "was not loaded: it is truncated"),
        (lambda path: path.write_text("not a checkpoint"), "was not loaded"),
        (lambda path: torch.save({"net": {"a": torch.ones(1)}}, path), r"but holds other things under \['net'\]"),
        (lambda path: torch.save({"model": {"args": None}}, path), r"but holds other things under \['args'\]"),
        (lambda path: torch.save(torch.ones(1), path), "but holds a Tensor"),
        (lambda path: torch.save({**make_checkpoint(3), "extra": torch.ones(1)}, path), "and extra are unexpected"),
        (lambda path: None, "`checkpoint` must be an existing file"),
    ],
)
def test_a_bad_file_is_refused_and_nothing_written(script, tmp_path, write, match):
    write(tmp_path / "flow.pth")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match) as error:
        script.main(script.parse_args(command_line(tmp_path)))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "names, match",
    [
        ('{"0": "ant"}', "`--id2label` must name the checkpoint's 3 classes, numbered from 0, but names 1"),
        ('["ant"]', "`--id2label` must be a JSON file of class names by number"),
        ("ant", "`--id2label` must be a JSON file of class names by number"),
    ],
)
def test_bad_names_are_refused(script, tmp_path, names, match):
    torch.save(make_checkpoint(3, (1,)), tmp_path / "flow.pth")
    (tmp_path / "names.json").write_text(names)
    with pytest.raises(ValueError, match=match):
        script.main(script.parse_args(command_line(tmp_path, id2label=tmp_path / "names.json")))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(script, tmp_path):
    torch.save(make_checkpoint(3, (1,)), tmp_path / "flow.pth")
    with pytest.raises(ValueError, match="`--output_dir` must be a new or an empty folder"):
        script.main(script.parse_args(command_line(tmp_path, output_dir=tmp_path)))


def test_the_reader_takes_nothing_but_tensors(tmp_path):
    write_malicious(tmp_path / "flow.pth")
    with pytest.raises(ValueError):
        load_tarflow_checkpoint(tmp_path / "flow.pth")
    assert not (tmp_path / "pwned").exists()
