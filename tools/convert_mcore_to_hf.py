"""A Megatron checkpoint to a Hugging Face folder: `rloop convert --to hf`."""

import sys

from rloop_mcore.main.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
