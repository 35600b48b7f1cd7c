"""Evolving masks in Hugging Face's ViTMAE and under its Trainer, against the real package."""

import json
import pickle

import pytest
import torch
import vit_mae as example
from hosts import VIT, VIT_MAE, anatomy, make_teacher, pictures
from test_pretrain import equal
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from vits import watch_calls

from maskevolve import EvolvingMask, RandomMask
from maskevolve.integrations import apply_to_vit_mae, trainer_callback
from maskevolve.teachers.attention import attention_affinity, attention_modules

CLASSES = [ViTMAEForPreTraining, ViTMAEModel]


def make(cls=ViTMAEForPreTraining, **options):
    torch.manual_seed(0)
    return cls(ViTMAEConfig(**VIT, **VIT_MAE, **options))


def evolve(model, epochs=4):
    return apply_to_vit_mae(model, EvolvingMask(epochs), make_teacher(model, total_epochs=epochs))


def result(output):
    return output.loss if hasattr(output, "loss") else output.last_hidden_state


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_permutation_same_loss(cls, attention):
    model, images = make(cls, attn_implementation=attention), pictures()
    evolution = apply_to_vit_mae(model, RandomMask())
    patched = model(images)
    assert patched.mask.sum(1).tolist() == [48, 48]
    evolution.remove()
    own = model(images, noise=patched.ids_restore.float())
    assert torch.equal(own.ids_restore, patched.ids_restore)
    assert torch.equal(own.mask, patched.mask)
    assert torch.equal(result(own), result(patched))


@pytest.mark.parametrize("cls", CLASSES)
def test_noise_keeps_its_meaning(cls):
    model, images = make(cls).eval(), pictures()
    noise = torch.rand(2, 64)
    own = model(images, noise=noise)
    evolve(model).set_epoch(3)
    given = model(images, noise=noise)
    assert torch.equal(given.ids_restore, own.ids_restore)
    assert torch.equal(result(given), result(own))
    assert not torch.equal(model(images).mask, own.mask)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_affinity_is_what_the_model_reports_of_all_patches(cls, attention):
    model, images = make(cls, attn_implementation="eager", mask_ratio=0.0).eval(), pictures()
    in_order = torch.arange(64.0).expand(2, -1)
    with torch.no_grad():
        maps = torch.stack(model(images, noise=in_order, output_attentions=True).attentions)
    model = make(cls, attn_implementation=attention).eval()
    assert len(attention_modules(model)) == 2, "the decoder's are not counted"
    affinity = attention_affinity(model, images)
    torch.testing.assert_close(affinity, maps.mean((0, 2))[:, 1:, 1:], rtol=1e-4, atol=1e-6)
    assert affinity.std() > 0.1 * affinity.mean()
    assert anatomy(model) == anatomy(make(cls, attn_implementation=attention).eval())
    torch.testing.assert_close(attention_affinity(model, images, [-1]), maps[-1].mean(1)[:, 1:, 1:])


