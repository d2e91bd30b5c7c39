"""DeepSpeed's engine: how it starts and steps, how its partitioned tensors are gathered whole and given back."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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

from sharding.audio import SAMPLE_RATE
from streamtrain.model import copy_of
from streamtrain.network import CTCModel
from streamtrain.precision import ConfigError, check_precision, offloads_of
from streamtrain.recipe import Recipe
from streamtrain.world import World

log = logging.getLogger("streamtrain")

Tensors = dict[str, torch.Tensor]
NO_FP16_HINT = "deepspeed.bf16.enabled=true trains in bf16, deepspeed.torch_autocast.enabled=true partly so"
MAX_BUCKET = 500_000_000  # elements, as the engine's own


@dataclass(frozen=True)
class Parts:
    """What training has made so far, whole and in fp32: it fits any number of ranks and any ZeRO stage."""

    weights: Tensors  # of the network, by name
    moments: Tensors  # of the optimizer, "exp_avg.<name>" and the like
    average: Tensors  # of the weights, where one is kept
    numbers: dict[str, Any] = field(default_factory=dict)  # steps of the optimizer, state of the loss scaler


class Engine:
    """A model under ZeRO 1, 2 or 3. The losses of a step are summed over its forwards and over the ranks."""

    def __init__(
        self, model: CTCModel, recipe: Recipe, settings: Mapping[str, Any], ema_decay: float, world: World
    ) -> None:
        self.model, self.world = model, world
        self._recipe = recipe
        precision = check_precision(settings)
        if precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError("deepspeed.fp16 is enabled, which this device does not compute in", NO_FP16_HINT)
        self._autocast = precision == "torch_autocast"
        groups = [{"params": group.parameters, "lr": group.peak} for group in recipe.groups]
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, config=_settings_here(settings, recipe.learning, world)
            )
        except (ValueError, TypeError, AssertionError) as error:  # what it raises for a setting it does not take
            raise ConfigError(
                f"DeepSpeed does not take the section 'deepspeed': {error}", "see configs/zero2.json"
            ) from error
        if hasattr(self._engine.optimizer, "loss_scaler"):
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # it is told by the loop
        _leave_overflow_to_the_norm(self._engine.optimizer)
        self._average = WeightAverage(model, ema_decay) if ema_decay else None
        self._arrived: list[int] = []
        for number, (_, parameter) in enumerate(self._learning()):
            hook = partial(self._note_arrival, number)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        return self._engine(*inputs)  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a loss to those of the step; `last` of its forwards, they are summed over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)  # the engine takes the mean over the ranks

    def try_order(self, lengths: list[int]) -> list[str]:
        """Return the order in which a backward pass over silent clips of these lengths (samples) reaches the weights.

        It runs on this rank alone: no gradient is summed over ranks or kept.
        """
        names, weights = zip(*self._learning(), strict=True)
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
        """Return the numbers of the weights to which gradients have come since the last call, in that order."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def names_of(self, numbers: Iterable[int]) -> list[str]:
        """Return the names of weights, by the numbers of `take_arrivals`."""
        names = [name for name, _ in self._learning()]
        return [names[number] for number in numbers]

    def _note_arrival(self, number: int, _: torch.Tensor) -> None:
        self._arrived.append(number)

    def step(self, step: int) -> float | None:
        """Step `step` of the recipe; the norm of its gradient, or None where that was not finite and nothing moved."""
        for group, rate in zip(self._engine.optimizer.param_groups, self._recipe.rates(step), strict=True):
            group["lr"] = rate
        self._engine.step()
        if self._engine.optimizer.overflow:
            return None
        if self._average is not None:
            self._average.update(step)
        return float(self._engine.get_global_grad_norm())

    def rate(self, step: int) -> float:
        """The highest learning rate of a step."""
        return max(self._recipe.rates(step))

    def scored_copy(self) -> CTCModel:
        """Return a copy of the model with the weights that are scored and saved: the average if one is kept.

        It has them whole and in fp32 on every rank, whatever the precision and the stage of training; all ranks call it
        together.
        """
        weights = Tensors(self.model.network.named_buffers())
        for name, parameter in self.model.network.named_parameters():
            if self._average is None or not parameter.requires_grad:
                weights[name] = _whole_weight(parameter).detach().float().to(self.world.device)
        if self._average is not None:
            weights.update((name, whole.to(self.world.device)) for name, whole in self._average.gather(self.world))
        return copy_of(self.model, weights)

    # --- whole tensors ----------------------------------------------------------------------------------------------

    def gather(self) -> Parts:
        """All ranks call it together; the tensors come to rank 0's memory, elsewhere there are none."""
        moments = Tensors()
        self._link_moments()
        for name, parameter in self._learning():
            for kind in _moments_of(self._engine.optimizer.optimizer):
                self._keep(moments, f"{kind}.{name}", safe_get_full_optimizer_state(parameter, kind))
        return Parts(self._gather_weights(), moments, self._gather_average(), self._numbers())

    def make_moments(self) -> None:
        """Have the optimizer make its moments now, as zeros, which it does at its first step: one over silence.

        At rate 0, and what else that step moves is put back. Where there are moments already, nothing is done.
        """
        optimizer = self._engine.optimizer
        if _moments_of(optimizer.optimizer):
            return
        scaler = getattr(optimizer, "loss_scaler", None)
        scale = dict(vars(scaler)) if scaler else {}
        silence = torch.zeros(1, SAMPLE_RATE, device=self.world.device)
        log_probs = self.forward(silence, torch.tensor([SAMPLE_RATE]))
        self.backward(0.0 * log_probs.sum(), last=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.step()
        kinds = _moments_of(optimizer.optimizer)
        for state in optimizer.optimizer.state.values():
            for kind in kinds:
                state[kind].zero_()  # weight decay of the plain kind goes into them
        _set_steps(optimizer.optimizer, 0)
        if scaler:
            vars(scaler).update(scale)
        self._link_moments()
        self.take_arrivals()

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 lead from a weight to its moments, but where there are several groups only of the first."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "bit16_groups"):
            for weights, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, flat, optimizer.optimizer.state)

    def _gather_weights(self) -> Tensors:
        weights = Tensors()
        for name, parameter in self.model.network.named_parameters():
            self._keep(weights, name, _whole_weight(parameter))
        if self.world.main:
            state = self.model.network.state_dict().items()
            weights |= {name: value.cpu().clone() for name, value in state if name not in weights}  # buffers
        return weights

    def _gather_average(self) -> Tensors:
        average = Tensors()
        if self._average is not None:
            for name, whole in self._average.gather(self.world):
                self._keep(average, name, whole)
        return average

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.model.network.named_parameters() if weight.requires_grad]

    def restore(self, parts: Parts) -> None:
        """Take up what `gather` gave. The model must have been made with those weights (`model.load_weights`)."""
        if parts.moments:
            self.make_moments()
        kinds = _moments_of(self._engine.optimizer.optimizer)
        for name, parameter in self._learning():
            self._give(parameter, parts.weights[name], None)
            for kind in kinds:
                self._give(parameter, parts.moments[f"{kind}.{name}"], kind)
        optimizer = self._engine.optimizer
        _set_steps(optimizer.optimizer, parts.numbers["optimizer_steps"])
        if hasattr(optimizer, "loss_scaler"):
            vars(optimizer.loss_scaler).update(parts.numbers["loss_scaler"])
        if self._average is not None:
            self._average.restore(parts.average or parts.weights, self.world)  # begun without, it begins here

    def _keep(self, tensors: Tensors, name: str, whole: torch.Tensor) -> None:
        if self.world.main:
            tensors[name] = whole.detach().float().cpu().contiguous().clone()

    def _give(self, parameter: nn.Parameter, whole: torch.Tensor, kind: str | None) -> None:
        whole = whole.to(self.world.device)
        if hasattr(parameter, "ds_id"):
            part = _own_part(parameter, whole, self.world)
            if kind is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)

    def _numbers(self) -> dict[str, Any]:
        optimizer = self._engine.optimizer
        scaler = vars(getattr(optimizer, "loss_scaler", None) or object)
        return {
            "optimizer_steps": _steps_of(optimizer.optimizer),
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, bool | int | float)},
        }


