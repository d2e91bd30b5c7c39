"""Read one JSON file into checked sections. Each default of a run has its one home here; a misspelt key stops it."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from sharding.files.document import parse_json, read_document
from sharding.files.names import expand_home
from streamtrain.precision import ConfigError, check_precision


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _check_place(value: str) -> str:
    if value.strip() in ("", "-"):
        raise ValueError("the name of a folder or a URL is expected")
    return expand_home(value)


Place = Annotated[str, AfterValidator(_check_place)]
Speed = Annotated[float, Field(ge=0.5, le=2.0)]  # factor; outside this range it is no longer speech


class DataConfig(Section):
    shards: Place = "data/shards"
    """Folder or URL of a shard set."""
    batch_seconds: PositiveFloat = 40.0
    """Maximum of a micro-batch, s, padding included: clips × longest."""
    device_batch_seconds: PositiveFloat | None = None
    """Maximum of a rank's merged micro-batches of a step, s; null: they are not merged."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training split to train on: whole speakers, the same ones each time; 0.1's are among 0.2's."""
    hours: PositiveFloat | None = None
    """Or the hours of it to train on, likewise; null: all."""
    shuffle_shards: PositiveInt = 4
    """Shards of a bucket shuffled together: more mix better, fewer need less cache."""
    length_jitter: float = Field(0.004, ge=0)
    """Noise on the sort key, s: more padding, but other batches each epoch."""
    cache_dir: Place | None = None
    """Folder in which shards of a bucket are cached; null: ranged reads."""
    cache_gb: PositiveFloat = 100.0
    """Maximum of that cache, on each machine, GB."""
    workers: NonNegativeInt = 2
    """Read-ahead threads per rank, or processes if it has a GPU; 0: no read-ahead."""
    speed_factors: list[Speed] = []
    """Speeds such as [0.9, 1, 1.1]: each clip is played at a random one of them in each epoch."""
    noise_snr_db: list[float] = []
    """Range such as [5, 40], dB: random SNR of coloured noise in each clip and epoch."""
    gain_db: float = Field(0.0, ge=0, le=60)
    """Maximum random gain, ±dB, if the model's inputs are not normalised."""

    @model_validator(mode="after")
    def _check_share(self) -> "DataConfig":
        if self.fraction != 1 and self.hours is not None:
            raise ValueError("give either data.fraction or data.hours, not both")
        return self

    @model_validator(mode="after")
    def _check_device_batch(self) -> "DataConfig":
        if self.device_batch_seconds is not None and self.device_batch_seconds < self.batch_seconds:
            raise ValueError("data.device_batch_seconds must be at least data.batch_seconds, one micro-batch")
        return self

    @field_validator("noise_snr_db")
    @classmethod
    def _check_range(cls, value: list[float]) -> list[float]:
        if value and (len(value) != 2 or value[0] > value[1]):
            raise ValueError("give the minimum and the maximum in dB, such as [5, 40]")
        return value


class ModelConfig(Section):
    pretrained: Place | None = None
    """Model to start from: a hub name or a local folder."""
    scratch: dict[str, Any] | None = None
    """Or the fields of a Wav2Vec2Config, for a model with random weights."""
    vocab: Literal["auto", "own", "new"] = "auto"
    """Tokens and head: own are the model's, new are the labels'; auto: own if they cover them, see launch/README."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Rate of all of the model's dropouts."""
    freeze_cnn: bool = True
    """Keep the convolutions in front of the encoder as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    mask_time_prob: float = Field(0.0, ge=0, lt=1)
    """Share of a clip's frames that masked spans cover."""
    mask_time_length: PositiveInt = 10
    """Frames of a masked span; shorter clips are not masked."""
    mask_feature_prob: float = Field(0.0, ge=0, lt=1)
    """Share of the encoder's input features that masked spans cover."""
    mask_feature_length: PositiveInt = 10
    """Features of a masked span."""

    @model_validator(mode="after")
    def _check_origin(self) -> "ModelConfig":
        if (self.pretrained is None) == (self.scratch is None):
            raise ValueError("give either model.pretrained (a name or folder) or model.scratch, exactly one of the two")
        return self


