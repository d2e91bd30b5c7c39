"""Train: `deepspeed --quiet launch/train.py --config configs/zero2.json [--set section.key=value …]`."""

import os
import sys

# The launcher puts launch/ there, not the repository
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    from sharding.interrupt import handle_interrupts

    handle_interrupts()
    import argparse

    from sharding.command import announce, place
    from sharding.files.names import expand_home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=place, required=True, help="JSON file with data, model, train, eval and deepspeed"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE",
        help="override settings, at any depth, such as deepspeed.optimizer.params.lr=3e-5")  # fmt: skip
    parser.add_argument("--resume", type=place, default="auto", metavar="auto|none|PATH",
        help="auto: go on from the newest checkpoint of train.run_dir, if there is one (default); "
             "none: start over; or the folder of a checkpoint")  # fmt: skip
    parser.add_argument("--replan", action="store_true",
        help="go on though the settings of the plan have changed, such as data.batch_seconds: the clips that the epoch "
             "has left are planned anew, each once")  # fmt: skip
    parser.add_argument(
        "--find-batch-seconds",
        action="store_true",
        help="only search for the largest data.batch_seconds that this model and these machines hold, and print it",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    options = parser.parse_args(list(map(expand_home, sys.argv[1:])))

    from streamtrain.startup import configure_threads, env_int, report_errors

    configure_threads()
    if env_int("RANK") == 0:
        announce("training as {config} says", options)
    with report_errors():  # a mistake is told before torch is imported
        from sharding.shardset.index import read_index_header
        from sharding.shardset.store import open_store
        from streamtrain.config import load_config
        from streamtrain.data.plan import check_world_size

        config = load_config(options.config, options.set)
        check_world_size(env_int("WORLD_SIZE", 1), config.train.micro_batches_per_step)
        read_index_header(open_store(config.data.shards))

        from streamtrain.distributed import process_group

    with process_group() as world:
        from streamtrain.training.run import find_batch_seconds, train

        if options.find_batch_seconds:
            find_batch_seconds(config, world)
        else:
            train(config, world, options.resume, options.replan)


if __name__ == "__main__":
    main()
