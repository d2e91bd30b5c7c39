"""A clip's log-probabilities are Transformers' own, whatever its companions, and survive saving and export."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCTC

from sharding.audio.codec import MIN_SAMPLES, SAMPLE_RATE, frame_count
from streamtrain.config import ModelConfig
from streamtrain.data.augment import keyed_random, span_mask
from streamtrain.infer.export import ExportError, export_model, verify
from streamtrain.model.checksums import ChecksumError
from streamtrain.model.ctc import CTCModel, MaskedGroupNorm, convolve_blocks, convolve_frames, ctc_sum
from streamtrain.model.decode import greedy, join_texts
from streamtrain.model.pretrained import ModelError, load_model, load_trained
from tests.tools.models import FAMILIES, TINY, VOCAB, decode, make_network, save, talkative

torch.set_num_threads(1)  # networks this small only lose by sharing


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> CTCModel:
    return CTCModel(make_network(family), VOCAB, normalize=True).eval()


def test_unpadded_it_equals_transformers_to_the_bit(family: str) -> None:
    network = make_network(family)
    names = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for clips, samples in ((1, 12_345), (3, 20_000)):
        inputs = torch.stack([noise(samples, seed) for seed in range(clips)])
        with torch.inference_mode():
            theirs = network(inputs).logits.log_softmax(-1)
            model = CTCModel(network, VOCAB, normalize=True).eval()
            ours = model(inputs, torch.full((clips,), samples))
        assert torch.equal(ours, theirs)
    assert {name: tuple(weight.shape) for name, weight in model.network.state_dict().items()} == names


def test_companions_and_padding_change_nothing(model: CTCModel) -> None:
    lengths = torch.tensor([7_000, MIN_SAMPLES, 31_999, 16_000])
    clips = [noise(int(length), seed) for seed, length in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    garbage = torch.where(torch.arange(padded.shape[1]) < lengths[:, None], padded, 100 * noise(padded.shape[1]))
    with torch.inference_mode():
        together, beside_garbage = model(padded, lengths), model(garbage, lengths)
        for row, clip in enumerate(clips):
            alone = model(clip[None], lengths[row : row + 1])[0]  # (T, V)
            assert torch.allclose(together[row, : len(alone)], alone, rtol=0, atol=1e-5)
            assert torch.allclose(beside_garbage[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_gradients_do_not_depend_on_padding_either(model: CTCModel) -> None:
    clip, label = noise(9_000), torch.tensor([VOCAB.encode("kæt")])

    def gradient(inputs: torch.Tensor, lengths: list[int], weights: list[float]) -> torch.Tensor:
        model.zero_grad()
        samples = torch.tensor(lengths)
        log_probs = model(inputs, samples)
        targets, target_lengths = label.expand(len(lengths), -1), torch.full((len(lengths),), 3)
        frames = model.frame_counts(samples)
        ctc_sum(log_probs, frames, targets, target_lengths, torch.tensor(weights), VOCAB.blank).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    alone = gradient(clip[None], [9_000], [1.0])
    padded = torch.stack([F.pad(clip, (0, 11_000)), noise(20_000, 1)])
    beside_another = gradient(padded, [9_000, 20_000], [1.0, 0.0])
    assert torch.linalg.vector_norm(alone - beside_another) < 1e-4 * torch.linalg.vector_norm(alone)


ALONE, SILENT, UNPADDED, PADDED = [16_000], [4 * MIN_SAMPLES], [9_600] * 2, [16_000, 9_000]  # samples of the clips
RESHAPED = ("View", "UnsafeView", "ReshapeAlias", "Clone", "Alias")  # a copy or a view of the same values


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_batch_has_the_same_graph_and_its_gradients_arrive_in_one_order(
    family: str, frozen: bool, dropout: float, tmp_path: Path
) -> None:
    """Padded or not, masked or not, empty or not: ZeRO sums gradients over the ranks in the order of their arrival."""
    make_network(family).save_pretrained(tmp_path)
    settings = ModelConfig(
        pretrained=str(tmp_path), vocab="new", dropout=dropout, freeze_cnn=frozen, mask_time_prob=0.1
    )
    model = load_model(settings)
    assert model.training
    orders = []
    for batches in ((ALONE, SILENT), (UNPADDED, PADDED)):  # of one row, torch's linear layers take another kernel
        seen = [arrivals_and_graph(model, lengths, masked) for lengths in batches for masked in (False, True)]
        assert [graph for _, graph in seen] == [seen[0][1]] * len(seen)
        orders += [arrived for arrived, _ in seen]
    assert len(orders[0]) == sum(weight.requires_grad for weight in model.parameters())
    assert orders == [orders[0]] * len(orders)


def arrivals_and_graph(model: CTCModel, lengths: list[int], masked: bool) -> tuple[list[str], list[str]]:
    """The weights in the order in which gradients reach them, and what the graph of the loss does."""
    arrived: list[str] = []
    hooks = [
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))  # type: ignore[misc]
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    samples = torch.tensor(lengths)
    frames = model.frame_counts(samples)
    mask = torch.zeros(len(lengths), int(frames.max()), dtype=torch.bool)
    mask[:, :2] = masked
    log_probs = model(torch.randn(len(lengths), max(lengths)), samples, mask)
    weights = torch.full((len(lengths),), float(frames.max() > 5))
    targets, counts = torch.full((len(lengths), 3), 5), (3 * weights).long()
    loss = ctc_sum(log_probs, frames, targets, counts, weights, VOCAB.blank)
    graph = names_in(loss.grad_fn)
    loss.backward()
    for hook in hooks:
        hook.remove()
    return arrived, graph


def names_in(node: Any) -> list[str]:
    """The operations of an autograd graph, from its end, without those that only lay values out otherwise."""
    names, left, seen = [], [node], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if not node.name().removesuffix("Backward0").endswith(RESHAPED):
                names.append(node.name())
            left += [following for following, _ in node.next_functions]
    return names


def test_a_hidden_frame_cannot_be_heard_and_its_mask_is_the_clips_own(model: CTCModel) -> None:
    lengths = torch.tensor([8_000, 16_000])
    frames = model.frame_counts(lengths).tolist()
    clips = torch.stack([F.pad(noise(8_000), (0, 8_000)), noise(16_000, 1)])
    mask = torch.zeros(2, frames[1], dtype=torch.bool)
    mask[0, 3:9] = mask[1, 20:40] = True
    with torch.inference_mode():
        masked, plain = model(clips, lengths, mask), model(clips, lengths)
        alone = model(clips[:1, :8_000], lengths[:1], mask[:1, : frames[0]])[0]
        everywhere = model(clips, lengths, torch.ones_like(mask))
        other_sounds = model(clips.flip(1), lengths, torch.ones_like(mask))
    assert torch.allclose(masked[0, : frames[0]], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(masked[0, : frames[0]], plain[0, : frames[0]], atol=1e-3)
    assert torch.allclose(everywhere[0, : frames[0]], other_sounds[0, : frames[0]], rtol=0, atol=1e-5)


def test_a_hidden_feature_cannot_be_heard_and_its_mask_is_the_clips_own(model: CTCModel) -> None:
    lengths = torch.tensor([8_000, 16_000])
    frames = model.frame_counts(lengths).tolist()
    clips = torch.stack([F.pad(noise(8_000), (0, 8_000)), noise(16_000, 1)])
    mask = torch.zeros(2, model.features, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 10:20] = True
    with torch.inference_mode():
        masked, plain = model(clips, lengths, None, mask), model(clips, lengths)
        alone = model(clips[:1, :8_000], lengths[:1], None, mask[:1])[0]
        everywhere = model(clips, lengths, None, torch.ones_like(mask))
        other_sounds = model(clips.flip(1), lengths, None, torch.ones_like(mask))
    assert torch.allclose(masked[0, : frames[0]], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(masked[0, : frames[0]], plain[0, : frames[0]], atol=1e-3)
    assert torch.allclose(everywhere[0, : frames[0]], other_sounds[0, : frames[0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 5, 16])
@pytest.mark.parametrize("frames", [1, 7, 8, 41])
def test_a_convolution_by_blocks_is_torchs_and_so_are_its_gradients(frames: int, kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, frames, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 8 // groups, kernel, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(hidden, weight, padding=kernel // 2, groups=groups)
    made = convolve_blocks(hidden, weight, groups, kernel // 2)
    torch.testing.assert_close(made, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(made, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frames", [10, 11, 20, 24, 33])
@pytest.mark.parametrize(("kernel", "stride", "channels"), [(10, 5, 1), (3, 2, 6), (2, 2, 6), (4, 2, 3), (5, 5, 1)])
def test_a_convolution_of_frames_is_torchs(kernel: int, stride: int, channels: int, frames: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, frames, channels, dtype=torch.float64)
    weight = torch.randn(7, channels, kernel, dtype=torch.float64)
    expected = F.conv1d(hidden.transpose(1, 2), weight, stride=stride).transpose(1, 2)
    torch.testing.assert_close(convolve_frames(hidden, weight, stride), expected)


def test_a_norm_of_frames_is_the_norm_over_true_ones() -> None:
    torch.manual_seed(0)
    norm = MaskedGroupNorm(6, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    hidden, frames = 3 + torch.randn(4, 6, 50), torch.tensor([50, 2, 17, 49])
    with torch.no_grad():
        made = norm.of_frames(hidden.transpose(1, 2).clone(), frames).transpose(1, 2)
        for row, length, own in zip(hidden, frames.tolist(), made, strict=True):
            expected = F.group_norm(row[None, :, :length], 6, norm.weight, norm.bias)[0]
            torch.testing.assert_close(own[:, :length], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [MIN_SAMPLES, 7_999, 16_000, 16_001])
def test_half_precision_of_a_gpu_hears_the_same(model: CTCModel, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way through the convolutions, taken here in fp32."""
    lengths = torch.tensor([samples, MIN_SAMPLES, samples // 2 + MIN_SAMPLES // 2])
    inputs = torch.stack([noise(samples, row) for row in range(3)])
    with torch.no_grad():
        expected = model(inputs, lengths)
        monkeypatch.setattr("streamtrain.model.ctc.half_precision", lambda hidden: torch.float32)
        made = model(inputs, lengths)
    for ours, theirs, frames in zip(made, expected, model.frame_counts(lengths).tolist(), strict=True):
        torch.testing.assert_close(ours[:frames], theirs[:frames], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [MIN_SAMPLES, MIN_SAMPLES + 1, 1_599, 16_000, 123_457])
def test_frames_are_counted_as_the_planner_counts_them(samples: int) -> None:
    model = CTCModel(make_network("wav2vec2, group norm"), VOCAB, normalize=True)
    frames = frame_count(samples)
    assert model.frame_counts(torch.tensor([samples])).tolist() == [frames]
    assert model(noise(samples)[None], torch.tensor([samples])).shape == (1, frames, len(VOCAB))


# --- loss and masks -------------------------------------------------------------------------------------------------


@pytest.fixture
def scores() -> torch.Tensor:
    """Unnormalised scores (B, T, V) of four clips."""
    return torch.randn(4, 30, len(VOCAB), generator=torch.Generator().manual_seed(1)).requires_grad_()


LABELS = ("kæt", "ʃi sɛz", "", "ʧu")
FRAMES = torch.tensor([30, 22, 9, 17])


def loss_of(scores: torch.Tensor, weights: list[float]) -> torch.Tensor:
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(VOCAB.encode(label)).long() for label in LABELS], True)
    lengths = torch.tensor([len(label) for label in LABELS])
    return ctc_sum(scores.log_softmax(-1), FRAMES, targets, lengths, torch.tensor(weights), VOCAB.blank)


