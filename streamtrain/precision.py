"""Check the combination of precision, ZeRO stage and offload; reject with an error what no test covers.

DeepSpeed accepts many more, and some of them silently train wrongly: torch_autocast in float16 scales the loss but
clips and measures gradients that are still scaled. Needs no torch, so that a mistake is reported at once.
"""

import sys
from collections.abc import Mapping
from typing import Any

from sharding.errors import StreamtrainError


class ConfigError(StreamtrainError):
    """Report a configuration that cannot be run."""


PRECISIONS = {  # storage of weights and arithmetic of a forward, by the section of `deepspeed` that enables it
    "fp32": "weights and arithmetic in fp32",
    "torch_autocast": "weights in fp32, products in bfloat16",
    "bf16": "weights in bf16 with an fp32 copy in the optimizer",
    "fp16": "weights in fp16 with an fp32 copy in the optimizer, and a loss scale",
}
OFFLOADS = {  # what may be moved to the host's memory, by ZeRO stage
    1: [(), ("offload_optimizer",)],
    2: [(), ("offload_optimizer",)],
    3: [(), ("offload_optimizer",), ("offload_optimizer", "offload_param")],
}
NEVER: dict[tuple[str, int, tuple[str, ...]], str] = {
    ("bf16", 1, ("offload_optimizer",)): "use stage 2, which costs no more"
}
KEYS = {  # supported in each section; others change what a step computes, or are covered by no test
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
    "bf16": "enabled",
    "fp16": "enabled loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale",
    "data_types": "grad_accum_dtype",
    "zero_optimization": """
        stage reduce_bucket_size allgather_bucket_size overlap_comm contiguous_gradients reduce_scatter
        allgather_partitions round_robin_gradients sub_group_size offload_optimizer offload_param
        stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_gather_16bit_weights_on_model_save""",
    "zero_optimization.offload_optimizer": "device pin_memory",
    "zero_optimization.offload_param": "device pin_memory",
}


def check_precision(deepspeed: Mapping[str, Any]) -> str:
    """Return the precision of a section `deepspeed`, a key of PRECISIONS. Raises ConfigError if unsupported."""
    for name, keys in KEYS.items():
        section: Any = deepspeed
        for part in name.split("."):
            section = section.get(part, {}) if isinstance(section, Mapping) else section
        if not isinstance(section, Mapping):
            raise ConfigError(f"deepspeed.{name} is {section!r}, not a section", "see configs/zero2.json")
        if not isinstance(section.get("enabled", True), bool):
            raise ConfigError(f"deepspeed.{name}.enabled is {section['enabled']!r}", "true or false is expected")
        for key in section.keys() - set(keys.split()):
            raise ConfigError(f"deepspeed.{name}.{key} is not supported", f"its keys are {', '.join(keys.split())}")
    enabled = [name for name in PRECISIONS if deepspeed.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        raise ConfigError(
            f"deepspeed.{' and deepspeed.'.join(enabled)} are both enabled",
            "enable one: --set deepspeed.NAME.enabled=false",
        )
    precision = enabled[0] if enabled else "fp32"
    dtype = deepspeed.get("torch_autocast", {}).get("dtype", "bfloat16")
    if precision == "torch_autocast" and dtype != "bfloat16":
        raise ConfigError(
            f"deepspeed.torch_autocast.dtype is {dtype!r}: DeepSpeed would clip gradients that are still scaled",
            "bfloat16 needs no scale; for float16, --set deepspeed.torch_autocast.enabled=false "
            "deepspeed.fp16.enabled=true",
        )
    _check_step(deepspeed)
    _check_grad_dtypes(deepspeed)
    _check_offload(precision, deepspeed.get("zero_optimization", {}))
    return precision


def _check_step(deepspeed: Mapping[str, Any]) -> None:
    """Raise ConfigError if the optimizer or the clipping is not supported."""
    optimizer = deepspeed.get("optimizer", {})
    params = optimizer.get("params", {}) if isinstance(optimizer, Mapping) else None
    if not isinstance(params, Mapping):
        raise ConfigError(
            f"deepspeed.optimizer is {optimizer!r:.200}, not a section with params", "see configs/zero2.json"
        )
    kind = optimizer.get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        raise ConfigError(f"deepspeed.optimizer.type is {kind!r}", "Adam and AdamW are supported")
    wrong = {name: expected for name, (valid, expected) in PARAMS.items() if name in params and not valid(params[name])}
    for name, expected in wrong.items():
        raise ConfigError(f"deepspeed.optimizer.params.{name} is {params[name]!r:.200}", f"{expected} expected")
    for name in params.keys() - PARAMS.keys():
        raise ConfigError(f"deepspeed.optimizer.params.{name} is not supported", f"its keys are {', '.join(PARAMS)}")
    clipping = deepspeed.get("gradient_clipping", 0.0)
    if not _is_number(clipping):
        raise ConfigError(f"deepspeed.gradient_clipping is {clipping!r}", "the largest norm is expected, or 0 for none")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _are_betas(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(beta) and beta < 1 for beta in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


PARAMS = {  # of the optimizer: the check of a value, and what an error names as expected
    "lr": (_is_number, "the peak rate is"),
    "betas": (_are_betas, "two numbers from 0 to below 1, such as [0.9,0.999], are"),
    "eps": (_is_number, "a number of 0 or more is"),
    "weight_decay": (_is_number, "a number of 0 or more is"),
    "adam_w_mode": (_is_flag, "true or false is"),
    "torch_adam": (_is_flag, "true or false is"),
    "foreach": (_is_flag, "true or false is"),
    "fused": (_is_flag, "true or false is"),
}


def _check_grad_dtypes(deepspeed: Mapping[str, Any]) -> None:
    """Raise ConfigError if gradients would be summed in less than fp32 precision."""
    for name, value in (
        ("data_types.grad_accum_dtype", deepspeed.get("data_types", {}).get("grad_accum_dtype")),
        ("communication_data_type", deepspeed.get("communication_data_type")),
    ):
        if value not in (None, "fp32"):
            raise ConfigError(f"deepspeed.{name} is {value!r}: gradients are summed in fp32 alone",
                              "leave it out, or write fp32")  # fmt: skip


def _check_offload(precision: str, zero: Mapping[str, Any]) -> None:
    stage = zero.get("stage")
    if type(stage) is not int or stage not in OFFLOADS:
        raise ConfigError(f"deepspeed.zero_optimization.stage is {stage!r}", "1, 2 and 3 are supported")
    offload = offloads_of(zero)
    for name in offload:
        if (device := zero[name]["device"]) != "cpu":
            raise ConfigError(f"deepspeed.zero_optimization.{name} is to {device!r}", "cpu and none are supported")
    if offload not in OFFLOADS[stage]:
        unsupported = [name for name in offload if name != "offload_optimizer"] or list(offload)
        raise ConfigError(
            f"deepspeed.zero_optimization.{unsupported[0]} is not supported at stage {stage} with {_join(offload)}",
            f"at stage {stage}: {'; '.join(_join(names) for names in OFFLOADS[stage])}",
        )
    if (precision, stage, offload) in NEVER:
        raise ConfigError(
            f"deepspeed.{precision} with stage {stage} and {_join(offload)} is not supported",
            NEVER[precision, stage, offload],
        )


def offloads_of(zero: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a section `zero_optimization` moves off the GPU."""
    names = ("offload_optimizer", "offload_param")
    return tuple(name for name in names if zero.get(name, {}).get("device", "none") != "none")


def _join(offload: tuple[str, ...]) -> str:
    return " and ".join(offload) or "no offload"
