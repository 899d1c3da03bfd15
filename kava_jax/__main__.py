"""``python -m kava_jax``: the ``kava`` command."""

from kava_jax.cli import main

if __name__ == "__main__":
    main()
