"""The `rloop` command: parse, validate, build the rooms, run. The only importer of rooms.

How `rloop train` gets to Algorithm 1, process by process:

    supervisor  cli.main -> train.train: checks, the lock, config.yaml -> train._supervise -> ranks.start_ranks
    torchrun    platform/torchrun.py
    each rank   worker.main, which reads config.yaml -> rooms.conduct (rank 0) or rooms.follow
    rank 0      rooms.run_algorithm -> loop.RLoop.run

How a run ended comes back as ending.json in the run directory. In a job `node.node` calls `train.train` on the first
node, and starts the ranks and the engines of the others.
"""
