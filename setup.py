"""Map the top-level folders into the package: `generation/` installs as `hf_ext.generation`."""

from setuptools import find_namespace_packages, setup

MOUNTED = ("modeling", "generation", "trainer_callbacks", "claims", "benchmarks", "model_cards")

# Endings of the data files that go into the wheel; C is compiled where it runs.
DATA = ("c", "json", "jinja", "md", "safetensors", "txt")
# Folders of data count as packages too, or setuptools warns that it will leave them out some day.
CACHES = ("__pycache__", "*.__pycache__", "*.__pycache__.*")

packages = find_namespace_packages(include=["hf_ext", "hf_ext.*"], exclude=CACHES)
package_dir = {"hf_ext": "hf_ext"}
for folder in MOUNTED:
    package_dir[f"hf_ext.{folder}"] = folder
    inside = find_namespace_packages(folder, exclude=CACHES)
    packages += [f"hf_ext.{folder}", *(f"hf_ext.{folder}.{name}" for name in inside)]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"": [*(f"*.{ending}" for ending in DATA), "py.typed"]},
)
