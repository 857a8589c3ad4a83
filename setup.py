from pathlib import Path

from setuptools import find_packages, setup


version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("src").joinpath("flowback_hf", "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

extras = {
    # training/train_rra.py draws its loss curve
    "train": ["matplotlib>=3.8"],
    # adapters: load_lora_weights, and training/train_rra.py --lora_rank
    "lora": ["peft>=0.18"],
    # training/train_rra.py --report_to
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.18"],
    # training/prepare_demo.py and the quickstart
    "demo": ["matplotlib>=3.8", "scikit-learn>=1.4"],
    # pipelines/evaluate_flow.py: distances between samples and images, the linear probe and the figures
    "eval": ["matplotlib>=3.8", "scikit-learn>=1.4", "torchmetrics>=1.9"],
    # features of the literature's Inception network
    "fid": ["torch-fidelity>=0.3", "torchmetrics>=1.9", "torchvision"],
    # pipelines/app.py
    "app": ["gradio>=6.31"],
    "test": [
        "hypothesis>=6.100",
        "ipython>=8.20",  # runs the notebooks
        "markdown-it-py>=3.0",
        "peft>=0.18",
        "playwright>=1.50",
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "setuptools>=68",
        "wheel>=0.42",
    ],
}

setup(
    name="flowback_hf",
    version=version,
    description="Normalizing flows for the Hugging Face ecosystem, with reverse representation alignment",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The flowback_hf team",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"flowback_hf": ["*.md", "*.txt", "py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.10",
        "datasets>=4.0",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "evaluate>=0.4.5",
        "filelock>=4.0",  # forked processes that load data do not keep its locks
        "pillow>=10.4",
        "tqdm>=4.66",
    ],
    extras_require=extras,
)
