"""Run the command `latentvae` as a module, for `accelerate launch -m latentvae.cli`."""

from latentvae.cli.main import main

if __name__ == "__main__":
    main()