class TrainConfig(Section):
    run_dir: Place = "runs/streamtrain"
    """Folder of the run: log, curves, checkpoints, best model."""
    epochs: PositiveInt = 20
    """Times that each clip is trained on."""
    max_steps: PositiveInt | None = None
    """Steps after which training stops, and the schedule ends; null: those of all epochs."""
    micro_batches_per_step: PositiveInt = 8
    """Micro-batches of a step over all ranks; the number of ranks must divide it."""
    schedule: Literal["linear", "cosine", "tri-stage", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 500
    """Steps in which the rate rises from 0 to its peak."""
    hold_steps: NonNegativeInt | None = None
    """Steps at the peak rate, of tri-stage; null: 40 % of all."""
    final_lr_ratio: float | None = Field(None, gt=0, le=1)
    """Final rate as a share of the peak; null: 0, of tri-stage 0.05."""
    head_lr: PositiveFloat | None = None
    """Peak rate of the new head; null: deepspeed.optimizer.params.lr, as of the encoder."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Rate of each encoder layer, as a share of the next layer's."""
    freeze_encoder_steps: NonNegativeInt = 0
    """First steps, in which only the head is trained."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the average of the weights, which is evaluated and saved; 0: no average."""
    patience: PositiveInt | None = None
    """Evaluations without a better score after which training stops; null: it does not."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; each new best score makes one too."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept, besides that of the best score."""
    mirror: Place | None = None
    """Place such as s3://bucket/run that checkpoints are copied to, to resume on another machine."""
    probe: bool = True
    """Run the largest batches before the first step, to check that they fit in memory."""
    seed: int = Field(0, ge=0)
    """Decides the order of clips, the augmentation and new weights."""


METRICS, GROUPS = ("cer", "wer", "per"), ("speaker", "corpus", "age_bucket", "duration", "label_length")
SELECTIONS = ("auto", "loss", *METRICS, *(f"{metric}/{group}" for metric in METRICS for group in GROUPS))


def name_score(select: str) -> str:
    """Return what the score of an `eval.select` is called: "CER", "mean WER by corpus", "loss"."""
    metric, _, group = select.partition("/")
    name = metric.upper() if metric in METRICS else metric
    return f"mean {name} by {group.replace('_', ' ')}" if group else name


class EvalConfig(Section):
    every_steps: PositiveInt = 500
    """Steps between evaluations; the last step is evaluated too."""
    split: str = "valid"
    """Clips to score: valid, test or train."""
    select: str = "auto"
    """What chooses best/: auto (cer; per of segments and tokens), cer, wer, per, loss, or a mean such as cer/corpus."""

    @field_validator("select")
    @classmethod
    def _check_select(cls, value: str) -> str:
        if value not in SELECTIONS:
            groups = ", ".join(GROUPS)
            raise ValueError(
                f"give auto, cer, wer, per or loss, or a mean over groups, such as cer/corpus (groups: {groups})"
            )
        return value


class Config(Section):
    """Hold a checked configuration: `data`, `model`, `train`, `eval`, and `deepspeed`, which the engine gets.

    Example:
        >>> load_config("zero2", ["train.epochs=30"]).train.epochs
        30
    """

    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: dict[str, Any]

    @model_validator(mode="after")
    def _check_mirror(self) -> "Config":
        for key, other in (("data.shards", self.data.shards), ("train.run_dir", self.train.run_dir)):
            if self.train.mirror is not None and _comparable(self.train.mirror).startswith(_comparable(other)):
                raise ValueError(f"train.mirror, {self.train.mirror!r}, lies in {key}, {other!r}: it must lie outside")
        return self

    @property
    def peak_rate(self) -> float:
        """Return the encoder's peak learning rate."""
        return float(self.deepspeed["optimizer"]["params"]["lr"])

    @property
    def resume_key(self) -> dict[str, Any]:
        """Return all settings that decide what a step computes: no paths, nor when a run is evaluated or saved."""
        places = {"shards", "cache_dir", "cache_gb", "workers"}  # shards are compared by the index's digest
        merging = {"device_batch_seconds"}  # the same step, up to rounding, as on another number of ranks or ZeRO stage
        timing = {"run_dir", "keep_checkpoints", "checkpoint_every", "mirror", "patience", "probe"}
        return self.model_dump(
            exclude={
                "data": places | merging,
                "model": {"gradient_checkpointing"},
                "train": timing,
                "eval": True,
                "deepspeed": {"zero_optimization", "wall_clock_breakdown", "steps_per_print"},
            }
        )


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}

