"""Everything is declared in settings.ini; this file hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
extras["dev"] = [r for e in cfg["dev_extras"].split() for r in extras[e]]


class BuildWithNotebooks(build_py):
    """A wheel carries the run notebooks, recipes and studies too: without them `autohdr run` has nothing to run."""

    def run(self):
        super().run()
        for source, pattern in (("nbs/experiments", "*.ipynb"), ("papermill_runs/recipes", "*.yaml"), ("papermill_runs/studies", "*.yaml"), ("papermill_runs/slurm", "*.yaml")):
            for file in sorted(Path(source).glob(pattern)):
                self.copy_file(str(file), str(self._target(source) / file.name))

    def _target(self, source):
        folder = Path(self.build_lib) / "autohdr" / "resources" / Path(source).name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["autohdr", "autohdr.*"]),
    package_data={"autohdr": ["samples/*.csv", "samples/*/*", "looks/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
