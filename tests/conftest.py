"""Triton's kernels run in its interpreter, on the CPU. The switch must be set before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"

# Programs that tests run, not tests.
collect_ignore = ["mae_fork", "ranks.py", "timm_train.py", "trainers.py"]
