"""Build file: distribution rm-lora-glue, import name loralib (the distribution called loralib is Microsoft's)."""

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.8",  # one process for each core
    "psutil>=5.9",  # pytest-xdist counts the cores by it
    "hypothesis>=6.100",
    "ruff>=0.17",
    "mypy>=2.4",
    "peft>=0.19",
    "setuptools>=77",
    "trl>=1.16,<2",
]

setup(
    name="rm-lora-glue",
    version="1.0.0",
    description="LoRA, AdaLoRA, SoRA and RM-LoRA on GLUE: a reference implementation for current PyTorch",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["loralib", "loralib.*"]),
    package_data={"loralib": ["py.typed"]},
    # constraints.txt holds the versions that the tests run with, constraints-oldest.txt the lower ends of these ranges,
    # which test.sh --oldest installs; test.sh --newest installs their upper ends. tests/test_private_names.py says what
    # a new version may not drop.
    install_requires=[
        "torch>=2.8,<3",
        "transformers>=5.17,<6",
        "accelerate>=1.13,<2",
        "datasets>=4.7,<6",
        "evaluate>=0.4.6,<0.5",
        "safetensors>=0.8",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "numpy>=1.26",
        "pyarrow>=21",
        "pandas>=2.2",  # the report's tables
        "sentencepiece>=0.2",  # with protobuf: reads spm.model, DeBERTa-v3's only tokenizer file
        "protobuf>=5.26",
        "tensorboard>=2.18",
        "markdown>=3.6,<4",  # the report as HTML
        "matplotlib>=3.10",  # figures of the report, and the heatmap of ranks in TensorBoard
    ],
    extras_require={
        "test": TEST,
        "sweep": ["ray>=2.60,<3"],
        "peft": ["peft>=0.19"],
    },
)
