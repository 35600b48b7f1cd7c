"""A stand-in for the official MAE's file of this name."""


def adjust_learning_rate(optimizer, epoch, args):
    lr = args.lr * min(1, (1 + epoch) / 2)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
