"""The processes of a run: who they are, how they agree, and how a model is spread over them.

`torchrun` starts one process per device and names it in the environment; without it a run is one
process, and everything here is a matter of course. Only the first rank writes files and logs.
Numbers that ranks tell each other lie on the CPU and travel by gloo, so that agreeing never waits
for a GPU; gradients travel by NCCL where the devices are CUDA's.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cache_builder.errors import ConfigError, PatchCacheError, WorkerLostError

_T = TypeVar("_T")


class Ranks:
    """The processes of one run, as one of them sees it.

    Attributes:
        rank: Which this is, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Describe a group; `join` makes one that can talk."""
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, on the CPU; on a CUDA device this waits for it."""
        total = values.cpu()
        if self.size > 1:
            total = total.clone()
            dist.all_reduce(total)
        return total

    def max(self, value: float) -> float:
        """Return the largest value of any rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Return what the first rank makes, on every rank; what it raises is raised on all.

        Raises:
            PatchCacheError: The first rank did.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [make()]
            except PatchCacheError as exc:
                outcome = [exc]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], PatchCacheError):
            raise outcome[0]
        return outcome[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Yield the ranks that the environment speaks of; a group that is made here ends with a run.

    A group that exists already, as Ray Train makes one, is used and left alone.

    Raises:
        WorkerLostError: Another process is gone, or does not answer any more.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _init_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        yield Ranks(dist.get_rank(), size)
    except RuntimeError as exc:
        if not _is_loss(exc):
            raise
        raise WorkerLostError(
            f"Another of the {size} processes of this run is gone or cannot be reached: "
            f"{_reason(exc)}. Start the same command on every host again; it goes on from "
            "the newest checkpoint."
        ) from exc
    # Not after an error: others may be waiting for this rank, and torchrun ends them.
    dist.destroy_process_group()


def is_first_process() -> bool:
    """Say whether this process is the one that prints; true without `torchrun`."""
    return _number("RANK", 0) == 0


def local_device(device: torch.device) -> torch.device:
    """Return this process's own device of a kind: one process, one GPU.

    Raises:
        ConfigError: There are fewer CUDA devices than processes on this machine.
    """
    if device.type != "cuda" or _number("WORLD_SIZE", 1) == 1:
        return device
    index = _number("LOCAL_RANK", 0)
    if device.index not in (None, index):
        raise ConfigError(
            f"run.device {device} is one device, and there are {_number('WORLD_SIZE', 1)} "
            "processes. Leave run.device at auto, or set it to cuda: each takes its own."
        )
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"Process {index} of this machine finds {torch.cuda.device_count()} CUDA devices. "
            "Start no more processes than devices: torchrun --nproc-per-node gpu."
        )
    return torch.device("cuda", index)


def split_batch(batch_size: int, micro_batch_size: int | None, num_ranks: int) -> tuple[int, int]:
    """Return how many images of a batch one rank has, and how many of those it takes at once.

    Raises:
        ConfigError: The sizes do not divide.
    """
    if batch_size % num_ranks:
        raise ConfigError(
            f"A batch of {batch_size} images cannot be cut into {num_ranks} equal parts, one per "
            f"process. Set data.batch_size to a multiple of {num_ranks}, or start another number."
        )
    share = batch_size // num_ranks
    micro = micro_batch_size or share
    if share % micro:
        raise ConfigError(
            f"Each of {num_ranks} processes has {share} images of a batch, no multiple of "
            f"data.micro_batch_size {micro}. Set that to a divisor of {share}."
        )
    return share, micro


def replicate(objective: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module so that every rank holds it whole and their gradients are averaged (DDP)."""
    with warnings.catch_warnings():
        # torch 2.15 has another name for broadcast_buffers, which earlier ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # they are constants
            gradient_as_bucket_view=True,
        )


def shard(objective: nn.Module, blocks: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Spread parameters over the ranks, one group per block and one of the rest (FSDP2).

    A module's parameters are replaced by others of the same names, so an optimizer comes after.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


@contextlib.contextmanager
def last_of_step(module: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Exchange gradients in the backward passes inside only if they are the step's last."""
    with contextlib.ExitStack() as stack:
        if isinstance(module, DistributedDataParallel) and not is_last:
            stack.enter_context(module.no_sync())
        elif hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(is_last)
        yield


def whole(tree: Any, *, is_wanted: bool = True) -> Any:
    """Return a tree of dicts and lists with its sharded tensors put together.

    Every rank must call it with the same tree; where the result is not wanted, None stands for
    what was sharded.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if is_wanted else None
    if isinstance(tree, dict):
        return {key: whole(value, is_wanted=is_wanted) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, is_wanted=is_wanted) for value in tree]
    return tree


def spread_like(value: Any, model: Tensor) -> Any:
    """Return a whole tensor as `model` is sharded; other values, and scalars, as they are."""
    if isinstance(model, DTensor) and isinstance(value, Tensor) and value.shape == model.shape:
        # Every rank holds the whole, so none has to send its part.
        there = value.to(model.device)
        return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)
    return value


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _init_group(backend: str) -> None:
    if _number("LOCAL_WORLD_SIZE", 0) != _number("WORLD_SIZE", 1):
        # Machines count restarts each for itself, so they have no number to agree on.
        dist.init_process_group(backend)
        return
    # torchrun keeps its store over restarts, and torch 2.15 would find the addresses of processes
    # that are gone in it.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _is_loss(exc: RuntimeError) -> bool:
    """Say whether a collective failed for want of a partner: gloo has no class for that."""
    return isinstance(exc, dist.DistError) or "gloo" in str(exc)


def _reason(exc: RuntimeError) -> str:
    """Return what gloo or NCCL says, without the line of its source and the advice after it."""
    text = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return re.sub(r"^\[[^\]]*\] ", "", text).partition(". ")[0].rstrip(".")


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))
