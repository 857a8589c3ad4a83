import argparse
import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import BitImageProcessorPil, Dinov2Model, ResNetConfig, ResNetForImageClassification

from flowback_hf import FlowBackPipeline
from flowback_hf.ablation import (
    Cell,
    Runner,
    Variant,
    command_line,
    estimate,
    make_cells,
    make_variants,
    markdown,
    read_grid,
    read_settings,
    resolve_blocks,
    resolve_layer,
    summarise,
)
from flowback_hf.ablation.report import draw_speed_ups, format_figure, legend_entry
from flowback_hf.ablation.runner import error_message, save_checkpoint_pipeline
from flowback_hf.data import DataSource, HoldOut
from flowback_hf.files import read_json_lines

from ..conftest import load_script


REPOSITORY = Path(__file__).parents[2]


SETTINGS = {
    "train": {
        "resolution": 8,
        "patch_size": 2,
        "num_blocks": 3,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "projector_dim": 8,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "logging_steps": 1,
        "validation_steps": 2,
        "checkpointing_steps": 2,
    },
    "evaluate": {
        "methods": ["gradient"],
        "num_samples": 6,
        "guidance_scales": [1.0, 2.0],
        "linear_probe": True,
        "batch_size": 4,
    },
    "checkpoint_guidance_scale": 2.0,
}
FAILING_WEIGHT = 1e39  # overflows float32


@pytest.fixture(scope="module")
def ablate():
    return load_script(REPOSITORY / "training" / "ablate.py")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", id2label={0: "dog", 1: "cat"}
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture
def line(images, teacher, judge, tmp_path):
    """The command line of a tiny grid, its files written, as a function of them and of further options."""

    def build(grid, settings=SETTINGS, /, **options) -> list[str]:
        for name, content in {"grid": grid, "settings": settings}.items():
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        options = {
            "grid": tmp_path / "grid.json",
            "settings": tmp_path / "settings.json",
            "data_dir": images,
            "teacher": teacher,
            "judge": judge,
            "output_dir": tmp_path / "out",
            **options,
        }
        parts = []
        for name, value in options.items():
            if value is not None:
                parts += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
        return parts

    return build


@pytest.fixture
def in_process(monkeypatch):
    """Runs the scripts in this process, which has imported what a new one would import for seconds each time."""

    def run(self, command, log_file):
        script = load_script(Path(command[1]))
        AcceleratorState._reset_state(reset_partial_state=True)
        log_file.touch()
        try:
            args = script.parse_args(command[2:])
            script.main(args, *([command[2:]] if command[1].endswith("evaluate_flow.py") else []))
        except Exception:
            log_file.write_text(traceback.format_exc())
            return 1
        return 0

    monkeypatch.setattr(Runner, "run", run)


def variants_of(args: argparse.Namespace) -> dict[str, Variant]:
    source = DataSource("--data_dir", str(args.data_dir), True)
    settings = read_settings(args.settings)
    encoders = (args.teacher, args.judge, args.output_dir, args.other_teacher)
    return make_variants(read_grid(args.grid), settings, source, *encoders)


def run(ablate, line, *options):
    ablate.main(ablate.parse_args([*line, *options]))


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


# Runs


