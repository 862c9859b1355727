"""`python -m latentvae.cli`, for `accelerate launch -m` with several processes."""

from latentvae.cli.main import main

if __name__ == "__main__":
    main()
