"""Hand what settings.ini says to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license=cfg["license_name"],
    license_files=["LICENSE"],
    packages=find_packages(include=["ris_nb", "ris_nb.*"]),
    package_data={"ris_nb": ["*.safetensors", "mirrors.json", "published.json", "explore.ipynb", "checkpoints/*/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"explore": cfg["explore_requirements"].split(),
                    "lab": (cfg["lab_requirements"] + " " + cfg["explore_requirements"]).split(),
                    "dev": " ".join(cfg[f"{name}_requirements"] for name in ("dev", "lab", "explore")).split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
