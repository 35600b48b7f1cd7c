"""What each process of the tests under torchrun does, one function a host: `trainers.py HOST FOLDER`."""

import sys
from pathlib import Path

import torch

EPOCHS = 2


def hugging_face(folder):
    import test_vit_mae as tests

    trainer, evolution = tests.make_trainer(folder, epochs=EPOCHS, count=16)
    return evolution, trainer.model, trainer.train


def lightly(folder):
    import test_lightly as tests

    mae = tests.make()
    evolution = tests.evolve(mae, EPOCHS)
    # Lightly's encoder has a mask token, which an MAE does not use.
    trainer = tests.make_trainer(evolution, folder, EPOCHS, devices=2, strategy="ddp_find_unused_parameters_true")
    return evolution, mae, lambda: trainer.fit(mae, tests.loader(16))


def stable_pretraining(folder):
    import test_stable_pretraining as tests

    module = tests.make_module()
    evolution = tests.evolve(module, EPOCHS)
    trainer = tests.make_trainer(evolution, folder, EPOCHS, devices=2, strategy="ddp")
    return evolution, module, lambda: trainer.fit(module, tests.loader(16))


def main(host, folder):
    for name in ("tests", "examples"):
        sys.path.insert(0, str(Path(__file__).parents[1] / name))
    torch.set_num_threads(1)
    evolution, model, train = globals()[host](folder)
    masks, draw = [], evolution.mask
    evolution.mask = lambda *args: masks.append(draw(*args)) or masks[-1]
    train()
    states = {
        "masks": [masked.mask for masked in masks],
        "model": model.state_dict(),
        "evolution": evolution.state_dict(),
    }
    torch.save(states, Path(folder) / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
