"""The reference recipe of `make bench`, as its users run it: Transformers' Trainer over clips that lie in memory.

`python -m tests.benchmarks.trainer CORPUS MODEL.json random|group_by_length EPOCHS` prints a JSON row a step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from sharding.labels.policy import policy_of
from streamtrain.model.vocab import vocab_of
from tests.benchmarks.corpora import transcripts

CLIPS_AT_ONCE = 27  # of the reference recipe


class Clips(Dataset[dict[str, Any]]):
    """Normalised clips with their labels, decoded beforehand: which spares the reference what ours does on the way."""

    def __init__(self, corpus: Path) -> None:
        vocab = vocab_of(policy_of("pasketti"))
        self.rows = []
        for line in transcripts(corpus).read_text("utf-8").splitlines():
            row = json.loads(line)
            sound = soundfile.read(corpus / row["audio_path"], dtype="float32")[0]
            sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
            self.rows.append({"input_values": sound, "labels": vocab.encode(row["phonetic_text"])})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]


class Clock(TrainerCallback):
    """Prints the seconds of each step, and the seconds of speech in it."""

    def __init__(self) -> None:
        self.speech: list[float] = []
        self.began = 0.0

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.speech.append(sum(len(row["input_values"]) for row in rows) / 16_000)
        sounds = [torch.from_numpy(row["input_values"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_values": torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        print(json.dumps({"seconds": now - self.began, "speech": self.speech.pop(0)}), flush=True)
        self.began = now


def main() -> None:
    corpus, model, sampling, epochs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.manual_seed(0)
    network = Wav2Vec2ForCTC(Wav2Vec2Config(**json.loads(model.read_text())))
    network.freeze_feature_encoder()
    arguments = TrainingArguments(
        output_dir=str(corpus.parent / "trainer"),
        per_device_train_batch_size=CLIPS_AT_ONCE,
        train_sampling_strategy=sampling,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    clock = Clock()
    trainer = Trainer(
        network,
        arguments,
        data_collator=clock.collate,
        train_dataset=Clips(corpus),
        processing_class=Wav2Vec2FeatureExtractor(),
        callbacks=[clock],
    )
    trainer.train()


if __name__ == "__main__":
    main()
