"""Small models of every code base, all of images [B, 3, 64, 64] and 8 x 8 patches, for what holds in each of them."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import timm
import torch
import transformers as hf
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from vits import MAE

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher, integrations

VIT = {"image_size": 64, "patch_size": 8, "initializer_range": 0.2}
VIT |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
DECODER = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}


def make_vit(size=64, **options):
    torch.manual_seed(0)
    return VisionTransformer(size, 8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **options)


def make_teacher(model, **options):
    settings = {"total_epochs": 4, "num_parts": (8, 4), "decay": 0.5, **options}
    return PartTeacher(model, GraphCutPartitioner(), **settings)


def pictures(batch=2, height=64, width=None):
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def anatomy(model):
    """All that an integration could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    modules = {
        name: (set(vars(module)), {hook: dict(getattr(module, hook)) for hook in hooks})
        for name, module in model.named_modules()
    }
    return list(model.state_dict()), modules


def record(evolution, monkeypatch):
    """A list that grows with the masks that are drawn."""
    masks, draw = [], evolution.mask
    monkeypatch.setattr(evolution, "mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    return masks


def lightning_trainer(pl, evolution, out, epochs=3, callbacks=(), **options):
    """A Trainer of pytorch_lightning or lightning.pytorch, which prints nothing."""

    class Seeded(pl.Callback):
        """Lightning leaves random states out of its checkpoints, so a run that is to be resumed exactly must seed."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[integrations.lightning_callback(evolution), Seeded(), *callbacks],
        enable_checkpointing=any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
        default_root_dir=out,
        **quiet,
        **options,
    )


def draw_a_quarter(images, length):
    return utils.random_token_mask((len(images), length), 0.75)


class Plain(nn.Module):
    """Lightly's encoder in a plain module, whose forward draws a mask."""

    def __init__(self, backbone=None, draw=None):
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(make_vit()) if backbone is None else backbone
        self.draw = draw

    def forward(self, images, extra=None):
        draw, length = self.draw or draw_a_quarter, self.backbone.sequence_length
        self.idx_keep, self.idx_mask = draw(images, length)
        return self.backbone.encode(images=images, idx_keep=self.idx_keep)


class Host(NamedTuple):
    apply: Callable[..., Any]
    make: Callable[[], nn.Module]
    loss: Callable[..., Any]
    """Of what the model returns."""
    student: Callable[..., nn.Module] = lambda model: model
    """What a teacher is built from."""
    removed: int = 48

    def evolve(self, model, masking=None, epochs=4, **options):
        teacher = make_teacher(self.student(model), total_epochs=epochs, **options)
        return self.apply(model, masking or EvolvingMask(epochs), teacher)

    def run(self, model, images, seed=1):
        torch.manual_seed(seed)
        return self.loss(model(images))


def of_timm(name, **options):
    size = {"embed_dim": 48, "num_heads": 3, "depth": 2, "patch_size": 8, "num_classes": 9, "patch_drop_rate": 0.75}
    return lambda: timm.create_model(name, **size, **options).train()


def of_hugging_face(name, **options):
    model, config = getattr(hf, name), getattr(hf, f"{name.split('For')[0]}Config")
    return lambda: model(config(**VIT, **options))


def of_stable_pretraining(name):
    def make():
        import test_stable_pretraining as tests

        return tests.make(name)

    return make


def square(output):
    return output.square().mean()


def own_loss(output):
    return output.reconstruction.square().mean() if output.loss is None else output.loss


VIT_MAE = {f"decoder_{name}": value for name, value in DECODER.items()}
HOSTS = {
    "MAE": Host(integrations.apply_to_mae, MAE, lambda output: output[0]),
    "timm": Host(integrations.apply_to_timm, of_timm("vit_tiny_patch16_224", img_size=64), square),
    "NaFlex": Host(integrations.apply_to_timm, of_timm("naflexvit_base_patch16_gap"), square),
    "ViTMAE": Host(integrations.apply_to_vit_mae, of_hugging_face("ViTMAEForPreTraining", **VIT_MAE), own_loss),
    "MIM": Host(
        integrations.apply_to_mim, of_hugging_face("ViTForMaskedImageModeling", encoder_stride=8), own_loss, removed=39
    ),
    "Lightly": Host(integrations.apply_to_lightly, Plain, square, lambda model: model.backbone),
}
if not timm.is_model("naflexvit_base_patch16_gap"):  # before timm 1.0.16
    del HOSTS["NaFlex"]
if find_spec("stable_pretraining"):
    apply, encoder = integrations.apply_to_stable_pretraining, lambda model: model.encoder
    HOSTS["stable_pretraining MAE"] = Host(apply, of_stable_pretraining("MAE"), own_loss, encoder)
    HOSTS["stable_pretraining SimMIM"] = Host(
        apply, of_stable_pretraining("SimMIM"), own_loss, lambda model: model.encoder, removed=38
    )


def make(name):
    torch.manual_seed(0)
    return HOSTS[name].make()
