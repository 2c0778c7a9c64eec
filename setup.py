"""Package map: `transfusion` lives in src/, `transfusion_kernels` in kernels/. Nothing compiles at install."""

from setuptools import find_packages, setup

KERNELS = "transfusion_kernels"

CORE = [
    "torch>=2.11,<2.14",
    "braceexpand>=0.1",
    "numpy>=2.0,<3",
    "pillow>=11,<13",
    "pydantic>=2.10,<3",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "typer>=0.15",
    "webdataset>=1.0,<2",
]
EXTRAS = {
    "train": ["deepspeed>=0.19.8,<0.20"],
    "triton": ["triton>=3.6"],
    "evaluate": ["scikit-learn>=1.5"],
    # Decodes plain PNGs faster than Pillow, to the same values.
    "opencv": ["opencv-python-headless>=4.10"],
    # The networks of KL and VQ autoencoders. With a torchvision of another torch beside it, it cannot be imported.
    "codec": ["diffusers>=0.36"],
    "report": ["matplotlib>=3.9", "jinja2>=3.1"],
    "wandb": ["wandb>=0.20"],
    # OpenCV, since only then is it seen to give the same values.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "mypy>=1.15",
        "ruff>=0.9",
        "types-PyYAML",
        "triton>=3.6",
        "opencv-python-headless>=4.10",
    ],
    "oracles": ["diffusers>=0.36", "transformers>=5"],
}
EXTRAS["all"] = [
    requirement
    for name in ("train", "evaluate", "codec", "report", "wandb", "opencv")
    for requirement in EXTRAS[name]
]

setup(
    name="transfusion",
    version="0.1.0",
    description="Train one transformer on text and images together, and generate both in one answer",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src", KERNELS: f"kernels/{KERNELS}"},
    # verification/ proves the kernels from a checkout, where it is found without being named here.
    packages=[*find_packages("src"), *find_packages("kernels", exclude=["*.verification"])],
    package_data={"transfusion": ["py.typed", "evaluate/report/*.html"], KERNELS: ["py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["transfusion=transfusion.cli.main:main"]},
)
