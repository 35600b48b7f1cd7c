"""The README's code runs as it stands, and its tables are those of the result files."""

import re
from pathlib import Path

import pytest
import pytorch_lightning
import tables
import torch
from lightly_mae import MAE as LightlyMAE
from timm.models.vision_transformer import VisionTransformer
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining
from vits import MAE

from maskevolve.integrations import apply_to_lightly, apply_to_mae, apply_to_timm, apply_to_vit_mae

README = Path(__file__).parents[1] / "README.md"


def blocks(containing=""):
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [block for block in found if containing in block]


def test_three_lines_make_an_mae_evolve():
    torch.manual_seed(0)
    model = MAE()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {"model": model, "optimizer": optimizer, "epochs": 4, "epoch": 0}
    (block,) = blocks("apply_to_mae")
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
    (block,) = blocks(host)
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
    named = set(re.findall(r"`(apply_to_\w+)\(", README.read_text()))
    assert named == {call.__name__ for call in (apply_to_lightly, apply_to_mae, apply_to_timm, apply_to_vit_mae)}


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


def test_the_other_examples_run():
    names = {}
    for block in blocks("import torch\n") + blocks("affinity = "):
        exec(block, names)
    assert names["visible"].shape == (8, 49, 768)
    assert names["parts"].shape == (8, 196)
    assert names["parts"].max() < 10


def test_the_tables_are_those_of_the_result_files():
    assert tables.render(README.read_text()) == README.read_text(), "run python benchmarks/tables.py"