# Keys at the top of the engine's section that a test covers. DeepSpeed silently ignores unknown keys, and many known
# ones change what a step computes.
_TOP_LEVEL = """
    activation_checkpointing aio bf16 comms_logger communication_data_type csv_monitor data_types dump_state
    flops_profiler fp16 gradient_clipping memory_breakdown monitor_config optimizer steps_per_print tensorboard timers
    torch_autocast wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""
PACKAGED = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}  # by their names
SEE = "`streamtrain config zero2` prints one that works"
MAX_DOTS = 20  # in the name of a setting
DEEPSPEED_KEYS = frozenset(_TOP_LEVEL.split())
DERIVED = {
    "train_batch_size": "data.batch_seconds and train.micro_batches_per_step",
    "train_micro_batch_size_per_gpu": "data.batch_seconds",
    "gradient_accumulation_steps": "train.micro_batches_per_step",
    "scheduler": "train.schedule and train.warmup_steps",
    "gradient_allreduce_op": "the loss, which is summed over ranks and divided by the labels of the step",
    "managed_gradient_accumulation": "train.micro_batches_per_step",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: JSON file, or the name of a packaged configuration: "zero2".
        overrides: Settings that replace those of the file: ["train.epochs=30"].

    Raises:
        ConfigError: If it cannot be read, or a key is unknown, missing or out of bounds; the message names the key.

    Example:
        >>> load_config("demo", ["data.shards=s3://speech/shards"]).data.shards
        's3://speech/shards'
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are {overrides!r}: a list of such settings is expected")
    path = _find(path)
    try:
        document = parse_json(read_document(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", f"packaged configurations: {', '.join(PACKAGED)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", SEE) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: an object with sections is expected", SEE)
    for override in overrides:
        _set(document, override)
    origin = f"{path} with --set" if overrides else str(path)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise _explain(error, origin) from error
    for key, source in DERIVED.items():
        if key in config.deepspeed:
            raise ConfigError(f"{origin}: 'deepspeed.{key}' is not set here", f"it follows from {source}")
    for key in config.deepspeed.keys() - DEEPSPEED_KEYS:  # DeepSpeed would ignore it
        near = difflib.get_close_matches(key[:100], DEEPSPEED_KEYS, 1, 0.5)
        hint = f"did you mean 'deepspeed.{near[0]}'?" if near else f"known keys: {', '.join(sorted(DEEPSPEED_KEYS))}"
        raise ConfigError(f"{origin}: key 'deepspeed.{key:.200}' is unknown or not supported", hint)
    check_precision(config.deepspeed)
    if "lr" not in config.deepspeed.get("optimizer", {}).get("params", {}):
        raise ConfigError("deepspeed.optimizer.params.lr is missing", SEE)
    return config


def _find(path: str | Path) -> Path:
    """Return the file of a configuration: `path` itself, or the packaged one of that name if there is no such file."""
    packaged = PACKAGED.get(str(path))
    return Path(path) if packaged is None or Path(path).is_file() else packaged


def explain(config: Config | None) -> str:
    """Return a line for each key: its name, its value (default: the default's), and its meaning."""
    lines = []
    for section, kind in SECTIONS.items():
        for key, one in kind.model_fields.items():
            default = json.dumps(one.default)
            value = default if config is None else json.dumps(getattr(getattr(config, section), key))
            changed = "" if value == default else f" (default: {default})"
            lines.append(f"{section}.{key}={value}{changed}\n    {one.description}")
    lines.append(f"deepspeed: DeepSpeed's own settings: {', '.join(sorted(DEEPSPEED_KEYS))}")
    return "\n".join(lines)


def _set(document: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")) or name.count(".") > MAX_DOTS:
        message = f"--set {override:.200}: section.key=value is expected"
        raise ConfigError(message, "put other arguments before --set")
    *path, last = name.split(".")
    node = document
    for key in path:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override:.200}: {key!r} is {node!r:.200}, not a section")
    try:
        node[last] = parse_json(text.encode(errors="surrogateescape"))
    except ValueError:
        node[last] = text  # a bare word is a string
    if name == "model.pretrained" and node[last] is not None:
        node["scratch"] = None  # naming weights replaces a model from scratch


def _explain(error: ValidationError, path: str) -> ConfigError:
    first = error.errors()[0]
    key, value = ".".join(str(part) for part in first["loc"])[:200], f"{first['input']!r:.200}"
    if first["type"] == "extra_forbidden":
        matches = difflib.get_close_matches(key, _all_keys(), 1, 0.5)
        return ConfigError(f"{path}: unknown key {key!r}", f"did you mean {matches[0]!r}?" if matches else None)
    if first["type"] == "list_type":
        return ConfigError(f"{path}: {key!r} is {value}, not a list", f"write --set '{key}=[0.9,1,1.1]'")
    if first["type"] == "missing":
        return ConfigError(f"{path}: {key!r} is missing")
    reason = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{path}: {key!r} is {value}: {reason}" if key not in ("", "model") else f"{path}: {reason}")


def _comparable(location: str) -> str:
    """Return a URL or folder in one form, so that whatever lies in it starts with this text."""
    path = location.removeprefix("file://")
    return f"{location.rstrip('/') if '://' in path else Path(path).resolve()}/"


def _all_keys() -> list[str]:
    return [*Config.model_fields, *(f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields)]
