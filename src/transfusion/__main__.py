"""`python -m transfusion` and `deepspeed --module transfusion` start the same command line."""

from transfusion.cli.main import main

if __name__ == "__main__":
    main()
