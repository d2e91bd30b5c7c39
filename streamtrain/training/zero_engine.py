"""Drive DeepSpeed's ZeRO engine: start it, step it, gather its partitioned tensors whole and restore them."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from sharding.audio.codec import SAMPLE_RATE
from streamtrain.distributed import World
from streamtrain.model.ctc import CTCModel
from streamtrain.model.pretrained import copy_of
from streamtrain.precision import ConfigError, check_precision, offloads_of
from streamtrain.training.schedule import LRSchedule

log = logging.getLogger("streamtrain")

Tensors = dict[str, torch.Tensor]
NO_FP16_HINT = "deepspeed.bf16.enabled=true trains in bf16, deepspeed.torch_autocast.enabled=true partly so"
MAX_BUCKET = 500_000_000  # elements, DeepSpeed's own default


@dataclass(frozen=True)
class FullState:
    """Hold the training state, whole and in fp32, so that it fits any number of ranks and any ZeRO stage."""

    params: Tensors  # of the network, by name
    optim: Tensors  # of the optimizer, "exp_avg.<name>" and the like
    ema: Tensors  # of the weights, if one is kept
    scalars: dict[str, Any] = field(default_factory=dict)  # steps of the optimizer, state of the loss scaler


class Engine:
    """Train a model under ZeRO 1, 2 or 3. The losses of a step are summed over its forward passes and the ranks."""

    def __init__(
        self, model: CTCModel, schedule: LRSchedule, settings: Mapping[str, Any], ema_decay: float, world: World
    ) -> None:
        self.model, self.world = model, world
        self._schedule = schedule
        precision = check_precision(settings)
        if precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError("deepspeed.fp16 is enabled, which this device does not support", NO_FP16_HINT)
        self._autocast = precision == "torch_autocast"
        groups = [{"params": group.parameters, "lr": group.peak} for group in schedule.groups]
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, config=_engine_settings(settings, schedule.learning, world)
            )
        except (ValueError, TypeError, AssertionError) as error:  # DeepSpeed raises these for an invalid setting
            raise ConfigError(
                f"DeepSpeed rejects the section 'deepspeed': {error}", "see configs/zero2.json"
            ) from error
        if hasattr(self._engine.optimizer, "loss_scaler"):
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the training loop reports it
        _skip_overflow_check(self._engine.optimizer)
        self._average = EMA(model, ema_decay) if ema_decay else None
        self._arrivals: list[int] = []
        for number, (_, parameter) in enumerate(self._trainable()):
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, number=number: self._arrivals.append(number)
            )

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        return self._engine(*inputs)  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradients of a loss. If it is the step's `last`, also all-reduce them over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)  # the engine averages over the ranks

    def check_gradient_order(self, lengths: list[int]) -> list[str]:
        """Return the order in which a backward pass over silent clips of these lengths (samples) reaches the weights.

        It runs on this rank alone: gradients are neither all-reduced nor kept.
        """
        names, weights = zip(*self._trainable(), strict=True)
        order: list[str] = []
        hooks = [
            weight.register_hook(lambda _, name=name: order.append(name))
            for name, weight in zip(names, weights, strict=True)
        ]
        silence = torch.zeros(len(lengths), max(lengths), device=self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            log_probs = self.model(silence, torch.tensor(lengths))
        torch.autograd.grad(log_probs.sum(), weights, allow_unused=True)
        for hook in hooks:
            hook.remove()
        return order

    def take_arrivals(self) -> list[int]:
        """Return the numbers of the weights that have received gradients since the last call, in that order."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def names_of(self, numbers: Iterable[int]) -> list[str]:
        """Return the names of weights, by their numbers in `take_arrivals`."""
        names = [name for name, _ in self._trainable()]
        return [names[number] for number in numbers]

    def step(self, step: int) -> float | None:
        """Run step `step` of the schedule. Return the gradient norm, or None if it was not finite and nothing moved."""
        for group, rate in zip(self._engine.optimizer.param_groups, self._schedule.rates(step), strict=True):
            group["lr"] = rate
        self._engine.step()
        if self._engine.optimizer.overflow:
            return None
        if self._average is not None:
            self._average.update(step)
        return float(self._engine.get_global_grad_norm())

    def rate(self, step: int) -> float:
        """Return the highest learning rate of a step."""
        return max(self._schedule.rates(step))

    def scored_copy(self) -> CTCModel:
        """Return a copy of the model with the weights to score and save: the average, if one is kept.

        Every rank gets the whole weights in fp32, for any precision and ZeRO stage. All ranks call it together.
        """
        weights = Tensors(self.model.network.named_buffers())
        for name, parameter in self.model.network.named_parameters():
            if self._average is None or not parameter.requires_grad:
                weights[name] = _full_weight(parameter).detach().float().to(self.world.device)
        if self._average is not None:
            weights.update((name, full.to(self.world.device)) for name, full in self._average.gather(self.world))
        return copy_of(self.model, weights)

    # --- full tensors -----------------------------------------------------------------------------------------------

    def gather(self) -> FullState:
        """Gather the full state in the memory of rank 0; other ranks return no tensors. All ranks call it together."""
        moments = Tensors()
        self._link_moments()
        for name, parameter in self._trainable():
            for kind in _moment_names(self._engine.optimizer.optimizer):
                self._store(moments, f"{kind}.{name}", safe_get_full_optimizer_state(parameter, kind))
        return FullState(self._gather_weights(), moments, self._gather_average(), self._scalars())

    def make_moments(self) -> None:
        """Make the optimizer allocate its moments now, as zeros, by a step over silence at learning rate 0.

        Undo what else that step changes. Do nothing if there are moments already.
        """
        optimizer = self._engine.optimizer
        if _moment_names(optimizer.optimizer):
            return
        scaler = getattr(optimizer, "loss_scaler", None)
        scale = dict(vars(scaler)) if scaler else {}
        silence = torch.zeros(1, SAMPLE_RATE, device=self.world.device)
        log_probs = self.forward(silence, torch.tensor([SAMPLE_RATE]))
        self.backward(0.0 * log_probs.sum(), last=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.step()
        kinds = _moment_names(optimizer.optimizer)
        for state in optimizer.optimizer.state.values():
            for kind in kinds:
                state[kind].zero_()  # Adam's L2 weight decay adds to them
        _set_steps(optimizer.optimizer, 0)
        if scaler:
            vars(scaler).update(scale)
        self._link_moments()
        self.take_arrivals()

    def _link_moments(self) -> None:
        """Link weights to their moments under ZeRO 1 and 2, which do so only for the first of several groups."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "bit16_groups"):
            for weights, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, flat, optimizer.optimizer.state)

    def _gather_weights(self) -> Tensors:
        weights = Tensors()
        for name, parameter in self.model.network.named_parameters():
            self._store(weights, name, _full_weight(parameter))
        if self.world.main:
            state = self.model.network.state_dict().items()
            weights |= {name: value.cpu().clone() for name, value in state if name not in weights}  # buffers
        return weights

    def _gather_average(self) -> Tensors:
        average = Tensors()
        if self._average is not None:
            for name, full in self._average.gather(self.world):
                self._store(average, name, full)
        return average

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.model.network.named_parameters() if weight.requires_grad]

    def restore(self, state: FullState) -> None:
        """Restore what `gather` returned. The model must have been built with the same weights."""
        if state.optim:
            self.make_moments()
        kinds = _moment_names(self._engine.optimizer.optimizer)
        for name, parameter in self._trainable():
            self._set(parameter, state.params[name], None)
            for kind in kinds:
                self._set(parameter, state.optim[f"{kind}.{name}"], kind)
        optimizer = self._engine.optimizer
        _set_steps(optimizer.optimizer, state.scalars["optimizer_steps"])
        if hasattr(optimizer, "loss_scaler"):
            vars(optimizer.loss_scaler).update(state.scalars["loss_scaler"])
        if self._average is not None:
            self._average.restore(state.ema or state.params, self.world)  # a run saved without an average starts one

    def _store(self, tensors: Tensors, name: str, full: torch.Tensor) -> None:
        if self.world.main:
            tensors[name] = full.detach().float().cpu().contiguous().clone()

    def _set(self, parameter: nn.Parameter, full: torch.Tensor, kind: str | None) -> None:
        full = full.to(self.world.device)
        if hasattr(parameter, "ds_id"):
            shard = _own_shard(parameter, full, self.world)
            if kind is None:
                safe_set_local_fp32_param(parameter, shard)
            else:
                safe_set_local_optimizer_state(parameter, shard, kind)
        elif kind is None:
            safe_set_full_fp32_param(parameter, full)
        else:
            safe_set_full_optimizer_state(parameter, full, kind)

    def _scalars(self) -> dict[str, Any]:
        optimizer = self._engine.optimizer
        scaler = vars(getattr(optimizer, "loss_scaler", None) or object)
        return {
            "optimizer_steps": _step_count(optimizer.optimizer),
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, bool | int | float)},
        }


class EMA:
    """Average the weights exponentially (Polyak & Juditsky 1992). Under ZeRO-3 each rank averages its shard.

    The average starts at the initial weights and soon forgets them: the first steps use a lower decay.
    """

    def __init__(self, model: CTCModel, decay: float) -> None:
        self._decay = decay
        named = model.network.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._averages = [shard.detach().float().clone() for shard in self._shards()]

    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [shard.float() for shard in self._shards()], 1 - decay)

    def gather(self, world: World) -> Iterator[tuple[str, torch.Tensor]]:
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            if hasattr(parameter, "ds_tensor"):
                shard = average.to(world.device)  # under CPU offload it is elsewhere
                shards = [torch.empty_like(shard) for _ in range(world.size)]
                torch.distributed.all_gather(shards, shard)
                yield name, torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)
            else:
                yield name, average

    def restore(self, tensors: Tensors, world: World) -> None:
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            full = tensors[name].to(average.device)
            average.copy_(_own_shard(parameter, full, world) if hasattr(parameter, "ds_tensor") else full)

    def _shards(self) -> list[torch.Tensor]:
        """Return what this rank holds of each weight."""
        return [parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
                for parameter in self._parameters.values()]  # fmt: skip


def _skip_overflow_check(optimizer: Any) -> None:
    """Save ZeRO 1 and 2 seven kernels per gradient: the norm shows one that is not finite, and nothing moves then."""
    if hasattr(optimizer, "bit16_groups") and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _engine_settings(settings: Mapping[str, Any], learning: int, world: World) -> dict[str, Any]:
    """Return the section `deepspeed` with our defaults for `learning` weights, adapted if there is no GPU."""
    result: dict[str, Any] = json.loads(json.dumps(settings))  # a copy: DeepSpeed writes into its settings
    result["train_micro_batch_size_per_gpu"] = 1
    result["gradient_accumulation_steps"] = 1  # the boundary that is set in `backward` ends a step
    result.setdefault("steps_per_print", 2**31)
    if any(result.get(half, {}).get("enabled") for half in ("bf16", "fp16")):
        # DeepSpeed's default is the half type: in bf16 the sum of 8 gradients is off by 0.4 %, of 64 by 3 %
        result.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        result.setdefault("communication_data_type", "fp32")
    if result.get("torch_autocast", {}).get("enabled"):
        result["torch_autocast"].setdefault("dtype", "bfloat16")  # DeepSpeed's default on GPUs is float16
        # DeepSpeed would all-reduce the gradients of these modules in bf16; what autocast computes does not change
        result["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    zero = result["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        # DeepSpeed's default of 5e8 takes 2 GB of a GPU's memory each, for any model; it must be even
        zero.setdefault(name, min(learning + learning % 2, MAX_BUCKET))
    on_cpu = world.device.type == "cpu"
    offloads = offloads_of(zero)
    for name in ("offload_optimizer", "offload_param"):
        if name in offloads and on_cpu:
            log.info("deepspeed.zero_optimization.%s has no effect on CPU, where all is in its memory already", name)
        if name not in offloads or on_cpu:
            zero.pop(name, None)
    optimizer = result.get("optimizer", {})
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        params = optimizer["params"]
        params.setdefault("weight_decay", 0.0)  # as DeepSpeed's own Adam; torch's default is 0.01
        if "offload_optimizer" not in zero:
            use_torch = params.setdefault("torch_adam", True)  # as fast as DeepSpeed's, which requires nvcc at start-up
            if on_cpu:
                params["torch_adam"] = True
            elif use_torch and "foreach" not in params:
                params.setdefault("fused", True)
    return result


def _full_weight(parameter: nn.Parameter) -> torch.Tensor:
    """Return the full weight, in fp32 if the optimizer keeps it so. All ranks call it together."""
    if parameter.requires_grad:
        full: torch.Tensor = safe_get_full_fp32_param(parameter)
        return full
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _own_shard(parameter: Any, full: torch.Tensor, world: World) -> torch.Tensor:
    """Return this rank's shard of a weight under ZeRO-3; the last rank's is padded."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * world.size, dtype=full.dtype, device=full.device)
    padded[: full.numel()] = full.flatten()
    return padded[size * world.rank :][:size]


def _moment_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of an optimizer's moments, such as exp_avg and exp_avg_sq; none before its first step."""
    if not optimizer.state:
        return []
    flat, state = next(iter(optimizer.state.items()))
    return sorted(name for name, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)


def _step_count(optimizer: torch.optim.Optimizer) -> float:
    """Return how often the optimizer has stepped. It stores that with each weight, or with each group."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return float((counts or [group.get("step", 0) for group in optimizer.param_groups])[0])


def _set_steps(optimizer: torch.optim.Optimizer, steps: float) -> None:
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = type(state["step"])(steps)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = type(group["step"])(steps)