def test_a_grid_that_is_ended_goes_on_and_a_failing_cell_is_a_row(ablate, line, tmp_path, capsys):
    settings = {name: value for name, value in SETTINGS.items() if name != "checkpoint_guidance_scale"}
    settings["train"] = settings["train"] | {"max_train_steps": 40}
    settings["evaluate"] = settings["evaluate"] | {"linear_probe": False}
    grid = {"alignment": ["none", "detach"], "alignment_weight": [FAILING_WEIGHT], "seeds": [3]}
    command = line(grid, settings, jobs=2, threads=1)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    script = str(REPOSITORY / "training" / "ablate.py")
    process = subprocess.Popen([sys.executable, script, *command, "--variants", "none"], env=environment, **quiet)
    cell = tmp_path / "out" / "cells" / "none" / "seed-3"
    deadline = time.monotonic() + 300
    while not (cell / "flow" / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    assert not (cell / "flow" / "model_index.json").exists(), "the cell ended before it was killed"
    with (cell / "log.txt").open("a") as log:  # nobody holds it: the cell's process was ended, too
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)

    ablate.main(ablate.parse_args(command))
    printed = capsys.readouterr()
    assert "Resuming from" in (cell / "log.txt").read_text()
    steps = [record["step"] for record in read_json_lines(cell / "flow" / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, 41))
    assert "detach, seed 3, failed. train: FloatingPointError: Step 1: the loss is" in printed.out + printed.err
    results = read_results(tmp_path / "out")
    done, failed = results["cells"]
    assert (done["variant"], done["status"]) == ("none", "done") and set(done["seconds"]) == {"train", "evaluate"}
    assert (failed["variant"], failed["status"]) == ("detach", "failed") and "Step 1" in failed["error"]
    failed = results["variants"]["detach"]
    assert (failed["num_cells"], failed["num_done"]) == (1, 0) and failed["metrics"] == failed["minus_baseline"] == {}
    assert results["machine"]["threads"] == 1 and results["cell_hours"] > 0 and results["commit"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| detach | 0 |" in table and "| detach | 3 | failed | train: FloatingPointError" in table


def test_a_grid_of_teachers_from_end_to_end(ablate, in_process, line, teacher, tmp_path, capsys):
    grid = {"alignment": ["none", "reverse"], "teacher": ["given", "random"], "alignment_blocks": [[1, 3]]}
    grid |= {"alignment_order": [0], "seeds": [5]}
    # the tests' teacher is as random as the script's: another one
    model = Dinov2Model.from_pretrained(teacher)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    teacher = tmp_path / "teacher"
    model.save_pretrained(teacher)
    BitImageProcessorPil().save_pretrained(teacher)
    run(ablate, line(grid, teacher=teacher))
    output_dir = tmp_path / "out"
    # There are no factors where no variant reaches its baseline.
    assert [name for name in names(output_dir) if name != "speed_ups.png"] == [
        "cells",
        "curves.png",
        "distance_against_accuracy.png",
        "grid.json",
        "linear_probe.png",
        "random_teacher",
        "results.json",
        "results.md",
    ]
    for name in ("curves", "distance_against_accuracy", "linear_probe"):
        assert min(PIL.Image.open(output_dir / f"{name}.png").size) > 300
    variants = ["none", "reverse-given-teacher", "reverse-random-teacher"]
    assert names(output_dir / "cells") == variants

    results = read_results(output_dir)
    assert [(row["seed"], row["variant"]) for row in results["cells"]] == [(5, variant) for variant in variants]
    for row in results["cells"]:
        assert row["status"] == "done"
        assert row["curve"]["step"] == [0, 2, 4] and row["checkpoint_curve"]["step"] == [2, 4]
        evaluation = row["evaluation"]
        last = {name: values[-1] for name, values in row["checkpoint_curve"].items()}
        assert last["distance"] == evaluation["frechet_distance/guidance_2.0"]
        assert last["accuracy"] == evaluation["accuracy/gradient"] and last["nll"] == evaluation["nll"]
        assert row["checkpoint_curve"]["nll"][0] > last["nll"]
        assert row["metrics"]["accuracy_gradient"] == evaluation["accuracy/gradient"]
        probes = [evaluation[f"linear_probe/block{block}_layer2"] for block in (1, 3)]
        if row["variant"] != "none":
            assert row["places"] == [[1, 2], [3, 2]]
            assert row["metrics"]["linear_probe_aligned"] == pytest.approx(sum(probes) / 2)
        else:
            assert row["places"] == [[2, 2], [3, 2]]  # the default of training
    # another network of the same kind, and another gradient
    given, random = (Dinov2Model.from_pretrained(folder) for folder in (teacher, output_dir / "random_teacher"))
    weights = next(name for name, tensor in given.state_dict().items() if "encoder" in name and tensor.ndim == 2)
    assert not torch.equal(given.state_dict()[weights], random.state_dict()[weights])
    assert len({row["metrics"]["nll"] for row in results["cells"]}) == 3

    # distances over steps at another scale: nothing else is done again
    log = output_dir / "cells" / "none" / "seed-5" / "flow" / "metrics.jsonl"
    trained_at = log.stat().st_mtime_ns
    run(ablate, line(grid, SETTINGS | {"checkpoint_guidance_scale": 1.0}, variants="none", teacher=teacher))
    (row,) = read_results(output_dir)["cells"]
    assert row["checkpoint_curve"]["distance"][-1] == row["evaluation"]["frechet_distance/guidance_1.0"]
    assert len(row["checkpoint_curve"]["step"]) == 2 and log.stat().st_mtime_ns == trained_at
    run(ablate, line(grid, variants="none", teacher=teacher))
    capsys.readouterr()

    # a checkpoint's pipeline has its averaged weights: the last one's are the run's
    cell = output_dir / "cells" / "none" / "seed-5"
    variant = Variant("none", {}, {"data_dir": "images"}, 2.0)
    save_checkpoint_pipeline(Cell(variant, 5, cell), cell / "flow" / "checkpoint-4")
    whole, last, earlier = (
        FlowBackPipeline.from_pretrained(folder).transformer.blocks[0].proj_in.weight
        for folder in (cell / "flow", cell / "checkpoints/checkpoint-4/flow", cell / "checkpoints/checkpoint-2/flow")
    )
    assert torch.equal(whole, last) and not torch.equal(whole, earlier)

    # more seeds of a part; what is finished is left alone
    before = {path: path.stat().st_mtime_ns for path in (output_dir / "cells").rglob("*/seed-5/**/*")}
    run(ablate, line(grid, seeds=[5, 6], variants="none", teacher=teacher))
    assert {path: path.stat().st_mtime_ns for path in (output_dir / "cells").rglob("*/seed-5/**/*")} == before
    assert "none, seed 5: done\nnone, seed 6: to be run\n" in capsys.readouterr().out
    results = read_results(output_dir)
    values = [row["metrics"]["nll"] for row in results["cells"]]
    nll = results["variants"]["none"]["metrics"]["nll"]
    assert nll["mean"] == pytest.approx(sum(values) / 2) and nll["num_seeds"] == 2
    assert nll["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2) and values[0] != values[1]

    # bad input: the folder is in use
    with pytest.raises(ValueError, match="holds another grid's cells .*grid.json.*: choose another folder"):
        run(ablate, line({"alignment": ["none"], "seeds": [5]}))
    other = SETTINGS | {"train": SETTINGS["train"] | {"learning_rate": 0.5}}
    with pytest.raises(ValueError, match=r"none/seed-5 ran with another config: learning_rate \(0.01 then, 0.5 now\)"):
        run(ablate, line(grid, other, teacher=teacher))
    with (cell / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="none/seed-5 is being run by another process: wait for it, or end it"):
            run(ablate, line(grid, teacher=teacher))
    (output_dir / "grid.json").unlink()
    with pytest.raises(ValueError, match="holds cells without their grid"):
        run(ablate, line(grid))
    assert {path: path.stat().st_mtime_ns for path in (output_dir / "cells").rglob("*/seed-5/**/*")} == before


CONTROLS = {
    "within": {"alignment": "detach", "teacher": "shuffled-class"},
    "among": {"alignment": "detach", "teacher": "shuffled-all"},
    "other": {"alignment": "detach", "teacher": "other"},
}


def test_controls_read_shuffled_features_that_are_stored_once(ablate, in_process, line, teacher, tmp_path):
    settings = {"train": SETTINGS["train"]}
    settings["evaluate"] = SETTINGS["evaluate"] | {"linear_probe": False, "guidance_scales": [1.0]}
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    options = {"records_dir": tmp_path / "records", "other_teacher": other, "seeds": 0}
    grid = {"seeds": [0, 1], "variants": CONTROLS}
    run(ablate, line(grid, settings, variants="within", **options))
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shuffled_class" / "features").rglob("*")}
    run(ablate, line(grid, settings, **options))
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    rows = read_results(tmp_path / "out")["cells"]
    assert [row["status"] for row in rows] == ["done"] * 3, rows
    assert len({row["metrics"]["nll"] for row in rows}) == 3
    trained = {
        name: json.loads((tmp_path / "out" / "cells" / name / "seed-0" / "flow" / "training_args.json").read_text())
        for name in CONTROLS
    }
    assert trained["other"]["teacher_model_name_or_path"] == str(other)
    for name, shuffle in {"within": "class", "among": "all"}.items():
        folder = tmp_path / "out" / f"shuffled_{shuffle}" / "features"
        assert trained[name]["teacher_features"] == str(folder)
        assert json.loads((folder / "features.json").read_text())["shuffle"] == shuffle

    # nothing is stored for cells with a record, which need the other teacher only where it is theirs
    shutil.rmtree(tmp_path / "out")
    without = {name: own for name, own in CONTROLS.items() if name != "other"}
    run(ablate, line(grid | {"variants": without}, settings, **options | {"other_teacher": None}))
    assert not list((tmp_path / "out").glob("shuffled_*"))
    (other / "more.txt").touch()
    with pytest.raises(ValueError, match=r"is of another config or other files: other_teacher \("):
        run(ablate, line(grid, settings, **options))


def test_shuffled_features_need_the_same_images_for_every_seed(ablate, line, images, tmp_path):
    grid = {"seeds": [0], "variants": CONTROLS}
    with pytest.raises(ValueError, match="'other' cannot be run: its teacher is 'other', but `--other_teacher`"):
        run(ablate, line(grid))
    grid["variants"] = {"within": CONTROLS["within"]}
    with pytest.raises(ValueError, match="`--data_dir` must have a validation split for shuffled features"):
        run(ablate, line(grid, data_dir=images / "train"))
    grid["variants"] = {"within": CONTROLS["within"] | {"max_train_samples": 8}}
    with pytest.raises(ValueError, match="'within' cannot be run: `max_train_samples` draws other images"):
        run(ablate, line(grid))
    grid["variants"] = {"within": CONTROLS["within"] | {"streaming": True}}
    options = {"data_dir": None, "dataset_name": images}
    with pytest.raises(ValueError, match="'within' cannot be run: --teacher_features belong to rows that"):
        run(ablate, line(grid, **options))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_cells_and_hours_and_leaves_nothing(ablate, in_process, line, tmp_path, capsys):
    variants = {"none": {"alignment": "none"}, "detach": {"alignment": "detach", "teacher": "shuffled-all"}}
    run(ablate, line({"seeds": [0, 1], "variants": variants}, jobs=1), "--dry_run")
    printed = capsys.readouterr().out
    for text in ("none, seed 0: to be run", "detach, seed 1: to be run", "an evaluation", "s a step", "min a cell"):
        assert text in printed
    assert "4 of 4 cells are to be run: " in printed and "hours one by one" in printed
    assert not (tmp_path / "out").exists()


def write_records(args, rows, records_dir):
    """Records of finished cells of a grid, with rows of known curves."""
    cells = make_cells(variants_of(args), [0, 1], args.output_dir, records_dir=records_dir)
    for cell in cells:
        row = next((row for row in rows if (row["variant"], row["seed"]) == (cell.variant.name, cell.seed)), None)
        if row is not None:
            cell.record_file.parent.mkdir(parents=True, exist_ok=True)
            record = {"config": cell.recorded_config, "checksums": {}, "row": row | {"seconds": {}}}
            cell.record_file.write_text(json.dumps(record))


CONFIRMED = {
    "seeds": [0, 1],
    "confirmation_seeds": [7],
    "variants": {
        "none": {"alignment": "none"},
        "fast": {"alignment": "detach"},
        "faster": {"alignment": "forward"},
        "once": {"alignment": "reverse"},
        "none-long": {"alignment": "none", "max_train_steps": 8},
    },
}


def test_the_best_variant_is_picked_on_the_validation_split_and_confirmed(ablate, in_process, line, tmp_path, capsys):
    settings = {"train": SETTINGS["train"]}
    settings["evaluate"] = SETTINGS["evaluate"] | {"linear_probe": False, "guidance_scales": [1.0]}
    command = line(CONFIRMED, settings, records_dir=tmp_path / "records")
    with pytest.raises(ValueError, match=r"`--confirm` needs finished cells of 'none' with the seeds \[0, 1\]"):
        run(ablate, command, "--confirm")
    rows = [make_row("none", seed, [0.0, 0.3, 0.6]) for seed in (0, 1)]
    rows += [make_row("fast", seed, [0.0, 0.5, 0.7]) for seed in (0, 1)]
    rows += [make_row("faster", seed, [0.0, 0.6, 0.7]) for seed in (0, 1)]
    rows += [make_row("once", 0, [0.0, 0.9, 0.9])]
    rows += [make_row("none-long", seed, [0.0, 0.9, 0.9]) for seed in (0, 1)]
    for row in rows[4:6]:  # the fastest to be accurate, at a cost in nll
        row["curve"]["nll"] = [9.0, 9.0, 9.0]
    write_records(ablate.parse_args(command), rows, tmp_path / "records")
    run(ablate, command, "--confirm")
    printed = capsys.readouterr().out
    assert "fast: 1.33 times fewer steps, nll -0.7000 (validation split)" in printed
    assert "faster: 2.00 times fewer steps, nll 9.0000, higher than that of none (validation split)" in printed
    assert "once: " not in printed.partition("none, seed 7")[0]
    report = read_results(tmp_path / "out" / "confirmation")
    assert [(row["variant"], row["seed"]) for row in report["cells"]] == [("none", 7), ("fast", 7)]
    assert not (tmp_path / "out" / "results.json").exists()
    assert (tmp_path / "records" / "fast" / "seed-7.json").exists()

    with pytest.raises(ValueError, match=r"The seeds \[7\] are for --confirm, which runs what the others picked"):
        run(ablate, command, "--seeds", "7")
    run(ablate, command, "--confirm", "--variants", "faster", "fast")
    report = read_results(tmp_path / "out" / "confirmation")
    assert [(row["variant"], row["seed"]) for row in report["cells"]] == [("none", 7), ("fast", 7), ("faster", 7)]
    with pytest.raises(SystemExit):
        ablate.parse_args([*command, "--confirm", "--seeds", "7"])
    assert "leave --seeds out" in capsys.readouterr().err
    for row in rows[2:4]:
        row["curve"]["nll"] = [9.0, 9.0, 9.0]
    write_records(ablate.parse_args(command), rows, tmp_path / "records")
    with pytest.raises(ValueError, match="`--confirm` has nothing to confirm: no variant with all the seeds"):
        run(ablate, command, "--confirm")
    without = {name: value for name, value in CONFIRMED.items() if name != "confirmation_seeds"}
    with pytest.raises(ValueError, match="`--confirm` needs 'confirmation_seeds', but `--grid` .* has none"):
        run(ablate, line(without, settings), "--confirm")


def test_steps_are_timed_in_turn(ablate, in_process, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "STEPS_PER_TURN", 4)
    monkeypatch.setattr(estimate, "TURNS", 2)
    timed, train = [], estimate.train

    def watch(variant, *arguments):
        timed.append(variant.name)
        return train(variant, *arguments)

    monkeypatch.setattr(estimate, "train", watch)
    grid = {"alignment": ["none", "detach"], "seeds": [0]}
    run(ablate, line(grid, records_dir=tmp_path / "records"), "--time_steps")
    assert timed == ["none", "detach"] * 2
    assert names(tmp_path / "records") == ["step_seconds-grid.json"] and not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "records" / "step_seconds-grid.json").read_text())
    assert report["commit"] and report["machine"]["threads"]
    printed = capsys.readouterr().out
    for name, own in report["results"].items():
        assert len(own["seconds"]) == 2 and min(own["seconds"]) <= own["median_seconds"] <= max(own["seconds"])
        assert f"{name}: {own['median_seconds']:.4f} s a step" in printed


