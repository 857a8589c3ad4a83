import json


def test_it_writes_the_speed_of_every_source(benchmark_script, tmp_path):
    loader = benchmark_script("loader")
    options = "--num_images 8 --size 32 --sample_size 8 --batch_size 4 --num_workers 0 1".split()
    loader.main(loader.parse_args([*options, "--output", str(tmp_path / "loader.json")]), options)
    results = json.loads((tmp_path / "loader.json").read_text())["results"]
    cases = {(case["format"], case["source"], case["num_workers"]) for case in results["speeds"]}
    assert len(cases) == 12 and ("png", "streaming", 1) in cases
    assert all(case["images_per_second"] > 0 for case in results["speeds"])
    assert results["microseconds"]["jpeg"].keys() == {"decode", "resize", "convert", "collate", "convert later"}
    assert "| jpeg | files | 0 |" in (tmp_path / "loader.md").read_text()
