"""`python -m hotweights.cli`, which is how the agent's client starts an agent."""

from hotweights.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