def test_checkpoints_are_evaluated_where_the_run_held_images_out(ablate, in_process, line, images, tmp_path):
    """A data set without a validation split: the pipeline of a checkpoint has to know what was held out."""
    settings = SETTINGS | {"train": SETTINGS["train"] | {"train_val_split": 0.2}}
    settings["evaluate"] = SETTINGS["evaluate"] | {"linear_probe": False}
    run(ablate, line({"alignment": ["none"], "seeds": [1, 2]}, settings, data_dir=images / "train"))
    rows = read_results(tmp_path / "out")["cells"]
    assert [row["status"] for row in rows] == ["done", "done"], rows
    assert all(len(row["checkpoint_curve"]["step"]) == 2 for row in rows)
    cell = tmp_path / "out" / "cells" / "none" / "seed-1"
    source = DataSource("--data_dir", str(images / "train"), True)
    held_out = HoldOut.read(cell / "flow", source)
    assert rows[0]["evaluation"]["num_images"] == 4 and held_out.seed == 1
    assert held_out == HoldOut.read(cell / "checkpoints" / "checkpoint-2" / "flow", source)


def test_the_error_of_a_script_is_found_in_the_log(tmp_path):
    log = tmp_path / "log.txt"
    for said in ("train_rra.py: error: `--train_data_dir` must be", "torch.OutOfMemoryError: too large"):
        log.write_text(f"ValueError: of an earlier one\n{sys.executable} train_rra.py\nCells: 0%\r{said}\nCells: 1%\n")
        assert error_message(log) == said


