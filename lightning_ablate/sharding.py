"""Targets larger than one device: each process holds a share of every layer's weights (FSDP2)."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_ablate.errors import AblationError, ConfigError, TargetError


class ShardedStrategy(ModelParallelStrategy):
    """Shards the target over all processes, and each evaluates its own examples; ``--trainer.strategy sharded``.

    It is Lightning's strategy for ``fully_shard`` with all processes in the data-parallel group. The checkpoint is one
    small file, without the target.
    """

    strategy_name = "sharded"

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Puts every process into the data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds, without gathering the target's weights."""
        named = [] if self.lightning_module is None else self.lightning_module.named_parameters()
        return {name: value for name, value in named if not name.startswith("target.")}

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads the one file."""
        return Strategy.load_checkpoint(self, *args, **kwargs)


StrategyRegistry.register(ShardedStrategy.strategy_name, ShardedStrategy, "FSDP2 over all processes")


def check_strategy(strategy: Strategy) -> None:
    """Raises ConfigError for a strategy that shards in another way, as hooks would see parts of the activations."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise ConfigError(
            f"the strategy is {type(strategy).__name__}, expected `sharded` for targets larger than a device "
            "(--trainer.strategy sharded, or lightning_ablate.ShardedStrategy)"
        )


def sharded(build: Callable[[], nn.Module], mesh: Any, device: torch.device) -> nn.Module:
    """A target that the first process builds on the CPU, and shards over all processes, a tensor at a time.

    The other processes get its modules without weights, so they never hold the whole. The mesh is one-dimensional, of
    all processes. All of them raise TargetError if the modules can't be sent.
    """
    whole, target = _shell(build)
    for layer in _layers(target):
        fully_shard(layer, mesh=mesh)
    fully_shard(target, mesh=mesh)  # embeddings and head, which stay whole once they have run
    if hasattr(target, "forward_features"):
        register_fsdp_forward_method(target, "forward_features")
    target.to_empty(device=device)
    for empty, full in zip(_tensors(target), _tensors(target if whole is None else whole), strict=True):
        values = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        if whole is not None:
            values = full.detach().to(device)
        with torch.no_grad():
            if isinstance(empty, DTensor):
                empty.copy_(distribute_tensor(values, mesh, empty.placements))
            else:
                values = values.contiguous()
                dist.broadcast(values, 0)
                empty.copy_(values)
    return target


def _shell(build: Callable[[], nn.Module]) -> tuple[nn.Module | None, nn.Module]:
    """The target, on the first process only, and a copy without weights, on every process."""
    whole: nn.Module | None = None
    sent: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            whole = build().requires_grad_(False).eval()
            sent = [_without_weights(whole)]
        except AblationError as error:
            sent = [error]
    try:
        dist.broadcast_object_list(sent)
    except (AttributeError, TypeError) as error:  # of pickle
        raise TargetError(f"the target can't be sent to the other processes: {error}") from error
    if isinstance(sent[0], AblationError):
        raise sent[0]
    return whole, sent[0]


def _without_weights(whole: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device; shared tensors stay shared."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(whole):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(whole, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _layers(target: nn.Module) -> list[nn.Module]:
    """The outermost elements, with weights, of lists of modules."""
    found: dict[str, nn.Module] = {}
    for name, module in target.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name.rpartition(".")[2].isdigit() and not inside and any(True for _ in module.parameters()):
            found[name] = module
    return list(found.values())
