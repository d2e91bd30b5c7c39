"""Sum the gradients of equal micro-batches in a real engine, and print how far off it is, and the buckets.

sums_rank.py STAGE PRECISION MICRO_BATCHES
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from streamtrain.config import ModelConfig, TrainConfig
from streamtrain.world import running

TINY = {"conv_dim": [16] * 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def main() -> None:
    stage, precision, count = int(sys.argv[-3]), sys.argv[-2], int(sys.argv[-1])
    with running() as world:
        from deepspeed.utils import safe_get_full_grad

        from streamtrain.engine import Engine
        from streamtrain.model import load_model
        from streamtrain.recipe import make_recipe

        torch.manual_seed(0)
        model = load_model(ModelConfig(scratch=TINY, dropout=0.0, freeze_cnn=False))
        recipe = make_recipe(model, TrainConfig(run_dir="unused", epochs=1), 0.0, 10)  # no weight moves
        deepspeed = {"zero_optimization": {"stage": stage}, precision: {"enabled": True},
                     "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}  # fmt: skip
        engine = Engine(model, recipe, deepspeed, 0.0, world)
        sound = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(1))
        sums = []
        for micro_batches in (1, count):
            for number in range(micro_batches):
                log_probs = engine.forward(sound, torch.tensor([8_000]))
                engine.backward(log_probs[..., 3].sum() / 100, last=number == micro_batches - 1)
            parameters = [weight for weight in model.parameters() if weight.requires_grad]
            sums.append(torch.cat([safe_get_full_grad(weight).flatten().float() for weight in parameters]))
            engine.step(0)
        off = torch.linalg.vector_norm(sums[1] - count * sums[0]) / torch.linalg.vector_norm(count * sums[0])
        buckets = engine._engine.zero_reduce_bucket_size(), engine._engine.zero_allgather_bucket_size()
        print(json.dumps({"off": float(off), "buckets": buckets, "learning": recipe.learning}), flush=True)


if __name__ == "__main__":
    main()
