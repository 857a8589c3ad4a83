import json

import PIL.Image
import pytest
import torch

from ..pipelines.conftest import image_folder, judge, model_folder  # noqa: F401


@pytest.fixture
def options(image_folder, judge, model_folder, tmp_path):  # noqa: F811
    """The command line of a tiny measurement on noise, whose flow and judge are random."""
    (image_folder.parent / "demo.json").write_text(json.dumps({"kind": "insects"}))
    sizes = {"num_pairs": 3, "num_steps": 3, "patch_tokens": 1, "output": tmp_path / "editing.json"}
    paths = {"model": model_folder, "data_dir": image_folder.parent, "judge": judge, "pictures": tmp_path / "pictures"}
    return [part for name, value in {**sizes, **paths}.items() for part in (f"--{name}", str(value))]


def test_every_edit_is_measured_and_drawn(benchmark_script, options, tmp_path, capsys):
    benchmark_script("editing").main([*options, "--seeds", "3", "4"])
    results = json.loads((tmp_path / "editing.json").read_text())["results"]
    assert (results["data"], results["num_images"], results["guidance_scale"]) == ("insects", 12, 1.5)
    methods = {kind: {row["method"]: row for row in results[kind]} for kind in ("swaps", "variations", "maps")}
    assert {"swap_class", "swap_class, guided inversion", "new sample"} <= set(methods["swaps"])
    for row in methods["swaps"].values():
        assert 0 <= row["read_as_wanted"]["mean"] <= 1
    distances = [methods["variations"][f"vary, {strength}"]["pixel_distance"]["mean"] for strength in (0.25, 0.5, 1)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert all(0 < row["auroc"]["mean"] < 1 for row in methods["maps"].values())
    blended = next(row for row in results["interpolations"] if row["method"] == "pixels blended")
    assert blended["largest_over_mean_step"]["mean"] >= 1

    pictures = sorted((tmp_path / "pictures").iterdir())
    names = ["interpolate", "invert", "map", "swap", "vary"]
    assert [path.name for path in pictures] == [f"editing_{name}.png" for name in names]
    for path in pictures:
        darkest, brightest = PIL.Image.open(path).convert("L").getextrema()
        assert darkest < 50 and brightest == 255
    table = capsys.readouterr().out.strip()
    assert "| swap_class | " in table and table in (tmp_path / "editing.md").read_text()


def test_a_patch_is_pasted_where_the_report_says(benchmark_script, options):
    benchmark = benchmark_script("editing")
    bench = benchmark.Bench(benchmark.parse_args(options))
    pasted = benchmark.paste_patches(bench, patch_tokens=1, seed=0)
    assert pasted.is_pasted.flatten(1).sum(dim=1).tolist() == [1] * 12
    is_changed = (pasted.images != bench.pixels).any(dim=1)
    tokens = torch.nn.functional.max_pool2d(is_changed.float(), 2).bool()
    assert torch.equal(tokens, pasted.is_pasted)


def test_the_benchmark_inverts_as_the_pipeline_does(benchmark_script, options):
    benchmark = benchmark_script("editing")
    bench = benchmark.Bench(benchmark.parse_args(options))
    torch.testing.assert_close(bench.invert(), bench.pipe.invert(bench.pixels, bench.labels))
    guided = bench.generate(bench.invert(guidance_scale=1.5), bench.labels, denoise=False)  # the pipeline's guidance
    torch.testing.assert_close(guided, bench.sample, atol=1e-4, rtol=0)


def test_a_patch_that_covers_the_image_is_refused(benchmark_script, options):
    with pytest.raises(ValueError, match="`--patch_tokens` must be less than 2, the height and width"):
        benchmark_script("editing").main([*options, "--patch_tokens", "2"])
