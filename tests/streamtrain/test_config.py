"""A configuration is checked whole before anything starts, and says what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.files.names import expand_home
from streamtrain.config import Config, ConfigError, load_config
from streamtrain.data.plan import PlanSettings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
Load = Callable[..., Config]

SMALL: dict[str, Any] = {
    "model": {"scratch": {"hidden_size": 64}},
    "deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load("section.key=value", …, sections)` writes a small configuration with other sections, and loads it."""

    def run(*overrides: str, **sections: Any) -> Config:
        path = tmp_path / "run.json"
        path.write_text(json.dumps(SMALL | sections), encoding="utf-8")
        return load_config(path, overrides)

    return run


@pytest.fixture
def refusal(load: Load) -> Callable[..., str]:
    def run(*overrides: str, **sections: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            load(*overrides, **sections)
        return str(refused.value)

    return run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load_config(path)
    assert PlanSettings.of(config).micro_batches_per_step == config.train.micro_batches_per_step
    assert PlanSettings.of(config).batch_seconds == config.data.batch_seconds
    assert float(config.deepspeed["optimizer"]["params"]["lr"]) > 0


@pytest.mark.parametrize(
    ("section", "key", "right"),
    [
        ("data", "batch_second", "data.batch_seconds"),
        ("data", "cachedir", "data.cache_dir"),
        ("model", "pretrain", "model.pretrained"),
        ("train", "max_step", "train.max_steps"),
        ("train", "rundir", "train.run_dir"),
        ("eval", "every_step", "eval.every_steps"),
    ],
)
def test_a_misspelt_key_stops_with_the_nearest_right_one(
    section: str, key: str, right: str, refusal: Callable[..., str]
) -> None:
    for message in (refusal(f"{section}.{key}=1"), refusal(**{section: SMALL.get(section, {}) | {key: 1}})):
        assert f"unknown key '{section}.{key}'" in message
        assert f"did you mean '{right}'?" in message


@pytest.mark.parametrize(
    ("key", "right"), [("trian", "train"), ("dta", "data"), ("models", "model"), ("deepsped", "deepspeed")]
)
def test_a_misspelt_section_stops_with_the_nearest_right_one(key: str, right: str, refusal: Callable[..., str]) -> None:
    message = refusal(**{key: {}})
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{right}'?" in message


def test_set_reaches_any_depth_and_takes_several_pairs(load: Load) -> None:
    config = load(
        "data.batch_seconds=12.5",
        "train.run_dir=runs/other",
        "train.max_steps=null",
        "model.scratch.conv_dim=[32, 32]",
        "deepspeed.optimizer.params.lr=2e-4",
        "deepspeed.zero_optimization.offload_optimizer.device=cpu",
        "data.shards=s3://bucket/a=b",
    )
    assert config.data.batch_seconds == 12.5
    assert config.data.shards == "s3://bucket/a=b"
    assert config.train.run_dir == "runs/other"
    assert config.train.max_steps is None
    assert config.model.scratch == {"hidden_size": 64, "conv_dim": [32, 32]}
    assert config.deepspeed["optimizer"] == {"type": "AdamW", "params": {"lr": 2e-4}}
    assert config.deepspeed["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_the_last_of_two_overrides_holds(load: Load) -> None:
    assert load("train.epochs=3", "train.epochs=4").train.epochs == 4


def test_naming_pretrained_weights_replaces_a_model_from_scratch(load: Load) -> None:
    model = load("model.pretrained=facebook/wav2vec2-base").model
    assert (model.pretrained, model.scratch) == ("facebook/wav2vec2-base", None)


@pytest.mark.parametrize("override", ["data.batch_seconds", "=3", "", "data.batch_seconds.value=3", "data..x=1"])
def test_a_malformed_override_is_repeated_in_the_message(override: str, refusal: Callable[..., str]) -> None:
    assert f"--set {override}: " in refusal(override, data={"batch_seconds": 30})


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("train_batch_size", "data.batch_seconds and train.micro_batches_per_step"),
        ("train_micro_batch_size_per_gpu", "data.batch_seconds"),
        ("gradient_accumulation_steps", "train.micro_batches_per_step"),
        ("scheduler", "train.schedule"),
    ],
)
def test_what_follows_from_the_plan_is_refused_in_deepspeed(
    key: str, instead: str, refusal: Callable[..., str]
) -> None:
    message = refusal(f"deepspeed.{key}=4")
    assert f"'deepspeed.{key}' is not set here" in message
    assert instead in message


