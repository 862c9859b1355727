"""The command as a module: `accelerate launch -m latentvae.cli` starts several processes."""

from latentvae.cli.main import main

if __name__ == "__main__":
    main()
