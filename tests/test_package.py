"""The package: what importing it loads, what it exports, what its wheel holds."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_import_needs_none_of_the_optional_packages():
    loaded = python(
        "import sys, torch; before = set(sys.modules); import maskevolve; print(*set(sys.modules) - before)"
    )
    assert "maskevolve.masks" in loaded
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {"timm", "torchvision", "matplotlib", "triton", "maxflow", "scipy", "transformers", "lightly"}


def test_using_the_torch_solver_never_links_pymaxflow():
    code = """if True:
        import sys, torch
        from maskevolve import GraphCutPartitioner
        GraphCutPartitioner(solver="torch")(torch.rand(1, 16, 16))
        print("maxflow" in sys.modules)
        GraphCutPartitioner(solver="pymaxflow")(torch.rand(1, 16, 16))
        print("maxflow" in sys.modules)"""
    assert python(code) == ["False", "True"]


def test_works_without_pymaxflow_and_says_what_to_install():
    code = """if True:
        import sys, torch
        sys.modules["maxflow"] = None
        from maskevolve import GraphCutPartitioner
        try:
            GraphCutPartitioner(solver="pymaxflow")(torch.rand(1, 16, 16))
        except ImportError as error:
            print(error)"""
    assert "PyMaxflow" in " ".join(python(code))


def test_works_without_triton_and_says_what_to_install():
    code = """if True:
        import sys, torch, warnings
        sys.modules["triton"] = None
        warnings.simplefilter("error")
        from maskevolve import EvolvingMask, GraphCutPartitioner
        parts = GraphCutPartitioner()(torch.rand(1, 16, 16))
        EvolvingMask(1).set_epoch(0)(torch.rand(1, 16, 3), parts=parts)
        try:
            GraphCutPartitioner(solver="triton")(torch.rand(1, 16, 16))
        except ImportError as error:
            print(error)"""
    assert "pip install triton" in " ".join(python(code))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return out


def test_wheel_and_sdist_hold_every_module_the_type_marker_and_the_licence(built):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "maskevolve").rglob("*.py")}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert modules | {"maskevolve/py.typed"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests", "examples", "benchmarks")) for name in names)
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules | {"maskevolve/py.typed", "README.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= inside


def test_exports_are_those_of_the_contract():
    import maskevolve

    assert set(maskevolve.__all__) == {
        *("RandomMask", "GridMask", "BlockMask", "PartMask", "EvolvingMask", "MaskedPatches"),
        *("GraphCutPartitioner", "EMPartitioner", "PartTeacher", "FrozenTeacher", "parts_from_segmentation"),
        *("Masking", "PartHierarchy"),
    }
    assert all(hasattr(maskevolve, name) for name in maskevolve.__all__)
