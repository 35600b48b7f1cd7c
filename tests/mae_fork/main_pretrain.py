"""A stand-in for the official MAE's file of this name."""

import argparse
import json
import os

import models_mae
import timm
import timm.optim.optim_factory as optim_factory
import torch
import torchvision.datasets as datasets
import torchvision.transforms as transforms
import util.misc as misc
from engine_pretrain import train_one_epoch
from torch.utils.tensorboard import SummaryWriter

assert timm.__version__ == "0.3.2"


def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    for name, default in (("batch_size", 8), ("epochs", 3), ("accum_iter", 1), ("seed", 0), ("num_workers", 0)):
        parser.add_argument(f"--{name}", default=default, type=int)
    for name, default in (("mask_ratio", 0.75), ("lr", 4e-3), ("weight_decay", 0.05)):
        parser.add_argument(f"--{name}", default=default, type=float)
    for name, default in (("model", "mae_vit_small"), ("device", "cuda"), ("resume", ""), ("data_path", "")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--output_dir", default=".")
    parser.add_argument("--norm_pix_loss", action="store_true")
    return parser


def main(args):
    misc.init_distributed_mode(args)
    torch.manual_seed(args.seed + misc.get_rank())
    args.start_epoch = 0
    transform = transforms.Compose([transforms.RandomResizedCrop(64, interpolation=3), transforms.ToTensor()])
    dataset = datasets.ImageFolder(os.path.join(args.data_path, "train"), transform=transform)
    ranks = torch.distributed.get_world_size() if args.distributed else 1
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=ranks, rank=misc.get_rank(), shuffle=True)
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.num_workers)

    device = torch.device(args.device)
    model = model_without_ddp = models_mae.__dict__[args.model](norm_pix_loss=args.norm_pix_loss).to(device)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu], find_unused_parameters=True)
        model_without_ddp = model.module
    groups = optim_factory.add_weight_decay(model_without_ddp, args.weight_decay)
    optimizer, loss_scaler = torch.optim.AdamW(groups, lr=args.lr), misc.NativeScalerWithGradNormCount()
    state = {"model_without_ddp": model_without_ddp, "optimizer": optimizer, "loss_scaler": loss_scaler}
    misc.load_model(args=args, **state)
    writer = SummaryWriter(log_dir=args.output_dir)
    for epoch in range(args.start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        stats = train_one_epoch(model, loader, optimizer, device, epoch, loss_scaler, log_writer=writer, args=args)
        misc.save_model(args=args, epoch=epoch, model=model, **state)
        if misc.get_rank() == 0:
            print(json.dumps({"epoch": epoch, **stats}), flush=True)


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    main(args)
