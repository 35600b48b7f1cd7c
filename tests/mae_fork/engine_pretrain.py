"""A stand-in for the official MAE's file of this name."""

import torch
import util.lr_sched as lr_sched
import util.misc as misc


def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=None, args=None):
    model.train(True)
    losses = []
    optimizer.zero_grad()
    for step, (samples, _) in enumerate(data_loader):
        if step % args.accum_iter == 0:
            lr_sched.adjust_learning_rate(optimizer, step / len(data_loader) + epoch, args)
        with torch.cuda.amp.autocast():
            loss, _, _ = model(samples.to(device), mask_ratio=args.mask_ratio)
        losses.append(loss.item())
        last = (step + 1) % args.accum_iter == 0
        loss_scaler(loss / args.accum_iter, optimizer, parameters=model.parameters(), update_grad=last)
        if last:
            optimizer.zero_grad()
        torch.cuda.synchronize()
        log_writer.add_scalar("train_loss", losses[-1], step)
    return {"loss": misc.mean_of_all(sum(losses) / len(losses))}