# The grid


@pytest.mark.parametrize("settings", ["digits", "shapes"])
@pytest.mark.parametrize(
    "grid, expected",
    [
        ("strategies", ["none", "forward", "detach", "reverse-0", "reverse-1", "reverse-exact"]),
        ("weights", ["none", *(f"reverse-weight{weight}" for weight in (0.03, 0.1, 0.3, 1.0))]),
        ("teachers", ["none", "reverse-given-teacher", "reverse-random-teacher"]),
        ("projectors", ["none", "reverse-0", "reverse-0-irepa"]),
        ("places", None),
    ],
)
def test_the_grids_that_ship(ablate, line, grid, expected, settings):
    grid = REPOSITORY / "training" / "ablations" / f"{grid}.json"
    settings = REPOSITORY / "training" / "ablations" / "settings" / f"{settings}.json"
    args = ablate.parse_args(line({}, {}, grid=grid, settings=settings))
    cells = make_cells(variants_of(args), read_grid(grid)["seeds"], args.output_dir)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    variants = {cell.variant.name: cell.variant for cell in cells}
    assert len(cells) == 3 * len(variants)
    if expected is not None:
        assert list(variants) == expected
        assert all(variant.places[0][0] == 3 for variant in variants.values())
        return
    places = [variants[f"reverse-{blocks}-deep"].places for blocks in ("early", "late", "all")]
    assert [[block for block, _ in p] for p in places] == [[1, 2], [3, 4], [1, 2, 3, 4]]
    # digits have blocks of three layers; of two, the middle is as deep as a quarter
    layers = [variants[name].places[0][1] for name in variants if "early" in name]
    assert layers == ([1, 2, 3] if "digits" in settings.name else [1, 2])


