"""Every family's tiny random checkpoint, for the converter; a process of its own, free of rlx."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.dist import family_cases, vision_cases
from tests.dist.programs import moe_reference


def main(root: Path) -> None:
    for seed, (case, make) in enumerate((family_cases.CASES | vision_cases.CASES).items()):
        torch.manual_seed(seed)
        model = make()
        moe_reference.disturb(model)
        # Every other one in the other type: sizes and bits differ, the paths are the same.
        (model.to(torch.bfloat16) if seed % 2 else model).save_pretrained(root / case.replace(" ", "-"))
    for seed, (family, make_moe) in enumerate(moe_reference.FAMILIES.items()):
        torch.manual_seed(seed)
        mixture = make_moe()
        moe_reference.disturb(mixture)
        moe_reference.save(family, mixture, root / family)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
