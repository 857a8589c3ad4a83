"""The arithmetic of scale: what it says is sent against what processes send, and the rest against closed forms."""

from pathlib import Path

import pytest
import torch

from flowback_hf.files import read_json

from ..conftest import REPOSITORY, load_script
from ..drills.runs import start


COUNTING = Path(__file__).with_name("count_traffic.py")
GB = 1e9


@pytest.fixture
def scale_model(benchmark_script):
    return benchmark_script("scale_model")


@pytest.fixture
def costs(scale_model):
    """A tiny flow with round figures."""
    with torch.device("meta"):
        objective = load_script(COUNTING).build_objective("reverse")
    return scale_model.Costs(
        objective,
        flow_parameters=900,
        parameters=1000,
        teacher={"parameters": 50, "flops": 3e9},
        step_flops={False: 17e9, True: 22e9},
        activations={False: (6000, 500), True: (1000, 500)},
    )


@pytest.mark.parametrize("num_processes", [2, 4])
def test_traffic_is_what_processes_send(scale_model, tmp_path, num_processes):
    """To the byte, by strategy, on gloo. With four processes, two hold all weights together (HSDP)."""
    processes = [
        start(tmp_path / f"log-{rank}", [str(tmp_path), str(num_processes), str(rank)], script=COUNTING)
        for rank in range(num_processes)
    ]
    for process in processes:
        assert process.wait(120) == 0, process.log
    counting, num_shards = load_script(COUNTING), {"DDP": 1, "FSDP2": num_processes, "HSDP": 2}
    sent = read_json(tmp_path / "traffic.json")
    assert sent.keys() == (num_shards.keys() if num_processes == 4 else {"DDP", "FSDP2"})
    for sharding, by_case in sent.items():
        for name, traffic in by_case.items():
            objective = counting.build_objective(name)
            assert vars(scale_model.step_traffic(objective, sharding, num_shards[sharding])) == traffic, name


@pytest.mark.parametrize("sharding, num_shards", [("DDP", 1), ("FSDP2", 64), ("HSDP", 8)])
def test_a_step_and_a_checkpoint_follow_from_bytes_and_rates(scale_model, costs, sharding, num_shards):
    args = scale_model.parse_args(["--peak_tflops", "10", "--matrix_share", "0.5", "--bandwidth_share", "1"])
    case = scale_model.predict(costs, sharding, 64, 16, args)
    assert case["fits"] and not case["gradient_checkpointing"]
    memory = case["memory_bytes"]
    assert memory["states"] == (16 * 1000 + 4 * 900) / num_shards
    assert memory["validation"] == 4 * 900
    largest_block = max(scale_model.padded_bytes(block, num_shards) for block in costs.objective.flow.blocks)
    assert memory["communication"] == (4 * 1000 if sharding == "DDP" else 4 * largest_block)
    assert memory["teacher"] == 4 * 50 and memory["activations"] == 16 * 6000 + 500
    seconds = case["seconds"]
    assert seconds["compute"] == pytest.approx(16 * 20e9 / 5e12)
    assert seconds["memory"] == pytest.approx(64 * 1000 / num_shards / 3350e9)
    assert case["bottleneck"] == "compute"
    assert case["step_seconds"] == pytest.approx(seconds["compute"] + seconds["memory"])
    assert case["images_per_second_per_gpu"] == pytest.approx(16 / case["step_seconds"])
    assert case["loader_cores_per_gpu"] == pytest.approx(16 / case["step_seconds"] / 400)
    # One process writes 0.65 GB/s, and the disk of a node 4 GB/s, which is less than its eight processes.
    rate = {"DDP": 0.65, "FSDP2": 8 * 4, "HSDP": 4}[sharding] * GB
    assert case["checkpoint_seconds"] == pytest.approx((12 * 1000 + 4 * 900) / rate)


def test_what_is_slowest_decides(scale_model, costs):
    def bottleneck(**rates):
        options = [word for name, rate in rates.items() for word in (f"--{name}", str(rate))]
        case = scale_model.predict(costs, "FSDP2", 64, 16, scale_model.parse_args(options))
        longest = case["seconds"][case["bottleneck"]]
        assert longest == max(case["seconds"].values()) and longest <= case["step_seconds"]
        return case["bottleneck"]

    assert bottleneck() == "compute"
    assert bottleneck(infiniband_gb_per_second=1e-4) == "network"
    assert bottleneck(memory_gb_per_second=1e-6) == "memory"


