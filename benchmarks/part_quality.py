"""How well the partitioners find parts that were planted in noisy attention: adjusted Rand index, 1 is perfect.

python benchmarks/part_quality.py                # about a minute on 2 cores
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from planted import planted_attention
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner, __version__

STRENGTHS = (1.0, 0.5, 0.3, 0.2, 0.1)  # of the parts, against noise of 1, 12 heads
NUM_PARTS = 10  # asked for; 8 are planted
PARTITIONERS = {
    "EM, as released": EMPartitioner(NUM_PARTS),
    **{f"graph cut, smoothness {s}": GraphCutPartitioner(NUM_PARTS, smoothness=s) for s in (0.0, 0.1, 0.3, 0.5)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="for each strength (default: 64)")
    out = Path(__file__).parent / "results" / "part_quality.json"
    parser.add_argument("--out", type=Path, default=out, help=f"where to write (default: {out})")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {name: [] for name in PARTITIONERS}
    for strength in tqdm(STRENGTHS):
        labels, attention = planted_attention(args.images, 14, 14, 8, strength=strength, noise=1, heads=12)
        for name, partitioner in PARTITIONERS.items():
            scores = [adjusted_rand_score(*pair) for pair in zip(labels, partitioner(attention), strict=True)]
            rows[name].append({"strength": strength, "mean": np.mean(scores), "deviation": np.std(scores)})
    print(f"{'adjusted Rand index at strength':32}", *(f"{strength:>11}" for strength in STRENGTHS))
    for name, cells in rows.items():
        print(f"{name:32}", *(f"{cell['mean']:5.2f} ± {cell['deviation']:.2f}" for cell in cells))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "maskevolve": __version__}
    result = {"images": args.images, "grid": [14, 14], "planted": 8, "asked for": NUM_PARTS, **versions, "rows": rows}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"8 parts planted, 10 asked for; ± is the deviation over {args.images} images; wrote {args.out}")


if __name__ == "__main__":
    main()
