"""The code of the README and of docs/ runs as it stands, and their figures are those of the result files."""

import re
from pathlib import Path

import pytest
import pytorch_lightning
import tables
import torch
from lightly_mae import MAE as LightlyMAE
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from vits import MAE

from maskevolve import integrations

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]


def blocks(containing):
    text = "\n".join(page.read_text() for page in PAGES)
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if containing in block]


def test_three_lines_make_an_mae_evolve():
    torch.manual_seed(0)
    model = MAE()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {"model": model, "optimizer": optimizer, "epochs": 4, "epoch": 0}
    (block,) = blocks("evolution.follow(optimizer)")
    once, each_epoch = re.split(r"\n# at the start of each epoch.*\n", block)
    exec(once, names)
    images, removed = torch.randn(2, 3, 64, 64), []
    for names["epoch"] in range(4):
        exec(each_epoch, names)
        loss, _, mask = model(images)
        removed.append(mask)
        loss.backward()
        optimizer.step()
    assert names["evolution"].masking.alpha == 1
    assert names["evolution"].teacher.model.n_averaged == 4
    assert not torch.equal(removed[0], removed[-1])


@pytest.mark.parametrize("host", ["apply_to_mae", "apply_to_vit_mae", "apply_to_lightly"])
def test_lines_to_paste_are_at_most_five(host):
    block = blocks(host)[0]
    assert sum(line != "" and not line.startswith("#") for line in block.splitlines()) <= 5


def test_lines_by_hand():
    torch.manual_seed(0)
    vit = VisionTransformer((128, 1024), 16, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    images = torch.randn(2, 1, 128, 1024)
    names = {"vit": vit, "epochs": 2, "epoch": 1, "images": images, "patches": vit.patch_embed(images), "torch": torch}
    (block,) = blocks("teacher.update(vit)")
    exec(block, names)
    assert names["visible"].shape == (2, 128, 48)
    assert names["masking"].alpha == 1
    assert names["state"]["teacher"]["epoch"] == 1


def test_every_call_of_the_table_exists():
    named = set(re.findall(r"`(apply_to_\w+)\(", PAGES[0].read_text()))
    assert named == {name for name in integrations.__all__ if name.startswith("apply_to_")}


def test_hugging_face_lines(tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "decoder_num_hidden_layers": 1}
    config = ViTMAEConfig(image_size=64, patch_size=16, decoder_hidden_size=48, decoder_num_attention_heads=3, **sizes)
    arguments = TrainingArguments(tmp_path, num_train_epochs=2, report_to=[], disable_tqdm=True, use_cpu=True)
    images = [{"pixel_values": torch.randn(3, 64, 64)} for _ in range(8)]
    names = {"model": ViTMAEForPreTraining(config), "epochs": 2, "training_args": arguments, "images": images}
    names["Trainer"] = Trainer
    exec(blocks("trainer_callback")[0], names)
    names["trainer"].train()
    assert names["evolution"].masking.alpha > 0.9
    assert names["teacher"].model.n_averaged == 2


def test_lightly_lines():
    vit = VisionTransformer(64, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    names = {"model": LightlyMAE(vit, lr=1e-3, decoder_width=32), "epochs": 2, "pl": pytorch_lightning}
    exec(blocks("lightning_callback")[0], names)
    assert names["evolution"].teacher is names["teacher"]


def test_lines_of_run_mim(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(**sizes, image_size=64, patch_size=16)
    model, arguments = ViTForMaskedImageModeling(config), TrainingArguments(tmp_path, num_train_epochs=3)
    names = {"model": model, "training_args": arguments}
    (block,) = blocks("apply_to_mim")
    exec(block, names)
    names["evolution"].set_epoch(2)
    model.train()(pixel_values=torch.randn(2, 3, 64, 64), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    assert names["evolution"].last_mask.sum() == 2 * 10
    assert names["trainer_callback"](names["evolution"])


def test_parts_that_come_with_a_batch():
    model, labels = MAE(), torch.arange(64 * 64).view(1, 64, 64) // 2048
    (block,) = blocks("evolution.see(parts=label_maps)")
    names = {"model": model, "epochs": 1, "label_maps": labels.expand(2, -1, -1)}
    exec(block, names)
    names["evolution"].set_epoch(0)  # the last one
    _, _, mask = model(torch.randn(2, 3, 64, 64))
    assert (mask.view(2, 2, 32).mean(2).sort(1).values == torch.tensor([0.5, 1.0])).all()  # halves; three quarters go


ALONE = [block for block in blocks("") if not re.search(r"\(model\b|\bteacher\.update\(vit\)", block)]


@pytest.mark.parametrize("block", ALONE, ids=[block.splitlines()[-1] for block in ALONE])
def test_examples_that_stand_alone(block):
    names = {}
    exec(block, names)
    assert "again" not in names or torch.equal(names["first"], names["again"])


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_figures_are_those_of_the_result_files(page):
    assert tables.render(page.read_text()) == page.read_text(), "run python benchmarks/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()) + re.findall(r'src="([^"]+)"', page.read_text()):
        assert (page.parent / link).exists(), link
