"""
Counts the parameters of every size in `training/configs` and the floating-point operations of its forward pass, with
no memory for either, and prints the table of docs/scale.md.

    python benchmarks/model_sizes.py
"""

from flow_costs import CONFIGS, count_flops, count_parameters, load_config

from flowback_hf.reporting import markdown_table


def row(name: str) -> list[str]:
    config = load_config(name)
    layers = config["num_layers"]
    size = f"{config['sample_size']}×{config['sample_size']}×{config['in_channels']}"
    return [
        f"`{name}`",
        size,
        str((config["sample_size"] // config["patch_size"]) ** 2),
        f"{config['num_blocks']} × {layers}" if isinstance(layers, int) else ", ".join(map(str, layers)),
        str(config["num_attention_heads"] * config["attention_head_dim"]),
        f"{count_parameters(config) / 1e6:,.1f} M",
        f"{count_flops(config) / 1e9:,.3f} G",
    ]


def table() -> str:
    header = ["config", "sample", "tokens", "layers in the blocks", "width", "parameters", "FLOPs per image"]
    return markdown_table(header, [row(path.stem) for path in sorted(CONFIGS.glob("*.json"))])


if __name__ == "__main__":
    print(table())
