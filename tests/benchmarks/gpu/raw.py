"""Rank R of 2: the bandwidth of a plain NCCL broadcast of 1 GiB from GPU 0 to GPU 1. Run by ``bench_gpu``."""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method="env://", rank=rank, world_size=2)
    found = {}
    for mib in (16, 64, 256, 1024):
        tensor = torch.ones(mib * 2**20, dtype=torch.uint8, device="cuda")
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            began = time.perf_counter()
            dist.broadcast(tensor, src=0)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[f"raw/broadcast_{mib}_mib_gb_s"] = round(tensor.numel() / sorted(times)[len(times) // 2] / 1e9, 1)
    if rank == 0:
        print("RESULT", json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
