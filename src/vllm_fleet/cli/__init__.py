"""The command line: one module per command. The only folder that knows all others."""