class WeightAverage:
    """An exponential moving average of the weights (Polyak & Juditsky 1992); under ZeRO-3 each rank averages its part.

    It begins with what there is and forgets that soon: the first steps count as in a shorter average.
    """

    def __init__(self, model: CTCModel, decay: float) -> None:
        self._decay = decay
        named = model.network.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._averages = [here.detach().float().clone() for here in self._here()]

    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [here.float() for here in self._here()], 1 - decay)

    def gather(self, world: World) -> Iterator[tuple[str, torch.Tensor]]:
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            if hasattr(parameter, "ds_tensor"):
                mine = average.to(world.device)  # with CPU offload it lies elsewhere
                parts = [torch.empty_like(mine) for _ in range(world.size)]
                torch.distributed.all_gather(parts, mine)
                yield name, torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
            else:
                yield name, average

    def restore(self, wholes: Tensors, world: World) -> None:
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            whole = wholes[name].to(average.device)
            average.copy_(_own_part(parameter, whole, world) if hasattr(parameter, "ds_tensor") else whole)

    def _here(self) -> list[torch.Tensor]:
        """What this rank holds of each weight."""
        return [parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
                for parameter in self._parameters.values()]  # fmt: skip


def _leave_overflow_to_the_norm(optimizer: Any) -> None:
    """Spare ZeRO 1 and 2 seven kernels a gradient: where one is not finite the norm shows it, and nothing moves."""
    if hasattr(optimizer, "bit16_groups") and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _settings_here(settings: Mapping[str, Any], learning: int, world: World) -> dict[str, Any]:
    """Return the section `deepspeed` with what is ours, for `learning` weights, and as it runs without a GPU."""
    here: dict[str, Any] = json.loads(json.dumps(settings))  # the engine writes into what it is given
    here["train_micro_batch_size_per_gpu"] = 1
    here["gradient_accumulation_steps"] = 1  # forwards of a step are told from one another by its boundary
    here.setdefault("steps_per_print", 2**31)
    if any(here.get(half, {}).get("enabled") for half in ("bf16", "fp16")):
        # The engine's own choice is the half type: in bf16 the sum of 8 gradients is off by 0.4 %, of 64 by 3 %
        here.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        here.setdefault("communication_data_type", "fp32")
    if here.get("torch_autocast", {}).get("enabled"):
        here["torch_autocast"].setdefault("dtype", "bfloat16")  # without one, GPUs would take float16
        # Modules whose gradients the engine would sum over the ranks in bf16; what autocast computes stays as it is
        here["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    zero = here["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        # The engine's own 5e8 are 2 GB each of a GPU's memory, whatever the model; it wants an even number
        zero.setdefault(name, min(learning + learning % 2, MAX_BUCKET))
    on_cpu = world.device.type == "cpu"
    offloads = offloads_of(zero)
    for name in ("offload_optimizer", "offload_param"):
        if name in offloads and on_cpu:
            log.info("deepspeed.zero_optimization.%s has no effect on CPU, where all is in its memory already", name)
        if name not in offloads or on_cpu:
            zero.pop(name, None)
    optimizer = here.get("optimizer", {})
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        params = optimizer["params"]
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's own Adam has none where torch's has 0.01
        if "offload_optimizer" not in zero:
            torchs = params.setdefault("torch_adam", True)  # as fast as DeepSpeed's, which wants nvcc at its start
            if on_cpu:
                params["torch_adam"] = True
            elif torchs and "foreach" not in params:
                params.setdefault("fused", True)
    return here


def _whole_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The full weight, in fp32 where the optimizer keeps it so; all ranks together."""
    if parameter.requires_grad:
        whole: torch.Tensor = safe_get_full_fp32_param(parameter)
        return whole
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _own_part(parameter: Any, whole: torch.Tensor, world: World) -> torch.Tensor:
    """This rank's part of a weight under ZeRO-3; the last one's is padded."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * world.size, dtype=whole.dtype, device=whole.device)
    padded[: whole.numel()] = whole.flatten()
    return padded[size * world.rank :][:size]


def _moments_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """What the optimizer keeps of each weight, such as exp_avg and exp_avg_sq; nothing before its first step."""
    if not optimizer.state:
        return []
    flat, state = next(iter(optimizer.state.items()))
    return sorted(name for name, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)


def _steps_of(optimizer: torch.optim.Optimizer) -> float:
    """How often the optimizer has stepped: it keeps that with each weight, or with each group."""
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