def test_checkpointing_is_chosen_where_memory_needs_it(scale_model, costs):
    def predict(num_bytes):
        args = scale_model.parse_args(["--memory_gb", str(num_bytes / 0.9 / GB)])
        return scale_model.predict(costs, "DDP", 8, 16, args)

    plain = sum(predict(1e9)["memory_bytes"].values())
    assert not predict(plain + 1)["gradient_checkpointing"]
    case = predict(plain - 1)
    assert case["gradient_checkpointing"] and case["fits"]
    assert sum(case["memory_bytes"].values()) == plain - 16 * 5000
    assert case["seconds"]["compute"] == pytest.approx(25 / 20 * predict(1e9)["seconds"]["compute"])
    # Under FSDP2, layers that are computed again cast their weights again.
    memory = {shards: scale_model.step_memory(costs, shards, 1, 16, True) for shards in ("DDP", "FSDP2")}
    assert memory["DDP"]["activations"] - memory["FSDP2"]["activations"] == 500
    case = predict(plain - 16 * 5000 - 1)
    assert case["gradient_checkpointing"] and not case["fits"]


def test_the_network_is_the_slowest_link(scale_model):
    args = scale_model.parse_args(["--bandwidth_share", "1"])
    traffic = scale_model.Traffic(gathered=int(900 * GB), reduced=int(450 * GB))

    def seconds(sharding, num_gpus):
        return scale_model.network_seconds(traffic, sharding, num_gpus, args)

    assert seconds("FSDP2", 1) == 0
    assert seconds("FSDP2", 8) == pytest.approx(3 * 7 / 8)  # 450 GB/s by NVLink
    assert seconds("FSDP2", 64) == pytest.approx(1350 * 7 / 8 / 400)  # eight times 50 GB/s by InfiniBand
    traffic.all_reduced = int(100 * GB)
    assert seconds("HSDP", 64) == pytest.approx(3 * 7 / 8 + 2 * 100 * 7 / 8 / 50)
    traffic = scale_model.Traffic(all_reduced=int(450 * GB))
    assert seconds("DDP", 8) == pytest.approx(2 * 7 / 8)


def test_operations_of_a_step_are_those_of_its_products(benchmark_script):
    """Three forward passes, but for the first products, whose inputs need no gradient; alignment adds to them."""
    flow_costs = benchmark_script("flow_costs")
    config = flow_costs.load_config("demo_digits")
    forward, step = flow_costs.count_flops(config), flow_costs.count_step_flops(config)
    num_tokens, width, token_dim = 16, 64, 4
    assert step == 3 * forward - 2 * num_tokens * token_dim * width
    assert flow_costs.count_step_flops(config, gradient_checkpointing=True) > 1.2 * step
    # In units of a block's forward pass: the likelihood's gradient in two blocks, two of three layers at both places.
    alignment = {"places": [(3, 2), (4, 2)], "teacher_dim": 8, "projector_dim": 1, "projector_type": "mlp"}
    aligned = flow_costs.count_step_flops(config, **alignment)
    assert aligned - step == pytest.approx((2 + 2 * 2 / 3) * forward / 4, rel=0.05)


@pytest.mark.parametrize("num_gpus", ["0", "12"])
def test_gpus_fill_nodes(scale_model, capsys, num_gpus):
    with pytest.raises(SystemExit):
        scale_model.parse_args(["--num_gpus", num_gpus])
    assert f"--num_gpus must fit in a node or fill several of 8, but is {num_gpus}" in capsys.readouterr().err


def test_the_committed_figures_are_those_of_the_configs(benchmark_script):
    flow_costs = benchmark_script("flow_costs")
    report = read_json(REPOSITORY / "benchmarks" / "results" / "scale_model.json")["results"]
    for flow in report["flows"]:
        assert flow_costs.count_parameters(flow_costs.load_config(flow["config"])) == flow["flow_parameters"]
