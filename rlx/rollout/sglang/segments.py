"""Host memory that other processes of this machine open by name, in segments of this process's own."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rlx.rollout.sglang import segment_keeper

SHARED_MEMORY = Path("/dev/shm")
# What torch keeps of a segment before its content: the number of those who have it open.
_HEADER_BYTES = 64


class Segments:
    """The segments of one sender, and the process that removes them once it is gone (``segment_keeper``)."""

    def __init__(self) -> None:
        self.prefix = SHARED_MEMORY / f"rlx-{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        # In the same place as the segments: who can open those finds it there.
        self._socket = f"{self.prefix}-manager"
        reading, self._alive = os.pipe()  # its writing end closes with this process, however that ends
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._socket)
            listener.listen(1024)
            descriptors = (listener.fileno(), reading)
            # A session of its own: what ends this process's group is not to end it first.
            self.keeper = subprocess.Popen(
                [sys.executable, segment_keeper.__file__, *map(str, descriptors), str(self.prefix)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # whoever reads this process's is not to wait for that one
                start_new_session=True,
            )
        os.close(reading)

    def new_path(self) -> Path:
        """For a file in shared memory that its user removes, and the keeper once this process is gone."""
        return SHARED_MEMORY / f"{self.prefix.name}-{next(self._numbers)}"

    def holding(self, content: Tensor) -> Tensor:
        """A copy of uint8 [n] in a segment of its own, which is there until this process and all readers have let go of it.
        OSError where there is no room for it."""
        file = self.new_path()
        name = file.name
        try:
            with file.open("xb") as segment:
                # All of it now: writing where there is no room ends a process without a word.
                os.posix_fallocate(segment.fileno(), 0, _HEADER_BYTES + content.numel())
            storage = torch.UntypedStorage._new_shared_filename_cpu(self._socket.encode(), f"/{name}".encode(), content.numel())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)

    def holds(self, content: Tensor) -> bool:
        """Whether a tensor lies in one of these."""
        storage = content.untyped_storage()
        if not storage.is_shared():
            return False
        _, name, _ = storage._share_filename_cpu_()
        return bool(name.decode().startswith(f"/{self.prefix.name}-"))


@cache
def own_segments() -> Segments:
    """Those of this process."""
    return Segments()
