"""One training step on one device or many: precision, compilation, gradients, optimiser. It never waits for a GPU."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.profiler import record_function

from coverfast.backbones import Adapted, load_state
from coverfast.checks import require
from coverfast.methods import Batch, Method
from coverfast.training.schedules import learning_rate
from coverfast.training.settings import TrainingSettings
from coverfast.training.world import World

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Choices:
    """What "auto" has come to on a device."""

    precision: str
    layout: str

    @classmethod
    def of(cls, s: TrainingSettings, device: torch.device, *, sharded: bool = False) -> Choices:
        """bfloat16 on a GPU that has it. Channels-last on a CPU and compiled on a GPU (norms alone copy), unsharded."""
        gpu = device.type == "cuda"
        precision = s.precision
        if precision == "auto":
            precision = "bfloat16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        last = (s.compile or not gpu) and not sharded
        require(
            not sharded or s.layout != "channels_last",
            "layout must be contiguous with fsdp, which shards contiguous weights alone, got channels_last",
        )
        layout = ("channels_last" if last else "contiguous") if s.layout == "auto" else s.layout
        return cls(precision, layout)


class Engine:
    """Trains a method, batch by batch.

    Attributes:
        method: the method on the device, trained in place.
        names: of the numbers a step returns.
        look: what `Method.monitor` found at the last step that watched.
    """

    def __init__(self, method: Method, s: TrainingSettings, device: torch.device, world: World | None = None) -> None:
        self.settings, self.device, self.world = s, device, world or World()
        backbone = getattr(method, "backbone", None)
        ndim = getattr(backbone, "ndim", 2)
        self.choices = Choices.of(s, device, sharded=self.sharded)
        self.method = method.to(device)
        if self.choices.layout == "channels_last":
            for weight in self.method.parameters():  # those of the maps' own axes: a foreign network may have others
                if weight.ndim == ndim + 2:
                    weight.data = weight.data.contiguous(memory_format=_CHANNELS_LAST[ndim])
        if s.recompute:
            require(hasattr(backbone, "recompute"), "recompute needs a backbone that knows how, got one that does not")
            backbone.recompute = True  # type: ignore[union-attr]
        #: Networks that are not ours may draw (dropout), keep running statistics (batch norms) and break graphs.
        self.foreign = isinstance(backbone, Adapted)
        self._running = list(backbone.buffers()) if isinstance(backbone, Adapted) else []
        self.ema = copy.deepcopy(self.method).requires_grad_(False) if s.ema else None
        if self.world.size > 1:
            self.method.total = self.world.sum
        self.network = self._network()
        kind = torch.optim.Adam if s.optimizer == "adam" else torch.optim.AdamW
        learning = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = kind(learning, lr=s.lr, weight_decay=s.weight_decay, fused=True)
        self.names: tuple[str, ...] = ()
        self.look: dict[str, Tensor] = {}

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of the weights: all must then take part in whatever runs the network."""
        return self.settings.fsdp and self.world.size > 1

    def _network(self) -> nn.Module:
        s, method = self.settings, self.method
        how: dict[str, Any] = {"dynamic": False, "mode": "reduce-overhead" if s.cuda_graphs else None}
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world.size,))
            for module in (method, *([self.ema] if self.ema else ())):
                blocks = [m for m in module.modules() if isinstance(m, nn.Sequential)]
                for block in blocks:
                    if s.compile:  # block by block: the hooks between them break graphs
                        block.compile(**how)
                    fully_shard(block, mesh=mesh)
                # Also the root: weights that no backward pass follows would otherwise stay whole.
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
            return method
        if s.compile:
            method.compile(fullgraph=not self.foreign, **how)
        if self.world.size > 1:
            return nn.parallel.DistributedDataParallel(
                method, gradient_as_bucket_view=True, find_unused_parameters=self.foreign
            )
        return method

    # --- a step ---

    def step(self, batch: Batch, *, watch: bool = False, update: bool = True) -> Tensor:
        """One step; figures of this process's share of the batch as a float64 vector on the device, see `names`.

        Its last two numbers are of the whole batch: the gradient's norm before clipping, and 1 when the step was
        skipped, on the device, since loss or gradient were not finite. watch: fill `look`. update: False computes
        gradients only.
        """
        s = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        before = [b.clone() for b in self._running]
        if self.foreign:  # what it draws is a function of the iteration, as all else: there is no state to resume
            key = (s.seed * 0x9E3779B97F4A7C15 + batch.iteration * 0xBF58476D1CE4E5B9 + self.world.rank) % 2**63
            torch.manual_seed(key)
        with record_function("views"):
            parts = [self.method.prepare(part) for part in batch.parts(s.accumulate)]
        denominator = None
        if len(parts) * self.world.size > 1:
            count = torch.stack([self.method.count(part) for part in parts]).sum(0)
            denominator = self.world.sum(count)
        found: list[Tensor] = []
        for number, part in enumerate(parts):
            with self._synchronised(number == len(parts) - 1):
                loss, sums = self._forward(part, denominator, batch.iteration if watch and not number else None)
                found.append(sums)
                # Processes average their gradients, but the losses of parts add up. A loss that is not finite spoils
                # the gradient, whatever its backward makes of it, so that all processes skip the step alike.
                sound = torch.where(loss.detach().isfinite(), float(self.world.size), torch.nan)
                (loss * sound).backward()
        with record_function("optimiser"):
            norm = nn.utils.clip_grad_norm_(self.method.parameters(), s.clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            skipped = ~norm.isfinite()
            for now, was in zip(self._running, before, strict=True):  # a step that is not kept moves no statistics
                now.copy_(torch.where(skipped, was, now) if update else was)
            if update:
                self._update(batch.iteration, skipped)
        return torch.cat([torch.stack(found).sum(0), torch.stack([norm, skipped]).double()])

    def _forward(self, part: Any, denominator: Tensor | None, watch: int | None) -> tuple[Tensor, Tensor]:
        if self.settings.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            outcome = self.network(part, denominator)
        require(
            hasattr(outcome, "sums"), f"forward must return a coverfast.methods.Outcome, got {type(outcome).__name__}"
        )
        if watch is not None:
            with torch.no_grad():
                self.look = self.method.monitor(part, outcome.seen, watch)
        self.names = (*outcome.sums, "grad_norm", "skipped")
        return outcome.loss, torch.stack(list(outcome.sums.values()))

    def _update(self, iteration: int, skipped: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, iteration)
        # What GradScaler uses: where it is 1, fused optimisers leave weights, moments and their count of steps alone.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema:
            # torch's AveragedModel asks the device how often it has averaged. The first iterations forget faster.
            decay = min(self.settings.ema, iteration / (iteration + 9))
            with torch.no_grad():
                torch._foreach_lerp_([*self.ema.parameters()], [*self.method.parameters()], 1 - decay)
                for average, now in zip(self.ema.buffers(), self.method.buffers(), strict=True):
                    average.copy_(now)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the network; losses and fields are float32 whatever it is."""
        low = self.choices.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of parts stay in the process until the last one."""
        if self.sharded:
            self.method.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif not last and self.world.size > 1:
            assert isinstance(self.network, nn.parallel.DistributedDataParallel)
            return self.network.no_sync()
        return nullcontext()

    # --- without training ---

    def agree(self) -> None:
        """Give all processes the running statistics of the first: each has kept those of its own samples."""
        if self.world.size > 1 and self.foreign:
            for module in (self.method, *([self.ema] if self.ema else ())):
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, 0)

    @property
    def result(self) -> Method:
        """What training has come to: the moving average of the weights where there is one."""
        return self.ema or self.method

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of a batch by the result, without training."""
        method = self.result.eval()
        with self.autocast():  # as it is: compiling it for a few batches now and then would not pay
            run = method if self.sharded else method.forward
            sums = run(method.prepare(batch)).sums
        method.train()
        return sums

    def weights(self) -> dict[str, Tensor]:
        """The result's whole weights, on the CPU of the first process."""
        found: dict[str, Any] = get_model_state_dict(self.result, options=_WHOLE)
        return found

    # --- state ---

    def state(self) -> dict[str, Any]:
        """Whole weights and moments on the CPU of the first process, by name: the same for any number of processes."""
        whole = {
            "method": get_model_state_dict(self.method, options=_WHOLE),
            "optimizer": get_optimizer_state_dict(self.method, self.optimizer, options=_WHOLE),
        }
        if self.ema:
            whole["ema"] = get_model_state_dict(self.ema, options=_WHOLE)
        return whole

    def load_state(self, state: dict[str, Any], source: str) -> str:
        """Take up what `state` gave; which tensors of the method were loaded, for people."""
        told = f"{len(state['method'])} matched"
        options = StateDictOptions(full_state_dict=True)
        for module, name in ((self.method, "method"), (self.ema, "ema")):
            if module is None:
                continue
            require(name in state, f"{source} must hold a moving average of the weights, but it has none")
            if self.sharded:
                set_model_state_dict(module, state[name], options=options)
            else:
                report = load_state(module, state[name], source)
                told = str(report) if name == "method" else told
        # A foreign network may have weights that its maps do not need: these have no moments.
        moments = StateDictOptions(full_state_dict=True, strict=not self.foreign)
        set_optimizer_state_dict(self.method, self.optimizer, state["optimizer"], options=moments)
        # Fused optimisers walk through memory: moments must lie as the weights do, in whatever layout these now are.
        for weight, found in self.optimizer.state.items():
            for name, moment in found.items():
                if moment.shape == weight.shape and moment.ndim:
                    found[name] = torch.empty_like(weight).copy_(moment)
        return told
