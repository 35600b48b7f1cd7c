"""What must be set before torch and Triton are imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each of pytest's workers

import torch
from interpreted import interpret

if not torch.cuda.is_available():
    interpret()

# Programs that tests run, not tests.
collect_ignore = ["mae_fork", "processes.py", "ranks.py", "timm_train.py", "trainers.py"]
