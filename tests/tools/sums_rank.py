"""Sum gradients over micro-batches and ranks in a real engine; print how far off the sum is, and the buckets.

sums_rank.py STAGE PRECISION MICRO_BATCHES
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from streamtrain.config import ModelConfig, TrainConfig
from streamtrain.distributed import process_group

TINY = {"conv_dim": [16] * 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def main() -> None:
    stage, precision, count = int(sys.argv[-3]), sys.argv[-2], int(sys.argv[-1])
    with process_group() as world:
        from streamtrain.model.pretrained import load_model
        from streamtrain.training.schedule import make_schedule
        from streamtrain.training.zero_engine import Engine

        torch.manual_seed(0)
        model = load_model(ModelConfig(scratch=TINY, dropout=0.0, freeze_cnn=False))
        recipe = make_schedule(model, TrainConfig(run_dir="unused", epochs=1), 0.0, 10)  # no weight moves
        deepspeed = {"zero_optimization": {"stage": stage}, precision: {"enabled": True},
                     "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}  # fmt: skip
        engine = Engine(model, recipe, deepspeed, 0.0, world)
        alone = []
        sounds = [[torch.randn(1, 8_000, generator=torch.Generator().manual_seed(100 * rank + number))
                   for number in range(count)] for rank in range(world.size)]  # fmt: skip
        silence = torch.zeros_like(sounds[0][0])
        # Each micro-batch of each rank on its own, the other ranks' gradients being 0; then all of them as one step
        for rank, mine in enumerate(sounds):
            here = world.rank == rank
            alone += [gradient(engine, [sound if here else silence], here) for sound in mine]
        together = gradient(engine, sounds[world.rank], True)
        off = torch.linalg.vector_norm(together - sum(alone)) / torch.linalg.vector_norm(together)
        buckets = engine._engine.zero_reduce_bucket_size(), engine._engine.zero_allgather_bucket_size()
        if world.main:
            print(json.dumps({"off": float(off), "buckets": buckets, "learning": recipe.learning}), flush=True)


def gradient(engine, sounds, counts):  # type: ignore[no-untyped-def]
    from deepspeed.utils import safe_get_full_grad

    for number, sound in enumerate(sounds):
        log_probs = engine.forward(sound, torch.tensor([sound.shape[1]]))
        engine.backward(counts * log_probs[..., 3].sum() / 100, last=number == len(sounds) - 1)
    parameters = [weight for weight in engine.model.parameters() if weight.requires_grad]
    whole = torch.cat([safe_get_full_grad(weight).flatten().double() for weight in parameters])
    engine.step(0)
    return whole


if __name__ == "__main__":
    main()
