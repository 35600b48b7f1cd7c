"""The part of the metadata that setup.cfg cannot hold: the README, with the whole links that PyPI needs."""

import re
from pathlib import Path

from setuptools import setup

FILES = "https://github.com/maskevolve/maskevolve/raw/main/"
PAGES = "https://github.com/maskevolve/maskevolve/blob/main/"

readme = Path(__file__).with_name("README.md").read_text("utf-8")
readme = re.sub(r'(src(?:set)?="|!\[[^]]*\]\()(?!\w+:)', rf"\1{FILES}", readme)
readme = re.sub(r'(href="|\]\()(?!\w+:|#)', rf"\1{PAGES}", readme)

setup(long_description=readme)