def test_the_grids_of_the_glyphs(ablate, line):
    """The reasons are compared with baselines of their own, and share cells with the strategies."""
    variants = {}
    for name in ("glyphs", "glyphs_why"):
        grid = REPOSITORY / "training" / "ablations" / f"{name}.json"
        settings = REPOSITORY / "training" / "ablations" / "settings" / "glyphs.json"
        variants[name] = variants_of(
            ablate.parse_args(line({}, {}, grid=grid, settings=settings, other_teacher="mae"))
        )
    strategies, reasons = variants.values()
    for name in strategies.keys() & reasons.keys():
        assert strategies[name].train == reasons[name].train
    assert {variant.baseline for variant in strategies.values()} == {"none"}
    for variant in reasons.values():
        baseline = reasons[variant.baseline]
        assert baseline.train["alignment"] == "none" and baseline.baseline == baseline.name
        for name in ("num_attention_heads", "max_train_samples", "max_train_steps", "learning_rate"):
            assert variant.train.get(name) == baseline.train.get(name)
    assert len({variant.baseline for variant in reasons.values()}) == 7
    assert reasons["reverse-0-late-mae"].train["teacher_model_name_or_path"] == "mae"
    assert reasons["reverse-0-late-shuffled-all"].shuffle == "all"


def test_the_large_glyphs_have_the_places_of_the_small_ones(ablate, line):
    grid = REPOSITORY / "training" / "ablations" / "glyphs.json"
    places = []
    for name in ("glyphs", "glyphs64"):
        settings = REPOSITORY / "training" / "ablations" / "settings" / f"{name}.json"
        variants = variants_of(ablate.parse_args(line({}, {}, grid=grid, settings=settings)))
        places.append({name: variant.places for name, variant in variants.items()})
        train = variants["none"].train
        assert variants["none-long"].train["max_train_steps"] == 4 * train["max_train_steps"]
    assert places[0] == places[1]
    assert (train["resolution"] // train["patch_size"]) ** 2 == 256
    assert train["num_attention_heads"] * train["attention_head_dim"] == 512


def test_names_and_arguments_of_variants(ablate, line):
    grid = {
        "alignment": ["none", "forward", "reverse"],
        "alignment_order": [0, "exact"],
        "alignment_blocks": ["early", [3]],
        "alignment_layer": [1],
        "alignment_weight": [0.5],
        "seeds": [0],
    }
    variants = variants_of(ablate.parse_args(line(grid)))
    assert list(variants) == ["none", "forward-early", "forward-blocks3", "reverse-0-early", "reverse-0-blocks3",
                              "reverse-exact-early", "reverse-exact-blocks3"]  # fmt: skip
    train = variants["reverse-exact-blocks3"].train
    assert (
        train["alignment_blocks"] == [3] and train["alignment_order"] == "exact" and train["alignment_weight"] == 0.5
    )
    assert "alignment_order" not in variants["forward-early"].train
    assert not {"teacher_model_name_or_path", "alignment_weight"} & variants["none"].train.keys()
    assert command_line({"use_ema": False, "random_flip": False, "a": True, "b": [1, "x"], "c": None}) == [
        "--no-use_ema", "--a", "--b", "1", "x"
    ]  # fmt: skip


NAMED = {
    "seeds": [0],
    "variants": {
        "none": {"alignment": "none"},
        "reverse-late": {"alignment": "reverse", "alignment_blocks": "late", "alignment_layer": "shallow"},
        "conv": {"alignment": "detach", "projector_type": "conv", "normalize_teacher_features": True},
        "random": {"alignment": "detach", "teacher": "random", "max_train_steps": 8},
    },
}


def test_a_grid_may_name_its_variants_one_by_one(ablate, line, tmp_path):
    args = ablate.parse_args(line(NAMED))
    variants = variants_of(args)
    assert list(variants) == list(NAMED["variants"])
    assert variants["reverse-late"].places == [(2, 1), (3, 1)]
    train = variants["conv"].train
    assert train["projector_type"] == "conv" and train["normalize_teacher_features"] is True
    assert train["max_train_steps"] == 4 and variants["random"].train["max_train_steps"] == 8
    assert train["teacher_model_name_or_path"] == args.teacher
    assert variants["random"].train["teacher_model_name_or_path"] == str(tmp_path / "out" / "random_teacher")
    assert "teacher_model_name_or_path" not in variants["none"].train


def test_the_checkpoint_of_an_interruption_is_not_evaluated(tmp_path):
    """Curves are averaged over cells, which must have their points at the same steps."""
    for step in (2, 3, 4, 5):
        (tmp_path / "flow" / f"checkpoint-{step}").mkdir(parents=True)
    train = {"train_data_dir": "images", "checkpointing_steps": 2, "max_train_steps": 5}
    cell = Cell(Variant("none", train, {}, checkpoint_guidance_scale=1.0), 0, tmp_path)
    assert [folder.name for folder in cell.checkpoints] == ["checkpoint-2", "checkpoint-4"]


def test_finished_cells_leave_records_and_never_run_again(ablate, in_process, line, tmp_path, capsys):
    settings = SETTINGS | {"evaluate": SETTINGS["evaluate"] | {"linear_probe": False, "guidance_scales": [2.0]}}
    grid = NAMED | {
        "variants": {"none": {"alignment": "none"}, "bad": {"alignment": "detach", "alignment_weight": 1e39}}
    }
    records_dir = tmp_path / "records"
    run(ablate, line(grid, settings, records_dir=records_dir))
    results = read_results(tmp_path / "out")
    assert [row["status"] for row in results["cells"]] == ["done", "failed"]
    (file,) = records_dir.rglob("*.json")  # none of the failed cell
    assert file == records_dir / "none" / "seed-0.json"
    record = json.loads(file.read_text())
    assert record["config"]["train"]["max_train_steps"] == 4 and record["commit"] and record["machine"]["threads"]
    assert record["command"] == results["command"]
    assert record["checksums"].keys() == {"dataset", "teacher", "judge"} and len(set(record["checksums"].values())) > 1
    assert record["row"]["checkpoint_curve"]["step"] == [2, 4]
    assert "times_fewer_steps_accuracy" not in record["row"]["metrics"]  # depends on other cells

    # ended between the end of the cell and its record: only the record is written
    log = (tmp_path / "out" / "cells" / "none" / "seed-0" / "flow" / "metrics.jsonl").stat().st_mtime_ns
    file.unlink()
    run(ablate, line(grid, settings, records_dir=records_dir, variants="none"))
    assert json.loads(file.read_text())["row"] == record["row"]
    assert (tmp_path / "out" / "cells" / "none" / "seed-0" / "flow" / "metrics.jsonl").stat().st_mtime_ns == log

    # a checkout without the folder: only what has no record is run, and the table is the same
    shutil.rmtree(tmp_path / "out")
    grid = NAMED | {"variants": {"none": {"alignment": "none"}, "detach": {"alignment": "detach"}}}
    capsys.readouterr()
    run(ablate, line(grid, settings, records_dir=records_dir))
    assert "none, seed 0: done\ndetach, seed 0: to be run\n" in capsys.readouterr().out
    assert names(tmp_path / "out" / "cells") == ["detach"]
    again = read_results(tmp_path / "out")
    assert again["variants"]["none"] == results["variants"]["none"]
    assert names(records_dir) == ["detach", "none"]
    assert again["cells"][0]["metrics"] == results["cells"][0]["metrics"]

    other = settings | {"train": SETTINGS["train"] | {"learning_rate": 0.5}}
    message = r"record .*none/seed-0.json is of another config or other files: learning_rate \(0.01 then, 0.5 now\)"
    with pytest.raises(ValueError, match=message):
        run(ablate, line(grid, other, records_dir=records_dir, output_dir=tmp_path / "elsewhere"))
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ValueError, match=r"none/seed-0.json is of another config or other files: teacher \("):
        elsewhere = {"output_dir": tmp_path / "elsewhere", "teacher": tmp_path / "teacher"}
        run(ablate, line(grid, settings, records_dir=records_dir, **elsewhere))
    assert not (tmp_path / "elsewhere").exists()


