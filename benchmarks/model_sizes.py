"""
Counts the parameters of every size in `training/configs` and the floating-point operations of its forward pass, with
no memory for either.

    python benchmarks/model_sizes.py
"""

import argparse
from typing import Any

from flow_costs import CONFIGS, count_flops, count_parameters, load_config
from reporting import add_run_arguments, write_report

from flowback_hf.reporting import markdown_table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "model_sizes.json", device=False, threads=False)
    return parser.parse_args(arguments)


def count(name: str) -> dict[str, Any]:
    config = load_config(name)
    return {
        "config": name,
        "sample": [config["sample_size"], config["sample_size"], config["in_channels"]],
        "num_tokens": (config["sample_size"] // config["patch_size"]) ** 2,
        "num_blocks": config["num_blocks"],
        "num_layers": config["num_layers"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "parameters": count_parameters(config),
        "forward_flops_per_image": count_flops(config),
    }


def table(results: list[dict[str, Any]]) -> str:
    header = ["config", "sample", "tokens", "layers in the blocks", "width", "parameters", "FLOPs per image"]
    rows = []
    for result in results:
        layers = result["num_layers"]
        rows.append(
            [
                f"`{result['config']}`",
                "×".join(map(str, result["sample"])),
                result["num_tokens"],
                f"{result['num_blocks']} × {layers}" if isinstance(layers, int) else ", ".join(map(str, layers)),
                result["width"],
                f"{result['parameters'] / 1e6:,.1f} M",
                f"{result['forward_flops_per_image'] / 1e9:,.3f} G",
            ]
        )
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None):
    args = parse_args(arguments)
    results = [count(path.stem) for path in sorted(CONFIGS.glob("*.json"))]
    print(table(results))
    write_report(args.output, arguments, "cpu", results, table(results))


if __name__ == "__main__":
    main()