@pytest.mark.parametrize("image_size", [(64, 64), (64, 32)])
def test_plain_vit_of_hugging_face_is_read_too(image_size):
    vit = ViTModel(ViTConfig(**{**VIT, "image_size": image_size}))
    assert make_teacher(vit)(pictures(2, *image_size)).shape == (2, image_size[0] * image_size[1] // 64)


def test_images_of_several_sizes_and_batches_of_changing_size():
    model = make()
    evolve(model).set_epoch(2)
    for batch, height, width in ((2, 64, 64), (3, 96, 48), (1, 48, 96), (2, 64, 64)):
        output = model(pictures(batch, height, width), interpolate_pos_encoding=True)
        patches = height * width // 64
        assert output.mask.shape == (batch, patches)
        assert (output.mask.sum(1) == patches - int(patches * 0.25)).all()
        output.loss.backward()


def test_half_precision_model():
    model = make().bfloat16()
    evolve(model).set_epoch(2)
    assert model(pictures().bfloat16()).logits.dtype == torch.bfloat16


def test_a_plain_vit_is_refused():
    with pytest.raises(TypeError, match="ViTModel is no ViTMAE"):
        apply_to_vit_mae(ViTModel(ViTConfig(**VIT)), RandomMask())


# Under the Trainer.


class Images(torch.utils.data.Dataset):
    def __init__(self, count=12):
        self.images = pictures(count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def make_trainer(out, *, epochs=3, count=12, resume_from=None, **options):
    model = make()
    evolution = evolve(model, epochs)
    settings = {"per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3, **options}
    args = TrainingArguments(
        str(out), num_train_epochs=epochs, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    ours = trainer_callback(evolution, resume_from)
    return Trainer(model, args, train_dataset=Images(count), callbacks=[ours]), evolution


ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(("options", "steps"), [({}, 3), (ACCUMULATED, 2)], ids=["", "accumulated"])
def test_trainer_moves_the_epoch_and_the_teacher(tmp_path, monkeypatch, options, steps):
    trainer, evolution = make_trainer(tmp_path, **options)
    epochs, updates = watch_calls(monkeypatch, evolution)
    trainer.train()
    assert epochs == pytest.approx([step / steps for step in range(3 * steps)])
    assert len(updates) == evolution.teacher.model.n_averaged == 3 * steps
    assert evolution.masking.alpha == 1


def test_skipped_steps_do_not_move_the_teacher():
    class Optimizer:
        step_was_skipped = True

    evolution = evolve(make())
    callback = trainer_callback(evolution)
    callback.on_optimizer_step(None, None, None, optimizer=Optimizer())
    assert evolution.teacher.model.n_averaged == 0
    callback.on_optimizer_step(None, None, None, optimizer=torch.optim.SGD([torch.zeros(1)], 1))
    assert evolution.teacher.model.n_averaged == 1


@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_trainer_options(tmp_path, options):
    trainer, evolution = make_trainer(tmp_path, gradient_checkpointing=True, epochs=2, **options)
    trainer.train()
    assert evolution.teacher.model.n_averaged == 6
    assert evolution.masking.alpha == 1


# transformers loads no optimizer with an older torch: https://nvd.nist.gov/vuln/detail/CVE-2025-32434
resumes = pytest.mark.skipif(torch.__version__ < (2, 6), reason="transformers resumes with torch 2.6 and newer only")


@resumes
@pytest.mark.parametrize(("step", "moved"), [(3, True), (5, False)], ids=["moved", "here"])
def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path, step, moved):
    whole, expected = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=step)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert (checkpoint / "evolution.pt").exists()
    torch.manual_seed(123)
    out = tmp_path / "elsewhere" if moved else tmp_path / "whole"
    resumed, evolution = make_trainer(out, resume_from=str(checkpoint) if moved else None)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert equal(expected.state_dict()["teacher"], evolution.state_dict()["teacher"])
    assert equal(expected.state_dict()["masking"], evolution.state_dict()["masking"])


class Report(TrainerCallback):
    """What TensorBoard's and other callbacks are given to write."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


class SecondReport(Report):
    """The Trainer warns of two callbacks of one class."""


def test_alpha_and_parts_are_logged_whatever_the_order_of_callbacks(tmp_path):
    before, after, own_log = Report(), SecondReport(), Trainer.log
    trainer, evolution = make_trainer(tmp_path, logging_steps=3)
    evolution.teacher.partitioner.smoothness = 100.0
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.add_callback(after)
    trainer.train()
    for log in (before.logs, after.logs, trainer.state.log_history):
        logs = [entry for entry in log if "loss" in entry]
        assert 1 < logs[0]["num_parts"] < 7, "as many as there are, and not as were asked for"
        assert logs[-1]["num_parts"] == evolution.num_parts
        assert [entry["alpha"] for entry in logs] == pytest.approx(
            [((step / 3 + 1) / 3) ** 0.5 for step in (2, 5, 6)], abs=1e-4
        )
    assert Trainer.log is own_log
    assert "log" not in vars(trainer)


def test_a_model_that_model_init_makes_is_refused(tmp_path):
    evolution, args = evolve(make()), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(
        model_init=lambda: make(),
        args=args,
        train_dataset=Images(4),
        callbacks=[pickle.loads(pickle.dumps(trainer_callback(evolution)))],
    )
    with pytest.raises(ValueError, match="model_init"):
        trainer.train()


def test_the_callback_does_nothing_once_masks_are_removed(tmp_path):
    trainer, evolution = make_trainer(tmp_path, logging_steps=3, save_strategy="epoch")
    evolution.remove()
    trainer.train()
    assert not [entry for entry in trainer.state.log_history if "alpha" in entry]
    assert not list(tmp_path.rglob("evolution.pt"))
    assert evolution.epoch == 0


@resumes
def test_only_weights_that_the_trainer_did_not_load_are_loaded(tmp_path, monkeypatch):
    trainer, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=3, epochs=1)
    trainer.train()
    resumed, _ = make_trainer(tmp_path, epochs=1)
    own, called = ViTMAEForPreTraining.from_pretrained, []

    def from_pretrained(folder):
        called.append(folder)
        saved = own(folder)
        for name, weight in saved.named_parameters():
            if "decoder_embed" in name:  # it has the same name in the checkpoint
                weight.data.zero_()
        return saved

    monkeypatch.setattr(ViTMAEForPreTraining, "from_pretrained", from_pretrained)
    resumed.train(resume_from_checkpoint=True)
    assert len(called) <= 1
    assert equal(trainer.model.state_dict(), resumed.model.state_dict())


def test_parts_travel_with_the_batches_of_the_trainer(tmp_path):
    class Labelled(Images):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "parts": torch.full((64,), index) + torch.arange(64) // 8}

    class PartsTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            parts = inputs.pop("parts")
            evolution.see(parts=parts)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            assert torch.equal(evolution.last_parts, parts)
            return loss

    model = make()
    evolution = apply_to_vit_mae(model, EvolvingMask(2))
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_strategy="no", **settings)
    PartsTrainer(model, args, train_dataset=Labelled(8), callbacks=[trainer_callback(evolution)]).train()
    assert evolution.masking.alpha == 1


@resumes
def test_resuming_without_the_evolution_is_an_error(tmp_path):
    trainer, _ = make_trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    trainer, _ = make_trainer(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"resumed at step 3: pass the folder.*resume_from_checkpoint=folder"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_pretraining_on_photographs_lowers_the_loss_and_raises_alpha(tmp_path):
    small = "--image-size 32 --epochs 4 --batch-size 16"
    trainer = example.main([*small.split(), "--out", str(tmp_path)])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]
    state = torch.load(tmp_path / f"checkpoint-{trainer.state.global_step}" / "evolution.pt", weights_only=True)
    assert state["masking"]["alpha"] == 1
    assert json.loads((tmp_path / f"checkpoint-{trainer.state.global_step}" / "trainer_state.json").read_text())