def test_layers_are_the_papers():
    assert [resolve_layer(name, 8) for name in ("shallow", "middle", "deep")] == [2, 4, 6]
    assert resolve_blocks("late", 8) == [7, 8] and resolve_blocks("early", 8) == [1, 2]
    assert resolve_blocks("all", 1) == resolve_blocks("late", 1) == [1]


# Results


REPORT = {"command": "", "commit": "", "machine": {}, "cell_hours": 0.0, "settings": {}, "cells": []}


def make_row(variant, seed, accuracy, distance=()):
    """A row with evaluated checkpoints if it has distances."""
    curve = {"step": list(range(0, 100 * len(accuracy), 100)), "accuracy": accuracy}
    curve["nll"] = [-value for value in accuracy]
    checkpoint_curve = curve | {"distance": list(distance)} if distance else {"step": []}
    return {
        "variant": variant,
        "seed": seed,
        "status": "done",
        "curve": curve,
        "checkpoint_curve": checkpoint_curve,
        "metrics": {},
    }


def test_steps_are_counted_over_checkpoints_where_they_were_evaluated():
    baseline, other = (make_row(name, 0, [0.1, 0.5], [8.0, 4.0]) for name in ("none", "fast"))
    other["checkpoint_curve"]["accuracy"] = [0.1, 0.9]
    summary = summarise([baseline, other])
    # 0.5 lies half-way to 0.9 at the checkpoints; at the validations both reach it at step 100
    assert summary["variants"]["fast"]["metrics"]["times_fewer_steps_accuracy"]["mean"] == pytest.approx(2.0)
    for row in (baseline, other):
        row["checkpoint_curve"] = {"step": []}
    metrics = summarise([baseline, other])["variants"]["fast"]["metrics"]
    assert metrics["times_fewer_steps_accuracy"]["mean"] == pytest.approx(1.0)


def test_how_many_times_fewer_steps():
    rows = [
        make_row("none", 0, [0.1, 0.3, 0.5], [8.0, 4.0, 3.0]),
        make_row("none", 1, [0.1, 0.4, 0.7], [8.0, 4.0, 3.0]),
        make_row("fast", 0, [0.1, 0.7, 0.9], [8.0, 2.0, 1.0]),
        make_row("slow", 0, [0.1, 0.2, 0.3], [8.0, 7.0, 6.0]),
        {"variant": "slow", "seed": 1, "status": "failed"},
    ]
    summary = summarise(rows)
    assert summary["baseline_final"]["none"] == {
        "accuracy": pytest.approx(0.6), "nll": pytest.approx(-0.6), "distance": pytest.approx(3.0)
    }  # fmt: skip
    # 0.6 lies at 100 * 0.5 / 0.6; the baseline's seeds reach it at the end, if at all, and at 100 + 100 * 0.2 / 0.3
    fast = summary["variants"]["fast"]["metrics"]
    assert fast["steps_to_baseline_accuracy"]["mean"] == pytest.approx(100 * 0.5 / 0.6)
    baseline_steps = (200 + 100 + 100 * 0.2 / 0.3) / 2
    assert fast["times_fewer_steps_accuracy"]["mean"] == pytest.approx(baseline_steps / (100 * 0.5 / 0.6))
    assert fast["times_fewer_steps_nll"] == fast["times_fewer_steps_accuracy"]
    assert fast["times_fewer_steps_distance"]["mean"] == pytest.approx(200 / (100 * 5 / 6))
    assert fast["times_fewer_steps_distance"]["standard_error"] is None
    assert summary["variants"]["none"]["metrics"]["times_fewer_steps_accuracy"]["num_seeds"] == 1
    assert legend_entry("fast", summary) == "fast (2.2×)"
    rows.append(make_row("fast", 1, [0.1, 0.2, 0.3], [8.0, 4.0, 3.0]))  # never there
    assert legend_entry("fast", summarise(rows)) == "fast (2.2×, 1 of 2 seeds)"
    slow = summary["variants"]["slow"]
    assert slow["metrics"] == {} and (slow["num_cells"], slow["num_done"]) == (2, 1)
    assert format_figure({"mean": 0.5, "standard_error": 0.01, "num_seeds": 2}, 100, 1, 3) == ("50.0 ± 1.0 (2 of 3)")


