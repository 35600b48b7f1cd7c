"""What must be set before anything imports torch or Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter, on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each of pytest's workers

# Programs that tests run, not tests.
collect_ignore = ["mae_fork", "ranks.py", "timm_train.py", "trainers.py"]