def test_the_loss_is_the_sum_of_torchs_over_true_lengths(scores: torch.Tensor) -> None:
    one_by_one = [
        F.ctc_loss(
            scores[row, :frames].log_softmax(-1), torch.tensor(VOCAB.encode(label)), frames, torch.tensor(len(label)),
            blank=VOCAB.blank, reduction="sum",
        )
        for row, (label, frames) in enumerate(zip(LABELS, FRAMES, strict=True))
    ]  # fmt: skip
    assert loss_of(scores, [1, 1, 1, 1]).item() == pytest.approx(sum(one_by_one).item(), rel=1e-6)
    assert loss_of(scores, [1, 0, 1, 0]).item() == pytest.approx((one_by_one[0] + one_by_one[2]).item(), rel=1e-6)


def test_a_silent_row_adds_no_loss_and_gets_no_gradient(scores: torch.Tensor) -> None:
    loss_of(scores, [1, 0, 1, 1]).backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad[1], torch.zeros_like(scores.grad[1]))
    for row, frames in enumerate(FRAMES.tolist()):
        assert torch.equal(scores.grad[row, frames:], torch.zeros_like(scores.grad[row, frames:]))
        assert row == 1 or scores.grad[row, :frames].abs().sum() > 0


def test_a_silent_row_that_no_path_fits_does_no_harm(scores: torch.Tensor) -> None:
    """Its loss alone would be infinite, and its gradient not a number."""
    targets = torch.zeros(4, 40, dtype=torch.int64) + 5
    lengths = torch.tensor([3, 40, 2, 1])
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = ctc_sum(scores.log_softmax(-1), FRAMES, targets, lengths, weights, VOCAB.blank)
    loss.backward()
    assert scores.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_a_batch_of_one_silent_row_has_no_loss_and_touches_every_weight() -> None:
    """Ranks without clips run it, so that all make equally many backwards."""
    model = CTCModel(make_network("wav2vec2, group norm"), VOCAB, normalize=True)
    samples = torch.tensor([4 * MIN_SAMPLES])
    log_probs = model(torch.zeros(1, 4 * MIN_SAMPLES), samples)
    empty, none = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    loss = ctc_sum(log_probs, model.frame_counts(samples), empty, none, torch.tensor([0.0]), VOCAB.blank)
    loss.backward()
    assert loss.item() == 0
    head = model.network.lm_head.weight.grad
    assert torch.equal(head, torch.zeros_like(head))