def test_how_many_times_less_time():
    """A step of each variant takes what was measured of all in turn, whatever the cells took."""
    rows = [make_row("none", 0, [0.0, 0.3, 0.6]), make_row("fast", 0, [0.0, 0.6, 0.6])]
    for row, seconds in zip(rows, (5.0, 1.0)):
        row["metrics"]["seconds_per_step"] = seconds
    metrics = summarise(copy.deepcopy(rows), step_seconds={"none": 0.2, "fast": 0.25})["variants"]["fast"]["metrics"]
    assert metrics["times_fewer_steps_accuracy"]["mean"] == pytest.approx(2.0)
    assert metrics["times_less_time_accuracy"]["mean"] == pytest.approx(2.0 * 0.2 / 0.25)
    assert metrics["times_less_time_nll"]["mean"] == pytest.approx(1.6)
    for step_seconds in ({}, {"none": 0.2}, {"fast": 0.2}):
        metrics = summarise(copy.deepcopy(rows), step_seconds=step_seconds)["variants"]["fast"]["metrics"]
        assert "times_less_time_accuracy" not in metrics and "times_fewer_steps_accuracy" in metrics


def test_a_variant_is_compared_with_its_own_baseline():
    rows = [
        make_row("none", 0, [0.0, 0.4, 0.8]),
        make_row("none-small", 0, [0.0, 0.1, 0.2]),
        make_row("fast-small", 0, [0.0, 0.2, 0.2]),
        make_row("none-long", 0, [0.0, 0.4, 0.8, 0.9]),
    ]
    for row in rows:
        row["metrics"]["nll"] = row["curve"]["nll"][-1]
    summary = summarise(rows, {"none-small": "none-small", "fast-small": "none-small"})
    assert summary["baseline_final"]["none"]["accuracy"] == 0.8
    assert summary["baseline_final"]["none-small"]["accuracy"] == 0.2
    times = {name: own["metrics"]["times_fewer_steps_accuracy"]["mean"] for name, own in summary["variants"].items()}
    assert times == {"none": 1.0, "none-small": 1.0, "fast-small": pytest.approx(2.0), "none-long": 1.0}
    small = summary["variants"]["fast-small"]
    assert small["baseline"] == "none-small" and small["minus_baseline"]["nll"]["mean"] == pytest.approx(0.0)
    page = markdown({**REPORT, **summary})
    assert "none: 80.0 %, -0.8000, none-small: 20.0 %, -0.2000" in page


