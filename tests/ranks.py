"""What each of the processes of test_distributed.py does. A file of its own: processes import it by name."""

import copy
import functools

import processes
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vits import MAE

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_mae, apply_to_mim

EPOCHS, STOP = 4, 2
RANKS = 2


def on_ranks(job, folder):
    """Run job(rank) in two processes, and return what it returned in each."""
    processes.start(_join, job, folder, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _join(rank, job, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(job(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def make_mae(rank):
    return MAE(seed=rank), apply_to_mae, lambda model, images: model(images)[0]


def make_mim(rank):
    from transformers import ViTConfig, ViTForMaskedImageModeling

    torch.manual_seed(rank)
    sizes = {"image_size": 64, "patch_size": 8, "encoder_stride": 8}
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, **sizes)
    return ViTForMaskedImageModeling(config), apply_to_mim, lambda model, images: model(images).loss


class Run:
    """A host in DistributedDataParallel, whose ranks began with weights of their own, and its evolving masks."""

    def __init__(self, host, rank, state=None):
        model, apply, self.loss = host(rank)
        teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=EPOCHS, num_parts=(8, 4), decay=0.5)
        self.model = DistributedDataParallel(model)  # finds no unused parameters, and stops where there are some
        self.evolution = apply(self.model, EvolvingMask(EPOCHS), teacher)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.evolution.follow(self.optimizer)
        self.masks, self.first_teacher = [], None
        draw = self.evolution.mask
        self.evolution.mask = lambda *args: self.masks.append(draw(*args)) or self.masks[-1]
        torch.manual_seed(3)  # alike on all ranks
        if state is not None:
            self.load(state)

    def train(self, epochs):
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))  # alike on all ranks
        for epoch in epochs:
            self.evolution.set_epoch(epoch)
            loss = self.loss(self.model, images)
            self.first_teacher = self.first_teacher or self.weights_of_teacher()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def weights_of_teacher(self):
        return copy.deepcopy(self.evolution.teacher.state_dict())

    def state(self):
        parts = self.model.module, self.optimizer, self.evolution
        return copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state()

    def load(self, state):
        for part, value in zip((self.model.module, self.optimizer, self.evolution), state[0], strict=True):
            part.load_state_dict(value)
        torch.set_rng_state(state[1])


def data_parallel(rank, host):
    stopped = Run(host, rank).train(range(STOP))
    state = stopped.state()
    whole, resumed = stopped.train(range(STOP, EPOCHS)), Run(host, rank, state).train(range(STOP, EPOCHS))
    again = Run(host, rank).train(range(EPOCHS))
    return {
        "masks": [masked.mask for masked in whole.masks],
        "masks again": [masked.mask for masked in again.masks],
        "first teacher": whole.first_teacher,
        "teacher": whole.weights_of_teacher(),
        **{name: run.state()[0] for name, run in (("whole", whole), ("resumed", resumed), ("again", again))},
    }


def sharded(rank):
    """FSDP2, with the masks applied before and after the model is sharded."""
    return {name: _sharded(before) for name, before in (("applied before", True), ("applied after", False))}


def _sharded(before):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = MAE(seed=0), init_device_mesh("cpu", (RANKS,))
    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=EPOCHS, num_parts=(8, 4), decay=0.5)
    apply = functools.partial(apply_to_mae, model, EvolvingMask(EPOCHS), teacher)
    evolution = apply() if before else None
    model.norm.bias.data.fill_(0.5)  # as loading weights would
    for block in (*model.blocks, *model.decoder_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    evolution = evolution or apply()
    try:
        PartTeacher(model, GraphCutPartitioner(), total_epochs=EPOCHS)
        refused = ""
    except ValueError as error:
        refused = str(error)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    losses, masks, teachers, students = [], [], [], []
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    for epoch in range(EPOCHS):
        evolution.set_epoch(epoch)
        students.append([parameter.full_tensor().detach().clone() for parameter in model.parameters()])
        loss, _, mask = model(images)
        teachers.append([parameter.clone() for parameter in teacher.model.module.parameters()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        evolution.update()
        losses.append(loss.detach())
        masks.append(mask)
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    results = {"losses": losses, "masks": masks, "teachers": teachers, "students": students}
    return {**results, "kinds": kinds, "refused": refused}


def sharded_before(rank):
    """FSDP1, with weights flattened or not, the masks applied before and after: a teacher, and parts from elsewhere."""
    cases = [(as_they_are, before) for as_they_are in (False, True) for before in (False, True)]
    return {f"{case}": _sharded_before(*case) for case in cases}


def _sharded_before(as_they_are, before):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    def shard(model):
        strategy = ShardingStrategy.SHARD_GRAD_OP  # for FULL_SHARD wants a GPU
        return FullyShardedDataParallel(
            model, sharding_strategy=strategy, use_orig_params=as_they_are, device_id=torch.device("cpu")
        )

    def parts_of(images):
        return torch.arange(64).expand(len(images), -1) // 8

    images, answers = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(9)), []
    model = MAE(seed=0)
    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=EPOCHS, num_parts=(8, 4))
    wrapped = None if before else shard(model)
    try:
        evolution = apply_to_mae(wrapped or model, EvolvingMask(EPOCHS), teacher).set_epoch(2)
        wrapped = wrapped or shard(model)
        evolution.update()
    except ValueError as error:
        answers.append(str(error))
    model = MAE(seed=0)
    wrapped = None if before else shard(model)
    evolution = apply_to_mae(wrapped or model, EvolvingMask(EPOCHS), parts_of).set_epoch(2)
    wrapped = wrapped or shard(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    evolution.follow(optimizer)
    torch.manual_seed(3)
    losses = []
    for _ in range(3):
        loss = wrapped(images)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"answers": answers, "losses": losses, "mask": evolution.last_mask}


def sharded_by_fsdp1(rank):
    """The teacher of a model that FullyShardedDataParallel splits, with and without the original parameters."""
    return {name: _sharded_by_fsdp1(originals) for name, originals in (("original", True), ("flat", False))}


def _sharded_by_fsdp1(originals):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def make_teacher(model):
        return PartTeacher(model, GraphCutPartitioner(), total_epochs=EPOCHS, num_parts=(8, 4), decay=0.5)

    def error_of(function, *args):
        try:
            function(*args)
        except ValueError as error:
            return str(error)
        return None

    model = MAE(seed=0)
    teacher, blocks = make_teacher(model), ModuleWrapPolicy({type(model.blocks[0])})
    options = {"auto_wrap_policy": blocks, "use_orig_params": originals, "device_id": torch.device("cpu")}
    wrapped = FullyShardedDataParallel(model, **options)
    built = [error_of(make_teacher, each) for each in (wrapped, model)]
    updated, teachers = error_of(teacher.update, model), []
    for factor in (2, 3):  # in place of a step
        with torch.no_grad():
            for shard in wrapped.parameters():
                shard.mul_(factor)
        teacher.update(wrapped)
        teachers.append([weight.clone() for weight in teacher.model.module.parameters()])
    return {"built": built, "updated": updated, "teachers": teachers}