def test_a_time_mask_depends_on_seed_epoch_and_clip_alone() -> None:
    def mask(*key: object) -> list[bool]:
        hidden: list[bool] = span_mask(200, 0.3, 10, keyed_random("mask", *key)).tolist()
        return hidden

    first = mask(0, 0, "clip-1")
    np.random.seed(1)  # neither what others drew nor the process matters
    torch.rand(9)
    mask(0, 0, "clip-2")
    assert mask(0, 0, "clip-1") == first
    assert len({tuple(mask(*key)) for key in ((0, 0, "clip-1"), (1, 0, "clip-1"), (0, 1, "clip-1"), (0, 0, "b"))}) == 4


@pytest.mark.parametrize("share", [0.3, 0.65, 0.95])
@pytest.mark.parametrize("frames", [1, 9, 10, 11, 20, 50, 400])
def test_a_time_mask_hides_spans_up_to_its_share_and_never_a_whole_clip(frames: int, share: float) -> None:
    masks = [span_mask(frames, share, 10, keyed_random(number)) for number in range(1000)]
    shares = [float(mask.mean()) for mask in masks]
    assert all(mask.shape == (frames,) for mask in masks)
    assert max(shares) < 1
    if frames <= 10:
        assert max(shares) == 0
    elif share == 0.3:  # overlaps take a little of it away
        assert 0.3 * 0.8 < sum(shares) / len(shares) < 0.3 * 1.05
    assert not span_mask(frames, 0.0, 10, keyed_random(0)).any()


