from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="rloop-mcore",
    version="0.1.0",
    description="RLoop (arXiv 2511.04285): RL on verifiable rewards with Megatron-Core and SGLang",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ stands at the top of the repository for its readers and ships inside the package
    packages=[*find_packages(include=["rloop_mcore*"]), "rloop_mcore.configs"],
    package_dir={"rloop_mcore.configs": "configs"},
    package_data={
        "rloop_mcore": ["data/templates/*.jinja", "analysis/page/*", "slurm/*.jinja"],
        "rloop_mcore.configs": ["*.yaml", "*/*.yaml"],
    },
    entry_points={"console_scripts": ["rloop=rloop_mcore.main.cli:main"]},
    install_requires=[
        # 2.11: the oldest that is tested, on a GPU too; megatron-core 0.19 can't load the checkpoints that 2.15 writes
        "torch>=2.11,<2.15",
        "megatron-core>=0.19,<0.20; python_version>='3.12'",
        "megatron-core==0.16.1; python_version<'3.12'",
        "transformers>=5,<6",
        "safetensors>=0.5",
        "hydra-core>=1.3.2,<2",
        "math-verify>=0.9,<0.10",
        "pyarrow>=18",
        "aiohttp>=3.10",
        "jinja2>=3.1",
        "latex2mathml>=3.77",
        "numpy>=2",
        "packaging>=23",
        "plotly>=6",
        "psutil>=5.9",
        "rich>=13",
        "tensorboard>=2.18",
        "xxhash>=3.5",
    ],
    extras_require={
        "export": ["kaleido>=1.0"],
        "gpu": ["transformer-engine[pytorch]>=2.3"],
        "hf-datasets": ["datasets>=3"],
        "wandb": ["wandb>=0.31"],
        "smollm2": ["gguf>=0.17", "accelerate>=1.0"],
        "dev": [
            "duckdb>=1.1",
            "datasets>=3",
            "hypothesis>=6.100",
            "kaleido>=1.0",
            "mypy>=1.13",
            "pandas>=2.2",
            "playwright>=1.50",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "types-psutil",
            "wandb>=0.31",
        ],
    },
)
