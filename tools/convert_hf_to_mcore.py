"""A Hugging Face folder to a Megatron checkpoint: `rloop convert --to mcore`."""

import sys

from rloop_mcore.main.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "mcore", *sys.argv[1:]]))
