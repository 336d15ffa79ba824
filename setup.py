"Package metadata comes from `settings.ini`, nbdev's configuration: edit it there"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def words(key: str) -> list[str]:
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), "medclip_nb.templates",
              "medclip_nb.cards", "medclip_nb.prompt_packs"],
    # they travel with the package
    package_dir={"medclip_nb.templates": "nbs/experiments", "medclip_nb.cards": "data/cards",
                 "medclip_nb.prompt_packs": "data/prompts"},
    package_data={"medclip_nb.templates": ["[a-z]*.ipynb", "suites/*.yaml", "params/*.yaml"],
                  "medclip_nb.cards": ["*.yaml"], "medclip_nb.prompt_packs": ["*.yaml"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={
        "dev": words("dev_requirements") + words("docs_requirements"),
        "docs": words("docs_requirements"),
        "all": words("optional_requirements"),
        "mlflow": words("mlflow_requirements"),
        "search": words("search_requirements"),
        "dask": words("dask_requirements"),
    },
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
