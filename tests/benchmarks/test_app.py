from gradio_client import Client

# The page of a tiny flow, and where it is served.
from ..page.conftest import address, page  # noqa: F401


def test_it_presses_every_button(benchmark_script, page, address):  # noqa: F811
    benchmark = benchmark_script("app")
    client = Client(address, verbose=False)
    assert benchmark.requests(page).keys() == client.view_api(return_format="dict")["named_endpoints"].keys()
    seconds = benchmark.measure(address, page, repeats=1)
    assert all(0 < times["median"] == times["longest"] for times in seconds.values())
