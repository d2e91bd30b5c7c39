"""Score a model: `deepspeed --quiet launch/evaluate.py --model RUN/best --shards SHARDS --out DIR`."""

import os
import sys

# The launcher puts launch/ there, not the repository
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    from sharding.interrupt import handle_interrupts

    handle_interrupts()
    import argparse
    from pathlib import Path

    from sharding.command import announce, number, out_folder, place
    from sharding.files.names import expand_home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=place, required=True, help="folder of a trained model, such as RUN/best")
    parser.add_argument(
        "--shards", type=place, default="data/shards", help="folder or URL of a shard set (default: %(default)s)"
    )
    parser.add_argument("--split", default="valid", choices=("valid", "train"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=out_folder, required=True, help="folder for scorecard.json, scorecard.html and hypotheses.jsonl"
    )
    parser.add_argument("--batch-seconds", type=number(1), default=40.0,
        help="padded seconds per forward: larger is faster and takes more memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--beam", type=number(1, kind=int), default=0, metavar="WIDTH",
        help="sum the paths that spell the same, among so many prefixes (default: the best path)")  # fmt: skip
    parser.add_argument("--compare-to", type=place, metavar="DIR",
        help="folder with another model's scorecard on the same clips, to compare this one with")  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    options = parser.parse_args(list(map(expand_home, sys.argv[1:])))

    from streamtrain.startup import configure_threads, env_int, report_errors

    configure_threads()
    if env_int("RANK") == 0:
        announce("scoring {model} on split {split} of {shards}", options)
    with report_errors():  # a mistake is told before torch is imported
        from sharding.shardset.index import read_index_header
        from sharding.shardset.store import open_store
        from streamtrain.model.vocab import load_vocab

        load_vocab(Path(options.model))
        read_index_header(open_store(options.shards))

        from streamtrain.distributed import process_group

    with process_group() as world:
        from streamtrain.eval.evaluate import evaluate_model

        out = Path(options.out)
        beside = Path(options.compare_to) if options.compare_to else None
        evaluate_model(
            options.model, options.shards, options.split, options.batch_seconds, out, world, options.beam, beside
        )


if __name__ == "__main__":
    main()
