"""The code of the README and of docs/ runs as it stands; its links lead somewhere; its versions are true."""

import inspect
import pydoc
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import pytorch_lightning
import torch
import transformers
from lightly_mae import MAE as LightlyMAE
from monai.networks.nets import MaskedAutoEncoderViT
from packaging.version import Version
from patch_mae import PatchEmbed, PatchMAE
from timm.models.vision_transformer import VisionTransformer
from torch.optim.swa_utils import AveragedModel
from vits import MAE

import maskevolve
from maskevolve import EvolvingMask, GraphCutPartitioner, GridMask, PartTeacher, integrations, schedule, viz

HOME = Path(__file__).parents[1]
PAGES = {str(page.relative_to(HOME)): page for page in [HOME / "README.md", *sorted((HOME / "docs").rglob("*.md"))]}
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 1, "image_size": 64, "patch_size": 16}


def an_mae():
    """What a reader has who trains an MAE."""
    torch.manual_seed(0)
    model = MAE()
    labels = (torch.arange(64 * 64).view(1, 64, 64) // 2048).expand(2, -1, -1)  # two halves
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {"model": model, "optimizer": optimizer, "epochs": 4, "epoch": 0, "label_maps": labels}


def an_evolution():
    names = an_mae()
    teacher = PartTeacher(names["model"], GraphCutPartitioner(), total_epochs=4)
    return {**names, "evolution": integrations.apply_to_mae(names["model"], EvolvingMask(4), teacher), "torch": torch}


def a_vit():
    """What a reader has who masks by hand; the images are not square."""
    torch.manual_seed(0)
    vit = VisionTransformer((128, 1024), 16, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    images = torch.randn(2, 1, 128, 1024)
    training = {"epochs": 2, "epoch": 1, "images": images, "patches": vit.patch_embed(images)}
    return {"vit": vit, "average": AveragedModel(vit), "torch": torch, **training}


def a_trainer():
    decoder = {"decoder_hidden_size": 48, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 1}
    arguments = transformers.TrainingArguments("out", num_train_epochs=2, report_to=[], disable_tqdm=True, use_cpu=True)
    images = [{"pixel_values": torch.randn(3, 64, 64)} for _ in range(8)]
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **decoder))
    names = {"model": model, "epochs": 2, "training_args": arguments, "images": images}
    return {**names, "Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}


def run_mim():
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SIZES))
    return {"model": model, "training_args": transformers.TrainingArguments("out", num_train_epochs=3)}


