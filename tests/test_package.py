"""The package: what importing it loads, what it exports, what its wheel holds."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.version import Version

import maskevolve

ROOT = Path(__file__).parents[1]
HOSTS = {"timm", "transformers", "lightly", "pytorch_lightning", "lightning", "stable_pretraining", "monai"}


def python(code):
    """What an interpreter of its own prints, one JSON value a line."""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def imported():
    """One process imports the package, then its integrations, then cuts, with and without what it may use."""
    names = ("package", "integrations", "torch", "auto without PyMaxflow", "pymaxflow", "no pymaxflow")
    code = """if True:
        import json, sys, torch
        before = set(sys.modules)
        def tell(fact): print(json.dumps(fact))
        def loaded(): return sorted(set(sys.modules) - before)
        def cut(solver): return GraphCutPartitioner(solver=solver)(torch.rand(1, 16, 16)).shape

        import maskevolve
        tell(loaded())
        import maskevolve.integrations
        tell(loaded())

        from maskevolve import GraphCutPartitioner
        cut("torch")
        tell("maxflow" in sys.modules)
        sys.modules["maxflow"] = None
        tell(cut("auto"))
        del sys.modules["maxflow"]
        cut("pymaxflow")
        tell("maxflow" in sys.modules)
        sys.modules["maxflow"] = None
        try:
            cut("pymaxflow")
        except ImportError as error:
            tell(str(error))"""
    return dict(zip(names, python(code), strict=True))


def test_import_needs_none_of_the_optional_packages(imported):
    assert {"maskevolve.masks", "maskevolve.parts", "maskevolve.teachers"} <= set(imported["package"])
    roots = {name.split(".")[0] for name in imported["package"]}
    assert not roots & {*HOSTS, "torchvision", "matplotlib", "triton", "maxflow", "scipy"}


def test_integrations_load_no_host(imported):
    assert "maskevolve.integrations.mae" in imported["integrations"]
    assert not {name.split(".")[0] for name in imported["integrations"]} & HOSTS


def test_import_loads_nothing_that_takes_seconds(imported):
    """Of torch, and of what torch itself imports late: its compiler, sharding, exporters, sympy."""
    slow = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.distributed.fsdp", "torch.onnx", "sympy")
    assert not [name for name in imported["integrations"] if name.startswith(slow)]


def test_pymaxflow_is_imported_only_where_it_solves(imported):
    assert not imported["torch"]
    assert imported["pymaxflow"]


def test_works_without_pymaxflow_and_says_what_to_install(imported):
    assert imported["auto without PyMaxflow"] == [1, 16]
    assert "PyMaxflow" in imported["no pymaxflow"]


def test_works_without_triton_and_hosts_and_says_what_to_install():
    """In one process in which neither Triton nor any host can be imported."""
    code = f"""if True:
        import json, sys, torch, warnings
        sys.modules.update(dict.fromkeys({["triton", *HOSTS]}))
        warnings.simplefilter("error")
        from maskevolve import EvolvingMask, GraphCutPartitioner
        from maskevolve.integrations import apply_to_lightly, lightning_callback, trainer_callback
        parts = GraphCutPartitioner()(torch.rand(1, 16, 16))
        EvolvingMask(1).set_epoch(0)(torch.rand(1, 16, 3), parts=parts)
        for call in (
            lambda: GraphCutPartitioner(solver="triton")(torch.rand(1, 16, 16)),
            lambda: trainer_callback(None),
            lambda: lightning_callback(None),
            lambda: apply_to_lightly(torch.nn.Identity(), None),
        ):
            try:
                call()
            except ImportError as error:
                print(json.dumps(str(error)))"""
    named = [re.search(r"pip install '?([\w-]+)", message)[1] for message in python(code)]
    assert named == ["triton", "transformers", "pytorch-lightning", "lightly"]


def test_imports_run_one_way():
    """Masks know no parts, parts know no masks, neither knows teachers, and no one but hosts' files integrations."""
    rooms = {"masks": {"parts", "teachers", "integrations"}, "parts": {"masks", "teachers", "integrations"}}
    for room, others in {**rooms, "teachers": {"integrations"}}.items():
        for path in (ROOT / "maskevolve" / room).rglob("*.py"):
            named = re.findall(r"^\s*(?:from|import) (?:\.+|maskevolve\.)(\w+)", path.read_text(), re.MULTILINE)
            assert not others & set(named), path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files of the wheel, their contents by name, and the names in the sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    assert next(out.glob("*.whl")).stat().st_size < 200_000
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel, tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        return {name: wheel.read(name) for name in wheel.namelist()}, {
            path.split("/", 1)[-1] for path in sdist.getnames()
        }


def test_wheel_and_sdist_hold_every_module_the_type_marker_and_the_licence(built):
    wheel, sdist = built
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "maskevolve").rglob("*.py")} | {"maskevolve/py.typed"}
    assert {name for name in wheel if ".dist-info/" not in name} == modules
    assert any(name.endswith("LICENSE") for name in wheel)
    assert modules | {"README.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= sdist


def test_every_link_of_the_page_on_pypi_is_whole(built):
    (metadata,) = (text for name, text in built[0].items() if name.endswith(".dist-info/METADATA"))
    message = message_from_bytes(metadata)
    addresses = dict(line.split(", ") for line in message.get_all("Project-URL"))
    assert {"Documentation", "Source", "Issues", "Changelog", "Paper"} <= addresses.keys()
    page = message.get_payload()
    links = re.findall(r'\]\(([^)]+)|(?:src|srcset|href)="([^"]+)', page)
    assert links
    assert all("".join(link).startswith(("https://", "#")) for link in links)
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    assert code.findall(page) == code.findall((ROOT / "README.md").read_text())


def test_citation_has_the_version_of_the_package():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == maskevolve.__version__


def test_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed():
    allowed = dict(re.findall(r"^    ([\w-]+)\S*>=([\d.]+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE))
    assert {"torch", "numpy", "timm", "transformers"} <= allowed.keys()
    for name, version in allowed.items():
        assert Version(tested[name]) == Version(version), name


def test_exports_are_those_of_the_contract():
    masks = {"RandomMask", "GridMask", "BlockMask", "PartMask", "TubeMask", "EvolvingMask"}
    masks |= {"Masking", "MaskedPatches", "MaskGenerator"}
    parts = {"GraphCutPartitioner", "EMPartitioner", "TubePartitioner", "PartHierarchy", "parts_from_segmentation"}
    assert set(maskevolve.__all__) == masks | parts | {"PartTeacher", "FrozenTeacher"}
    assert all(hasattr(maskevolve, name) for name in maskevolve.__all__)