def test_how_the_factor_grows_over_training(tmp_path):
    """At each point of the baseline: its step there over the variant's step to the same value."""
    baseline = [make_row("none", seed, [0.0, 0.1, 0.2, 0.3, 0.4], [9.0, 8.0, 7.0, 6.0, 5.0]) for seed in (0, 1)]
    fast = [
        make_row("fast", 0, [0.0, 0.1, 0.3, 0.5, 0.7], [9.0, 8.0, 6.0, 4.0, 2.0]),  # 0.3 at step 200, 0.4 at 250
        make_row("fast", 1, [0.0, 0.1, 0.2, 0.3, 0.4], [7.5, 7.0, 6.0, 5.0, 4.0]),
    ]
    variants = summarise([*baseline, *fast])["variants"]
    accuracy = variants["fast"]["speed_up_curves"]["accuracy"]
    assert accuracy["step"] == [100, 200, 300, 400]
    assert accuracy["mean"] == pytest.approx([1.0, (200 / 150 + 1) / 2, (300 / 200 + 1) / 2, (400 / 250 + 1) / 2])
    assert accuracy["standard_error"][3] == pytest.approx((400 / 250 - 1) / 2)
    assert accuracy["mean"][-1] == variants["fast"]["metrics"]["times_fewer_steps_accuracy"]["mean"]
    # the second seed is below 8 from the start: how long before is not known
    distance = variants["fast"]["speed_up_curves"]["distance"]
    assert distance["step"] == [200, 300, 400]
    assert distance["mean"] == pytest.approx([(200 / 150 + 200 / 100) / 2, (300 / 200 + 300 / 200) / 2,
                                              (400 / 250 + 400 / 300) / 2])  # fmt: skip
    # one that never arrives has no factor there
    slow = summarise([*baseline, make_row("slow", 0, [0.0, 0.1, 0.15, 0.2, 0.2], [9.0] * 5)])["variants"]["slow"]
    assert slow["speed_up_curves"]["accuracy"] == {
        "step": [100, 200], "mean": pytest.approx([1.0, 200 / 300]), "standard_error": [None, None]
    }  # fmt: skip

    draw_speed_ups(variants, tmp_path / "speed_ups.png")
    assert min(PIL.Image.open(tmp_path / "speed_ups.png").size) > 300
    draw_speed_ups({"none": variants["none"]}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_differences_to_the_baseline_are_of_the_same_seeds():
    rows = [
        make_row(variant, seed, [0.5]) | {"metrics": {"nll": nll}}
        for variant, nlls in {"none": [1.0, 3.0, 8.0], "detach": [0.5, 2.7, None]}.items()
        for seed, nll in enumerate(nlls)
        if nll is not None
    ]
    summary = summarise(rows)
    # -0.5 and -0.3, whatever the third seed of the baseline is
    figure = summary["variants"]["detach"]["minus_baseline"]["nll"]
    assert figure == {"mean": pytest.approx(-0.4), "standard_error": pytest.approx(0.1), "num_seeds": 2}
    assert summary["variants"]["none"]["minus_baseline"]["nll"]["mean"] == 0


def test_no_baseline_is_no_target():
    summary = summarise([make_row("detach", 0, [0.1, 0.2])])
    assert summary["baseline_final"]["none"] == {"accuracy": None, "nll": None, "distance": None}
    assert summary["variants"]["detach"]["metrics"] == summary["variants"]["detach"]["minus_baseline"] == {}


# Bad input


GRID = {"alignment": ["none", "reverse"], "seeds": [0]}


@pytest.mark.parametrize(
    "grid, message",
    [
        (GRID | {"strategy": ["x"]}, r"grid.json has the unknown keys \['strategy'\]; it may have \['alignment', "),
        ({"alignment": ["none"]}, "grid.json has no 'seeds', but every cell needs one"),
        (GRID | {"alignment_weight": 0.1}, "must have a list of values for 'alignment_weight', but has 0.1"),
        (
            GRID | {"teacher": ["strict"]},
            r"names the teachers \['strict'\], but they are \['given', 'other', 'random', ",
        ),
        ("{", "grid.json is not a JSON file: Expecting"),
        ("[]", "grid.json must hold a JSON object, but holds"),
        (GRID | {"alignment_blocks": [[4]]}, "variant 'reverse' cannot be run: `places` names flow block 4"),
        (GRID | {"alignment_layer": [3]}, "variant 'reverse' cannot be run: `places` names layer 3 of flow block 2"),
        (
            GRID | {"alignment_blocks": ["last"]},
            r"must be numbers or one of \['early', 'late', 'all'\], but are 'last'",
        ),
        (GRID | {"alignment_layer": ["top"]}, r"must be a number or one of \['shallow', .*\], but is 'top'"),
        (GRID | {"alignment": ["up"]}, "variant 'up' cannot be run: argument --alignment: invalid choice: 'up'"),
        ({"variants": {"a": {"alignment": "none"}}}, "grid.json has no 'seeds', but every cell needs one"),
        (GRID | {"variants": {}}, r"must have either 'variants' or lists of values, but also has \['alignment'\]"),
        ({"variants": [], "seeds": [0]}, "'variants' of `--grid` .* must hold a JSON object, but holds"),
        ({"variants": {"a/b": {"alignment": "none"}}, "seeds": [0]}, "names the variant 'a/b', but a folder"),
        ({"variants": {"a": {}}, "seeds": [0]}, "variant 'a' of `--grid` .* has no 'alignment'"),
        (
            {"variants": {"a": {"seed": 1}}, "seeds": [0]},
            r"variant 'a' of `--grid` .* has the unknown keys \['seed'\]",
        ),
        (
            {"variants": {"a": {"alignment": "detach", "teacher": "strict"}}, "seeds": [0]},
            r"names the teachers \['strict'\], but they are \['given', 'other', 'random', ",
        ),
        (
            {"variants": {"a": {"alignment": "detach", "baseline": "none"}}, "seeds": [0]},
            r"variant 'a' of `--grid` .* must have a baseline of the grid that is not aligned, one of \[\], but has"
            " 'none'",
        ),
        (
            {"variants": {"a": {"alignment": "detach"}, "b": {"alignment": "detach", "baseline": "a"}}, "seeds": [0]},
            r"variant 'b' of `--grid` .* must have a baseline of the grid that is not aligned, one of \[\], but has"
            " 'a'",
        ),
        (
            GRID | {"confirmation_seeds": [0, 1]},
            r"must have other 'confirmation_seeds' than 'seeds', but both have \[0\]",
        ),
        (GRID | {"alignment_order": [-1]}, "variant 'reverse' cannot be run: argument --alignment_order: must be 0"),
    ],
)
def test_a_bad_grid_raises_and_nothing_runs(ablate, line, tmp_path, grid, message):
    with pytest.raises(ValueError, match=message):
        run(ablate, line(grid))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"training": {}}, r"settings.json has the unknown keys \['training'\]"),
        ({"train": {"width": 3}}, r"'train' of `--settings` .* has the unknown keys \['width'\]"),
        ({"train": {"seed": 3}}, r"'train' of `--settings` .* has the unknown keys \['seed'\]"),
        ({"evaluate": {"model": "m"}}, r"'evaluate' of `--settings` .* has the unknown keys \['model'\]"),
        (
            {"train": {"train_batch_size": 0}},
            "argument --train_batch_size: must be a whole number of at least 1, but is 0",
        ),
        (
            {"evaluate": {"num_samples": 1}},
            "'none' cannot be run: argument --num_samples: must be a whole number of at least 4, but is 1",
        ),
        ({"checkpoint_guidance_scale": 3.0}, r"must be one of the evaluation's 'guidance_scales' \[\], .* but is 3.0"),
        (
            SETTINGS | {"train": {"use_ema": False}},
            "'checkpoint_guidance_scale' of `--settings` .* needs 'use_ema'",
        ),
    ],
)
def test_bad_settings_raise_and_nothing_runs(ablate, line, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(ablate, line(GRID, settings))
    assert not (tmp_path / "out").exists()


def test_bad_options_raise(ablate, line, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`--variants` must be of the grid's, \['none', 'reverse'\], but \['up'\]"):
        run(ablate, line(GRID, variants=["none", "up"]))
    with pytest.raises(ValueError, match="`--data_dir` must be an existing folder, but is 'nowhere'"):
        run(ablate, line(GRID, data_dir="nowhere"))
    with pytest.raises(ValueError, match="`--grid` must be an existing JSON file, but is 'nowhere.json'"):
        run(ablate, line(GRID, grid="nowhere.json"))
    for options, message in (
        ({"data_dir": None}, "give one of --dataset_name and --data_dir"),
        ({"jobs": 0}, "argument --jobs: must be a whole number of at least 1, but is 0"),
        ({"threads": 0}, "argument --threads: must be a whole number of at least 1, but is 0"),
    ):
        with pytest.raises(SystemExit):
            ablate.parse_args(line(GRID, **options))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
