"""The part of the metadata that setup.cfg cannot hold: links, and the README with the whole links that PyPI needs."""

import configparser
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
config = configparser.RawConfigParser()
config.read(HERE / "setup.cfg", "utf-8")
REPOSITORY = config["metadata"]["url"]
OWNER, NAME = REPOSITORY.split("/")[-2:]

readme = (HERE / "README.md").read_text("utf-8")
readme = re.sub(r'(src(?:set)?="|!\[[^]]*\]\()(?!\w+:)', rf"\1{REPOSITORY}/raw/main/", readme)
readme = re.sub(r'(href="|\]\()(?!\w+:|#)', rf"\1{REPOSITORY}/blob/main/", readme)

setup(
    long_description=readme,
    project_urls={
        "Documentation": f"https://{OWNER.lower()}.github.io/{NAME}/",
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Paper": "https://doi.org/10.1109/CVPR52729.2023.01001",
    },
)