def a_video_mae():
    model, embed = PatchMAE(3, (16, 32, 32), (2, 8, 8), width=32, depth=1), PatchEmbed(3, (16, 32, 32), (2, 8, 8), 8)
    return {"model": model, "embed": embed, "epochs": 2, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


def a_monai():
    model = MaskedAutoEncoderViT(1, (16, 16, 16), (4, 8, 8), 24, 32, 1, 2, 0.75, 24, 32, 1, 2)
    return {"model": model, "epochs": 2, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


def a_lightning_module():
    vit = VisionTransformer(64, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    return {"model": LightlyMAE(vit, lr=1e-3, decoder_width=32), "epochs": 2, "pl": pytorch_lightning}


def a_module_of_stable_pretraining():
    pytest.importorskip("stable_pretraining", reason="runs in .ci/run, in an environment of its own")
    import test_stable_pretraining as tests

    return {"module": tests.make_module(), "epochs": 2}


SETTINGS = {
    **dict.fromkeys(("README.md", "docs/index.md", "docs/quickstart.md", "docs/hosts/mae.md"), an_mae),
    "docs/masks.md": a_vit,
    "docs/hosts/index.md": an_evolution,
    "docs/clips.md": a_video_mae,
    "docs/hosts/monai.md": a_monai,
    "docs/hosts/timm.md": lambda: {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1), "epochs": 4, "epoch": 0},
    "docs/hosts/vit_mae.md": a_trainer,
    "docs/hosts/mim.md": run_mim,
    "docs/hosts/lightly.md": a_lightning_module,
    "docs/hosts/stable_pretraining.md": a_module_of_stable_pretraining,
}
"""What the reader of a page has before it; nothing where a page is not named."""


WITH_TESTS_OF_THEIR_OWN = ("docs/quickstart.md", "docs/hosts/vit_mae.md")


def read(file):
    return (HOME / file).read_text("utf-8")


def blocks(page):
    return re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)


def watched(evolution):
    """A list that grows with the alpha and the mask of each draw, and whether the model trains."""
    drawn, draw = [], evolution.mask

    def mask(*args, **kwargs):
        masked = draw(*args, **kwargs)
        drawn.append((evolution.student.training, float(evolution.masking.alpha), masked.mask))
        return masked

    evolution.mask = mask
    return drawn


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the blocks of a page: one that imports begins anew, the others go on with the one above."""
    monkeypatch.chdir(tmp_path)

    def run(page, containing=""):
        names = {}
        for block in blocks(page):
            if containing in block:
                names = SETTINGS.get(page, dict)() if not names or "import " in block else names
                exec(block, names)
                yield names

    return run


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in WITH_TESTS_OF_THEIR_OWN])
def test_the_code_of_each_page_runs(page, run):
    for names in run(page):
        assert "again" not in names or torch.equal(names["first"], names["again"])


@pytest.mark.parametrize("page", [page for page, names in SETTINGS.items() if names is an_mae])
def test_three_lines_make_an_mae_evolve(page):
    (block,) = [block for block in blocks(page) if "apply_to_mae(model, EvolvingMask(epochs), " in block]
    names, removed, images = an_mae(), [], torch.randn(2, 3, 64, 64)
    once, each_epoch = re.split(r"\n# at the start of each epoch.*\n", block)
    exec(once, names)
    for names["epoch"] in range(4):
        exec(each_epoch, names)
        loss, _, mask = names["model"](images)
        removed.append(mask)
        loss.backward()
        names["optimizer"].step()
    assert names["evolution"].masking.alpha == 1
    assert names["evolution"].teacher.model.n_averaged == 4
    assert not torch.equal(removed[0], removed[-1])


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/hosts/") and "index" not in page])
def test_lines_to_paste_are_at_most_five(page):
    lines = [line for line in blocks(page)[0].splitlines() if line and not line.startswith("#")]
    pasted = [line for line in lines if not re.match(r"(from|import) ", line)]
    assert len(pasted) <= 5


def test_evaluations_of_the_trainer_can_be_compared(run):
    *_, names = run("docs/hosts/vit_mae.md")
    trainer, drawn = names["trainer"], watched(names["evolution"])
    names["teacher"].decay = 1  # so that parts do not change
    trainer.train()
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 2
    assert names["teacher"].model.n_averaged == 2
    assert [alpha for trains, alpha, _ in drawn if trains] == pytest.approx([0.5**0.5, 1])  # after evaluations, too
    (_, first, one), (_, second, other) = (draw for draw in drawn if not draw[0])
    assert first == second == 1
    assert torch.equal(one, other)


def test_what_the_page_of_run_mim_says(run):
    (names,) = run("docs/hosts/mim.md", "training_args")
    names["evolution"].set_epoch(2)
    images, given = torch.randn(2, 3, 64, 64), torch.zeros(2, 16, dtype=torch.bool)
    names["model"].train()(pixel_values=images, bool_masked_pos=given)
    assert names["evolution"].last_mask.sum() == 2 * 10
    (names,) = run("docs/hosts/mim.md", "last_mask")
    assert (names["evolution"].last_mask.sum(1) == 154).all()
    assert names["loss"] > 0


def test_a_random_masking_that_returned_a_dict(run):
    *_, names = run("docs/hosts/mae.md")

    class Mine(MAE):
        masked_patches = names["masked_patches"]

    model, x = Mine(), torch.randn(2, 64, 48)
    evolution = integrations.apply_to_mae(model, GridMask())
    model.patch_embed(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.masked_patches(x, 0.75)["mask"], evolution.last_mask)


def test_masks_by_hand(run):
    (names,) = run("docs/masks.md", "teacher.update(vit)")
    assert names["visible"].shape == (2, 128, 48)
    assert names["masking"].alpha == 1
    assert names["state"]["teacher"]["epoch"] == 1


def test_the_parts_of_a_moving_average_of_your_own(run):
    (names,) = run("docs/masks.md", "token_affinity(average")
    assert names["parts"].shape == (2, 512)
    assert names["parts"].max() == 9


def test_the_script_of_the_quickstart_draws_its_picture(run):
    *_, names = run("docs/quickstart.md")
    assert Path("evolution.png").stat().st_size > 10_000
    first, *_, last = names["drawn"].values()
    assert [len(parts.unique()) > 10 for parts in (first[1][0], last[1][0])] == [True, False]
    assert names["evolution"].masking.alpha == 1


def test_every_call_of_the_tables_exists():
    for page in ("README.md", "docs/hosts/index.md"):
        named = set(re.findall(r"`(apply_to_\w+)[(`]", read(page)))
        assert named == {name for name in integrations.__all__ if name.startswith("apply_to_")}


def test_every_public_name_is_on_a_page_of_the_api():
    named = [name for page in PAGES.values() for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    shown = {name: pydoc.locate(name) for name in named}
    assert None not in shown.values(), shown
    for module in (maskevolve, maskevolve.masks, maskevolve.parts, maskevolve.teachers, integrations, schedule, viz):
        for name, value in ((name, getattr(module, name)) for name in module.__all__):
            is_shown = any(value is other for other in shown.values())
            assert is_shown or not (inspect.isclass(value) or inspect.isfunction(value)), f"{module.__name__}.{name}"


@pytest.mark.parametrize("page", ["README.md", "docs/hosts/index.md"])
def test_versions_are_those_of_the_files(page):
    oldest = dict(re.findall(r"^    ([\w-]+)(?:\[\w+\])?>=([\d.]+)$", read("setup.cfg"), re.MULTILINE))
    newest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", read(".ci/constraints.txt"), re.MULTILINE))
    told = re.findall(r"\b([A-Za-z][\w-]+) (\d+(?:\.\d+)+)(?:\s+to\s+(\d+(?:\.\d+)+))?", read(page))
    told = [row for row in told if row[0] in newest]
    hosts = {"timm", "transformers", "lightly", "stable-pretraining", "monai"}
    assert page == "README.md" or hosts <= {name for name, *_ in told}
    for name, first, last in told:
        low, high = Version(oldest.get(name, newest[name])), Version(newest[name])
        assert Version(first) == low or (Version(first) == high and not last), name
        assert not last or Version(last) == high, name


def anchors(page):
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    in_html = re.findall(r"<(?:img|a) ", text)
    assert page == "README.md" or not in_html, "mkdocs follows links in Markdown only: write ![...](...)"
    links = re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text) + re.findall(r'(?:src|href)="(?!\w+:)([^"]+)"', text)
    for path, _, anchor in (unquote(link).partition("#") for link in links):
        found = PAGES[page].parent / path if path else PAGES[page]
        assert found.exists(), path
        assert not anchor or anchor in anchors(found), anchor


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w/]+\.md$", read("mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == sorted(page.removeprefix("docs/") for page in PAGES if page != "README.md")


def test_the_address_of_the_repository_stands_in_one_place():
    """And in notebooks, which docs/notebooks/make.py writes."""
    owner, name = re.search(r"^url = https://github\.com/(\S+)/(\S+)$", read("setup.cfg"), re.MULTILINE).groups()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HOME, capture_output=True, check=True)
    files = [file for file in listed.stdout.decode().splitlines() if re.search(r"\.(md|py|cfg|toml|ya?ml|cff)$", file)]
    address = re.compile(rf"github\.com/{owner}/{name}|{owner}\.github\.io", re.IGNORECASE)
    assert [file for file in files if (HOME / file).exists() and address.search(read(file))] == ["setup.cfg"]
