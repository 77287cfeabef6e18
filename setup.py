"""Map the top-level folders into the package: `generation/` installs as `hf_ext.generation`."""

from setuptools import find_packages, setup

MOUNTED = ("modeling", "generation", "trainer_callbacks", "claims", "benchmarks", "model_cards")

# Data files go into the wheel from every depth: the demo's models lie in folders that are no packages.
DATA = ("json", "jinja", "md", "safetensors", "txt")

packages = find_packages(include=["hf_ext", "hf_ext.*"])
package_dir = {"hf_ext": "hf_ext"}
for folder in MOUNTED:
    package_dir[f"hf_ext.{folder}"] = folder
    packages += [f"hf_ext.{folder}", *(f"hf_ext.{folder}.{name}" for name in find_packages(folder))]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"": [*(f"**/*.{ending}" for ending in DATA), "py.typed"]},
)