# --- decoding -------------------------------------------------------------------------------------------------------


def test_greedy_merges_repeats_drops_blanks_and_stops_at_the_clips_end() -> None:
    k, t, space = VOCAB.encode("kt ")
    blank = VOCAB.blank
    path = torch.tensor([[k, k, blank, k, space, space, t, t], [blank] * 8, [t] * 8])
    log_probs = torch.full((3, 8, len(VOCAB)), -9.0).scatter(2, path[..., None], -0.5)
    said = greedy(log_probs, torch.tensor([8, 8, 3]), VOCAB)
    assert [hypothesis.text for hypothesis in said] == ["kk t", "", "t"]
    assert [hypothesis.confidence for hypothesis in said] == pytest.approx([np.exp(-0.5)] * 3)
    assert greedy(log_probs[:1], torch.tensor([2]), VOCAB)[0].text == "k"


def test_pieces_are_joined_with_single_spaces() -> None:
    assert join_texts(["kæt", "", "ʃi sɛz"]) == "kæt ʃi sɛz"
    assert join_texts([]) == ""


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretrained encoder as it lies on the hub: no head, nothing of ours."""
    make_network("wav2vec2, group norm", "ForPreTraining").save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize(
    ("family", "head"), [("wav2vec2, layer norm", "ForPreTraining"), ("HuBERT, group norm", "Model"),
                         ("WavLM, layer norm", "Model")],
)  # fmt: skip
def test_a_pretrained_encoder_gets_a_head_that_speaks_ipa_and_keeps_its_weights(
    family: str, head: str, tmp_path: Path
) -> None:
    network = make_network(family, head)
    network.save_pretrained(tmp_path)
    model = load_model(ModelConfig(pretrained=str(tmp_path), dropout=0.25, freeze_cnn=True))
    assert model.vocab == VOCAB
    assert model.network.lm_head.out_features == len(VOCAB)
    ours = getattr(model.network, model.network.base_model_prefix).state_dict()
    theirs = getattr(network, network.base_model_prefix, network).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = model.network.config
    assert {config.hidden_dropout, config.attention_dropout, config.final_dropout, config.feat_proj_dropout} == {0.25}
    assert config.layerdrop == 0
    frozen = [name for name, weight in model.network.named_parameters() if not weight.requires_grad]
    assert frozen
    assert all("feature_extractor" in name or "masked_spec_embed" in name for name in frozen)


def test_a_folder_that_speaks_letters_gets_a_new_vocabulary(encoder: Path) -> None:
    """As facebook/wav2vec2-base does when it is downloaded whole: its vocab.json is English."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T"]
    (encoder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    assert load_model(ModelConfig(pretrained=str(encoder))).vocab == VOCAB
    tutorial = ["|", "a", "b", "[UNK]", "[PAD]"]
    (encoder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(tutorial)}))
    assert load_model(ModelConfig(pretrained=str(encoder))).vocab == VOCAB


