"""`python -m slimexport`, which is what torchrun starts: `torchrun --nproc-per-node 8 -m slimexport run ...`."""

from slimexport.cli import main

if __name__ == "__main__":
    main()
