"""With this folder on PYTHONPATH, a Python process believes that it is on a machine with one GPU and packages that need it.

As CUDA does, it looks at CUDA_VISIBLE_DEVICES when it is first asked and never again. Who sees the GPU is written down in the
file that RLX_TEST_GPU_SEEN names; whoever goes on to use it fails, as there is none.
"""

import importlib.abc
import importlib.util
import os
import sys
from functools import cache

PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_mla")


@cache
def count():
    visible = int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    if visible:
        with open(os.environ["RLX_TEST_GPU_SEEN"], "a") as seen:
            print(os.getpid(), *sys.argv, file=seen)
    return visible


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch, to change it once it is loaded, and the packages, whose libraries want the driver."""

    def find_spec(self, name, path=None, target=None):
        if name in PACKAGES:
            return importlib.util.spec_from_loader(name, self)
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        self.load_torch, spec.loader.exec_module = spec.loader.exec_module, self.exec_torch
        return spec

    def exec_torch(self, torch):
        self.load_torch(torch)
        torch.cuda.is_available = lambda: count() > 0
        torch.cuda.device_count = count

    def exec_module(self, module):
        raise OSError(f"libcuda.so.1: cannot open shared object file (wanted by {module.__name__})")


sys.meta_path.insert(0, Finder())