def test_an_unknown_name_offline_is_named_with_what_to_do(tmp_path: Path) -> None:
    program = (
        "from streamtrain.config import ModelConfig\nfrom streamtrain.model.pretrained import ModelError, load_model\n"
        "try:\n    load_model(ModelConfig(pretrained='nobody/no-such-model'))\n"
        "except ModelError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "model 'nobody/no-such-model' cannot be loaded: " in done.stdout
    assert "hint: without a network, download it elsewhere and give its folder" in done.stdout


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sew"}))


def without_a_kind(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("damage", [without_weights, cut_off, empty, of_another_kind, without_a_kind])
def test_a_folder_that_holds_no_such_model_is_named(damage: Callable[[Path], None], encoder: Path) -> None:
    damage(encoder)
    with pytest.raises(ModelError) as refused:
        load_model(ModelConfig(pretrained=str(encoder)))
    assert f"model '{encoder}' cannot be loaded: " in str(refused.value)
    assert "hint: the folder must hold complete config.json and model.safetensors" in str(refused.value)


def test_a_model_from_scratch_is_as_its_configuration_says() -> None:
    model = load_model(ModelConfig(scratch=TINY, freeze_cnn=False, dropout=0.0, mask_time_prob=0.1))
    assert model.network.config.num_hidden_layers == 2
    assert all(weight.requires_grad for weight in model.network.parameters())
    assert model.vocab == VOCAB


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hiden_size": 32}, "unknown key 'hiden_size'\nhint: did you mean 'hidden_size'?"),
        ({"vocab_size": 3}, "'vocab_size' is not set here"),
        ({"layerdrop": 0.1}, "'layerdrop' is not set here"),
        ({"add_adapter": True}, "'add_adapter' is not supported"),
        ({"return_dict": False}, "'return_dict' is not supported"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 63}, "num_heads|divisible"),
        ({"conv_dim": [32]}, "convolutional layers is incorrect"),
    ],
)
def test_a_mistake_in_a_model_from_scratch_is_told(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s)^\(?'?model\.scratch: .*({said})" if "hint" not in said else said):
        load_model(ModelConfig(scratch=TINY | change))


# --- saving and export ----------------------------------------------------------------------------------------------


def restless_sound() -> np.ndarray:
    """Three seconds whose loudness and colour change."""
    random = np.random.default_rng(4)
    sound = np.concatenate([np.cumsum(random.normal(0, 0.02, 4000)) * gain for gain in random.uniform(0.1, 1, 12)])
    return np.clip(sound, -0.9, 0.9)


@pytest.mark.parametrize("family", ["wav2vec2, group norm", "wav2vec2, layer norm", "HuBERT, group norm"])
def test_transformers_pipeline_says_what_we_say(family: str, tmp_path: Path) -> None:
    model = talkative(family)
    folder = save(model, tmp_path / "model")
    soundfile.write(tmp_path / "clip.flac", restless_sound(), SAMPLE_RATE, subtype="PCM_16")
    waveform: np.ndarray = soundfile.read(tmp_path / "clip.flac", dtype="float32")[0]
    recogniser = transformers.pipeline("automatic-speech-recognition", model=str(folder))
    theirs = recogniser({"raw": waveform, "sampling_rate": SAMPLE_RATE})["text"]  # a file's name would need ffmpeg
    ours = decode(model, waveform)
    assert len(ours.split()) > 3
    assert " ".join(theirs.split()) == ours  # theirs keeps both of two spaces with a blank between them


def test_what_was_saved_is_loaded_as_it_was(family: str, tmp_path: Path) -> None:
    model = talkative(family)
    original = {name: weight.clone() for name, weight in make_network(family).state_dict().items()}
    folder = save(model, tmp_path / "model")
    theirs, ours = AutoModelForCTC.from_pretrained(folder).eval(), load_trained(folder)
    for network in (theirs, ours.network):
        weights = network.state_dict()
        assert {name: weight.shape for name, weight in weights.items()} == {
            name: weight.shape for name, weight in original.items()
        }
        assert all(torch.equal(weights[name], weight) for name, weight in model.network.state_dict().items())
    assert ours.vocab == model.vocab
    assert ours.normalize is True
    again = load_model(ModelConfig(pretrained=str(folder)))  # to train it further: its head is kept
    assert torch.equal(again.network.lm_head.weight, model.network.lm_head.weight)


@pytest.mark.parametrize("normalize", [True, False])
def test_whether_inputs_are_normalised_travels_with_the_model(normalize: bool, tmp_path: Path) -> None:
    model = CTCModel(make_network("WavLM, group norm"), VOCAB, normalize=normalize)
    assert load_trained(save(model, tmp_path / "model")).normalize is normalize


def test_an_export_is_verified_against_transformers_and_never_overwrites(family: str, tmp_path: Path) -> None:
    folder = save(talkative(family), tmp_path / "run" / "best")
    assert export_model(folder, tmp_path / "out") <= 1e-5
    assert "Not scored." in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not list((tmp_path / "out").glob("*.bin"))  # safetensors alone: a pickle may run what it likes
    (folder.parent / "config.json").write_text("[]")  # of something else: it is no run's
    (folder.parent / "scorecard.json").write_text('{"cer": 1}')
    (tmp_path / "empty").mkdir()
    assert export_model(folder, tmp_path / "empty") <= 1e-5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(ExportError, match="is not an empty folder"):
            export_model(folder, taken)
    assert (tmp_path / "file").read_text() == "mine"


# --- models that are damaged, or not all there ----------------------------------------------------------------------


def test_every_flipped_byte_of_a_saved_model_is_seen(tmp_path: Path) -> None:
    folder, moments = save(talkative("wav2vec2, group norm"), tmp_path / "best"), random.Random(1)
    assert load_trained(folder).normalize
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    for path in [path for path in sorted(folder.iterdir()) for _ in range(5)]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[moments.randrange(len(whole))] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        for refuse in (load_trained, lambda folder: load_model(ModelConfig(pretrained=str(folder)))):
            with pytest.raises(ChecksumError, match=r"SHA256SUMS|damaged"):
                refuse(folder)
        path.write_bytes(whole)
    (folder / "README.md").write_text("mine")
    assert load_trained(folder).normalize
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    for left in range(len(lines)):
        (folder / "SHA256SUMS").write_text("".join(lines[:left]))
        with pytest.raises(ChecksumError, match="is cut off"):
            load_trained(folder)


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def two_files(folder: Path) -> None:
    torch.save(make_network("wav2vec2, layer norm").state_dict(), folder / "pytorch_model.bin")


def half_of(name: str, found: str = "preprocessor_config.json") -> Callable[[Path], None]:
    """The first half of a file, which lies there under another name, as Transformers 5 may write it."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / found).read_text())
        text = json.dumps(document if name == found else {"feature_extractor": document})
        (folder / found).unlink()
        (folder / name).write_text(text[: len(text) // 2])

    return damage


def without_an_extractor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (fewer_layers, r"16 weights of its file are in no layer that config.json names: wav2vec2.encoder.layers.1"),
        (two_files, r"model.safetensors and pytorch_model.bin hold different weights \(\S+\): move away the one"),
        (half_of("processor_config.json"), r"cannot be loaded: (pre)?processor_config.json: not JSON"),
        (half_of("preprocessor_config.json"), r"cannot be loaded: (pre)?processor_config.json: not JSON"),
        (without_an_extractor, "has no preprocessor_config.json: whether its inputs are normalised is not known"),
    ],
)
def test_a_model_without_checksums_is_not_taken_for_another(
    damage: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    folder = save(CTCModel(make_network("wav2vec2, group norm"), VOCAB, normalize=False), tmp_path / "model")
    (folder / "SHA256SUMS").unlink()
    torch.save(load_trained(folder).network.state_dict(), folder / "pytorch_model.bin")
    assert load_trained(folder).normalize is False  # two files of the same values are one model
    damage(folder)
    with pytest.raises(ModelError, match=told):
        load_trained(folder)


def test_an_export_is_held_against_the_model_that_was_trained(tmp_path: Path) -> None:
    trained = talkative("wav2vec2, group norm")
    folder = save(trained, tmp_path / "model")
    assert verify(trained, folder) <= 1e-5
    with torch.no_grad():
        trained.network.lm_head.bias[3] += 1e-6
    with pytest.raises(ExportError, match="does not hold the weights"):
        verify(trained, folder)
    with torch.no_grad():
        trained.network.lm_head.bias[3] += 1e-3
    with pytest.raises(ExportError, match="log-probabilities differ by"):
        verify(trained, folder)


def test_code_that_a_model_brings_along_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Path
) -> None:
    config = json.loads((encoder / "config.json").read_text())
    theirs = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCTC": "code.Net"}}
    (encoder / "config.json").write_text(json.dumps(config | theirs))
    (encoder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelConfig(pretrained=str(encoder)))
    assert sys.stdin.read() == "y\n"
    assert not (tmp_path / "ran").exists()
