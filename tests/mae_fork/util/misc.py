"""A stand-in for the official MAE's file of this name."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch._six import inf


def init_distributed_mode(args):
    args.distributed = "RANK" in os.environ
    if args.distributed:
        args.gpu = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(args.gpu)
        world = {"world_size": int(os.environ["WORLD_SIZE"]), "rank": int(os.environ["RANK"])}
        torch.distributed.init_process_group(backend="nccl", init_method="env://", **world)


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


class NativeScalerWithGradNormCount:
    def __init__(self):
        self._scaler = torch.cuda.amp.GradScaler()

    def __call__(self, loss, optimizer, parameters=None, update_grad=True):
        self._scaler.scale(loss).backward()
        if update_grad:
            self._scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, inf)
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state):
        self._scaler.load_state_dict(state)


def save_on_master(*args, **kwargs):
    if get_rank() == 0:
        torch.save(*args, **kwargs)


def save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler):
    state = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    state |= {"scaler": loss_scaler.state_dict(), "args": args}
    save_on_master(state, Path(args.output_dir) / f"checkpoint-{epoch}.pth")


def load_model(args, model_without_ddp, optimizer, loss_scaler):
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu")
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loss_scaler.load_state_dict(checkpoint["scaler"])
        args.start_epoch = checkpoint["epoch"] + 1


def mean_of_all(value):
    if not dist.is_initialized():
        return value
    total = torch.tensor([value], device="cuda")
    dist.all_reduce(total)
    return total.item() / torch.tensor(dist.get_world_size()).cuda().item()
