"""`python -m vllm_diffusion.trace`, see ``command``."""

import argparse
import sys

from vllm_diffusion.trace import command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m vllm_diffusion.trace", description=command.SUMMARY
    )
    command.add_arguments(parser)
    sys.exit(command.run(parser.parse_args()))