def test_both_origins_of_a_model_or_none_are_refused(refusal: Callable[..., str]) -> None:
    for model in ({}, {"pretrained": "facebook/wav2vec2-base", "scratch": {}}):
        assert "give either model.pretrained (a name or folder) or model.scratch" in refusal(model=model)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.batch_seconds=0", "data.batch_seconds"),
        ("data.batch_seconds=Infinity", "data.batch_seconds"),
        ("data.cache_gb=NaN", "data.cache_gb"),
        ("data.workers=two", "data.workers"),
        ("data.length_jitter=-0.1", "data.length_jitter"),
        ("model.dropout=1", "model.dropout"),
        ("train.epochs=0", "train.epochs"),
        ("train.seed=-1", "train.seed"),
        ("train.schedule=cosinus", "train.schedule"),
        ("train.micro_batches_per_step=1.5", "train.micro_batches_per_step"),
        ("train=3", "train"),
        ("deepspeed=[]", "deepspeed"),
        ("data.shards=", "data.shards"),
        ("data.cache_dir= ", "data.cache_dir"),
        ("model.pretrained=", "model.pretrained"),
        ("train.run_dir=", "train.run_dir"),
        ("train.run_dir=-", "train.run_dir"),
        ("train.mirror=", "train.mirror"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(override: str, named: str, refusal: Callable[..., str]) -> None:
    assert f"'{named}' is " in refusal(override)


@pytest.mark.parametrize(("key", "value"), [
    ("optimizer", "1"), ("optimizer.params", "[]"), ("optimizer.params.lr", "1e999"),
    ("optimizer.params.lr", f"{10**400}"), ("optimizer.params.lr", "-1"), ("gradient_clipping", "1e999"),
    ("optimizer.params.betas", "3"), ("optimizer.params.betas", "[0.9]"), ("optimizer.params.betas", "[0.9,1]"),
    ("optimizer.params.eps", "tiny"), ("optimizer.params.weight_decay", "-1"), ("optimizer.params.momentum", "0.9"),
    ("optimizer.params.adam_w_mode", "no"),
])  # fmt: skip
def test_a_value_of_the_engine_that_no_optimizer_takes_is_named(
    key: str, value: str, refusal: Callable[..., str]
) -> None:
    assert f"deepspeed.{key.removesuffix('.params')} is " in refusal(f"deepspeed.{key}={value}")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": SMALL["model"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.json: 'deepspeed' is missing"):
        load_config(tmp_path / "run.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"{'model': {}}", b"", b"\xff\xfe{}", b"{}}"])
def test_a_file_that_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json: not JSON"):
        load_config(tmp_path / "run.json")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"model"'])
def test_json_that_is_no_configuration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    for overrides in ([], ["train.epochs=3"]):
        with pytest.raises(ConfigError, match=r"run\.json: "):
            load_config(tmp_path / "run.json", overrides)


@pytest.mark.parametrize(
    "override",
    [
        "train.run_dir=elsewhere",
        "train.checkpoint_every=7",
        "train.keep_checkpoints=9",
        "eval.every_steps=3",
        "data.shards=/copied/to",
        "data.cache_dir=/fast/disk",
        "data.cache_gb=3",
        "data.workers=5",
    ],
)
def test_where_a_run_lies_and_how_it_reads_is_no_part_of_what_a_step_computes(override: str, load: Load) -> None:
    """So a checkpoint resumes from a copy of the shards, or with more threads; of the shards the digest is compared."""
    assert load(override).resume_key == load().resume_key


@pytest.mark.parametrize(
    "override",
    [
        "data.batch_seconds=12",
        "data.shuffle_shards=9",
        "data.length_jitter=0.1",
        "model.dropout=0.3",
        "model.scratch.hidden_size=32",
        "train.seed=1",
        "train.epochs=3",
        "train.max_steps=3",
        "train.warmup_steps=1",
        "train.micro_batches_per_step=4",
        "deepspeed.optimizer.params.lr=1",
    ],
)
def test_what_decides_a_step_is_compared(override: str, load: Load) -> None:
    assert load(override).resume_key != load().resume_key


@pytest.mark.parametrize(
    ("mirror", "key"),
    [
        ("s3://bucket/set", "data.shards"),
        ("s3://bucket/set/", "data.shards"),
        ("s3://bucket/set/mirror", "data.shards"),
        ("runs/one", "train.run_dir"),
        ("./runs/../runs/one/", "train.run_dir"),
        ("file:///{here}/runs/one/mirror", "train.run_dir"),
        ("s3://bucket/set-of-another", None),
        ("s3://bucket", None),
        ("runs/one-mirrored", None),
    ],
)
def test_a_mirror_has_a_place_of_its_own(mirror: str, key: str | None) -> None:
    mirror = mirror.format(here=Path.cwd())
    settings = ["data.shards=s3://bucket/set", "train.run_dir=runs/one", f"train.mirror={mirror}"]
    if key is None:
        assert load_config("configs/zero2.json", settings).train.mirror == mirror
        return
    with pytest.raises(ConfigError, match=f"train.mirror, '{mirror}', lies in {key}, '.*': it must lie outside"):
        load_config("configs/zero2.json", settings)


def test_a_home_that_the_shell_has_left_is_expanded_in_options_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_home("--out=~/shards") == "--out=/home/somebody/shards"
    assert expand_home("~") == "/home/somebody"
    for other in ("--text=a ~/b", "s3://bucket/~/x", "~x", "data.shards=~/x"):
        assert expand_home(other) == other
    config = load_config(CONFIGS[0], ["data.shards=~/x", "model.pretrained=~/y", "train.run_dir=~/z"])
    places = (config.data.shards, config.model.pretrained, config.train.run_dir)
    assert places == ("/home/somebody/x", "/home/somebody/y", "/home/somebody/z")
