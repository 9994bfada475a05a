"""Hand what settings.ini says to setuptools."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """What ships in data/: the chapters read results, Colab opens a chapter alone, and RefPhotos is known by name. A wheel brings copies."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("data/results", Path(self.build_lib, "ris_nb", "course", "results"), dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))
            shutil.copytree("data/refphotos", Path(self.build_lib, "ris_nb", "data", "refphotos"), dirs_exist_ok=True)


ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]

# A package index shows the README away from the repository: its pictures and links need whole addresses there.
readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{cfg['git_url']}/raw/{cfg['branch']}/", readme)
readme = re.sub(r"(\]\()(?!\w+:|#)", rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", readme)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Source": cfg["git_url"], "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    classifiers=[f"Development Status :: {statuses[int(cfg['status']) - 1]}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}",
                 *(f"Programming Language :: Python :: {version}" for version in cfg["py_versions"].split())],
    keywords=cfg["keywords"],
    license_expression=cfg["license_name"],
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["ris_nb", "ris_nb.*"]),
    package_data={"ris_nb": ["checkpoints/*/*"], "ris_nb.data": ["bert-base-uncased-vocab.txt", "clip-bpe-vocab.txt.gz", "mirrors.json"], "ris_nb.encoders": ["*.safetensors"],
                  "ris_nb.recipes": ["published.json"], "ris_nb.explore": ["explore.ipynb", "word_game/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"colab": cfg["colab_requirements"].split(), "explore": cfg["explore_requirements"].split(), "import": cfg["import_requirements"].split(),
                    "site": cfg["site_requirements"].split(),
                    "lab": (cfg["lab_requirements"] + " " + cfg["explore_requirements"]).split(),
                    "dev": " ".join(cfg[f"{name}_requirements"] for name in ("dev", "lab", "explore", "import", "site")).split()},
    cmdclass={"build_py": BuildWithData},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
