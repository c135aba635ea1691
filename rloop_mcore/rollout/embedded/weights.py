"""The engine's end of a weight update: receive, check, copy, and remember whether the weights are whole."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rloop_mcore.platform.process_group import join_group, leave_group
from rloop_mcore.rollout.embedded.handles import open_handles
from rloop_mcore.rollout.embedded.params import BadRequest
from rloop_mcore.rollout.hashers import embedded_hasher

Layout = list[tuple[tuple[int, ...], torch.dtype]]

_FUSED_EXPERTS = re.compile(r"^(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


class WeightReceiver:
    """Applies updates to a model's parameters between `begin` and `end`.

    An update that fails midway leaves old and new tensors mixed: the weights are then `broken` (a reason) and stay so
    until a whole session, begin to end, has written every tensor.
    """

    def __init__(self, model: torch.nn.Module, group_timeout_s: float) -> None:
        self.timeout_s = group_timeout_s
        self.model = model
        # named_parameters() names a tied tensor once; its other names are accepted for it too.
        self.tensors = dict(_checkpoint_tensors(model.named_parameters()))
        self.names = {name: name for name in self.tensors}
        by_storage = {t.data_ptr(): name for name, t in self.tensors.items()}
        for name, tensor in _checkpoint_tensors(model.named_parameters(remove_duplicate=False)):
            self.names[name] = by_storage[tensor.data_ptr()]
        self._released: dict[str, torch.Size] | None = None  # shapes of the parameters, which have no memory
        self._buffer = torch.empty(0, dtype=torch.uint8)  # of the last bucket: fresh memory is slow on its first use
        # The last two buckets of other processes' memory: the next ones lie there too, mapped already.
        self._opened: deque[list[tuple[str, torch.Tensor]]] = deque(maxlen=2)
        self.broken: str | None = None
        self.missing: set[str] | None = None  # None: no session is open
        self._checksums: dict[str, str] = {}  # of tensors, since they were last written
        self.groups: dict[str, dist.ProcessGroup] = {}

    def join(self, address: str, port: int, rank: int, world_size: int, group_name: str, backend: str) -> None:
        """Join the broadcast group as `rank`; blocks until all are there. Raises TimeoutError."""
        if group_name in self.groups:
            raise BadRequest(f"group {group_name!r} exists already; destroy it first")
        self.groups[group_name] = join_group(backend, address, port, world_size, rank, group_name, self.timeout_s)

    def leave(self, group_name: str) -> None:
        if group_name not in self.groups:
            raise BadRequest(f"there is no weight update group {group_name!r}")
        leave_group(self.groups.pop(group_name))

    def begin(self, selector: str) -> None:
        if selector != "all":
            raise BadRequest(f"selector {selector!r}: the embedded engine has one model, use 'all'")
        if self.missing is not None:
            raise BadRequest("a weight update is in progress; end it first")
        self.missing = set(self.tensors)

    def end(self) -> None:
        """Close the session. Raises BadRequest when the weights were broken and this session did not repair them."""
        if self.missing is None:
            raise BadRequest("no weight update is in progress; call /begin_weight_update first")
        missing, self.missing = self.missing, None
        self._opened.clear()
        if self.broken is None:
            return
        if missing:
            raise BadRequest(
                f"the weights are still incomplete ({self.broken}): {len(missing)} tensors were not written since, "
                f"e.g. {min(missing)}"
            )
        self.broken = None

    def receive(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str, load_format: str | None
    ) -> None:
        """Take the tensors from rank 0's broadcast and copy them into the parameters of these names."""
        if self.missing is None:
            raise BadRequest("a weight update must stand between /begin_weight_update and /end_weight_update")
        if group_name not in self.groups:
            raise BadRequest(f"there is no weight update group {group_name!r}; call /init_weights_update_group first")
        if load_format not in (None, "flattened_bucket"):
            raise BadRequest(f"load_format {load_format!r} is not known; use 'flattened_bucket' or leave it out")
        if not len(names) == len(dtypes) == len(shapes):
            raise BadRequest(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes: not equally many")
        layout = [(tuple(shape), _dtype(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        # Received before the names are checked: the sender's broadcast must end, or the next would not match it.
        with self._breaks_on_error():
            group = self.groups[group_name]
            nccl = dist.get_backend(group) == "nccl"
            device = next(iter(self.tensors.values())).device if nccl else torch.device("cpu")
            receive = self._receive_bucket if load_format else _receive_each
            tensors = receive(layout, group, device)
            for name, tensor in zip(names, tensors, strict=True):
                self._write(name, tensor)

    def take(self, handles: str) -> None:
        """Copy tensors of another process of this host into the parameters of their names."""
        if self.missing is None:
            raise BadRequest("a weight update must stand between /begin_weight_update and /end_weight_update")
        with self._breaks_on_error():
            self._opened.append(open_handles(handles))
            for name, tensor in self._opened[-1]:
                self._write(name, tensor)

    def load(self, path: Path) -> None:
        """Take all weights from the safetensors of an HF folder; needs no session."""
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise BadRequest(f"{path} holds no safetensors file")
        before, self.missing = self.missing, set(self.tensors)
        try:
            with self._breaks_on_error():
                for file in files:
                    for name, tensor in load_file(file).items():
                        self._write(name, tensor)
                if self.missing:
                    raise BadRequest(f"{path} lacks {len(self.missing)} tensors, e.g. {min(self.missing)}")
            self.broken = None
        finally:
            self.missing = before

    def release(self) -> None:
        """Give up the memory of the parameters and their values."""
        if self._released is not None:
            raise BadRequest("the weights are released already")
        self._released = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.tensors.clear()  # views of some of them
        self._checksums.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        torch.cuda.empty_cache()  # else torch keeps the memory for this process; does nothing on a CPU
        self.broken = "the weights were released"

    def restore(self) -> None:
        """Take memory for the parameters again; they stay `broken` until a session has written them all."""
        if self._released is None:
            raise BadRequest("the weights were not released")
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.new_empty(self._released[name])
        self.tensors.update(_checkpoint_tensors(self.model.named_parameters()))
        self._released = None

    def checksums(self) -> dict[str, str]:
        """XXH3 of every tensor's bytes, by HF name, as read back after it was last written."""
        for name in self.tensors.keys() - self._checksums.keys():
            self._read_back(name)
        return dict(self._checksums)

    def _read_back(self, name: str) -> None:
        hasher = embedded_hasher()
        hasher.update(self.tensors[name])
        self._checksums[name] = hasher.hexdigest()

    def _receive_bucket(self, layout: Layout, group: dist.ProcessGroup, device: torch.device) -> list[torch.Tensor]:
        """One uint8 broadcast: the tensors one right behind the other. They are views, good until the next bucket."""
        spans, end = [], 0
        for shape, dtype in layout:
            if end % dtype.itemsize:
                raise BadRequest(f"a {dtype} tensor begins at byte {end} of its bucket: no multiple of its item size")
            spans.append((end, end + prod(shape) * dtype.itemsize))
            end = spans[-1][1]
        if self._buffer.numel() < end or self._buffer.device != device:
            self._buffer = torch.empty(end, dtype=torch.uint8, device=device)
        buffer = self._buffer[:end]
        dist.broadcast(buffer, group=group, group_src=0)
        return [
            buffer[start:stop].view(dtype).view(shape)
            for (start, stop), (shape, dtype) in zip(spans, layout, strict=True)
        ]

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self.names:
            raise BadRequest(f"the model has no parameter {name!r}")
        name = self.names[name]
        target = self.tensors[name]
        if tensor.shape != target.shape:
            raise BadRequest(f"{name}: got shape {list(tensor.shape)}, the model has {list(target.shape)}")
        self._checksums.pop(name, None)
        with torch.no_grad():
            target.copy_(tensor)
        self._read_back(name)  # now, while the next bucket is on its way, and not when the whole sync waits for it
        if self.missing is not None:
            self.missing.discard(name)

    @contextmanager
    def _breaks_on_error(self) -> Iterator[None]:
        """Mark the weights broken, with the reason, when the block raises; nothing counts as written any more."""
        try:
            yield
        except BaseException as error:
            self.broken = str(error) or type(error).__name__
            if self.missing is not None:
                self.missing = set(self.tensors)
            raise


def _checkpoint_tensors(parameters: Iterator[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters as checkpoints name them: the experts that transformers keeps in one tensor as views of it."""
    for name, parameter in parameters:
        fused = _FUSED_EXPERTS.match(name)
        if fused is None:
            yield name, parameter
        elif fused[2] == "down_proj":
            for expert, down in enumerate(parameter.detach()):
                yield f"{fused[1]}{expert}.down_proj.weight", down
        else:
            for expert, both in enumerate(parameter.detach()):
                gate, up = both.chunk(2)
                yield f"{fused[1]}{expert}.gate_proj.weight", gate
                yield f"{fused[1]}{expert}.up_proj.weight", up


def _receive_each(layout: Layout, group: dist.ProcessGroup, device: torch.device) -> list[torch.Tensor]:
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in layout]
    for work in [dist.broadcast(t, group=group, group_src=0, async_op=True) for t in tensors]:
        if work is not None:  # None is for ranks outside the group
            work.wait()
    return tensors


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadRequest(f"dtype {name!r} is not known; e.g. 'bfloat16'")
    return dtype
