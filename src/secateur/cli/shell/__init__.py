"""How the command line meets a person: its first screen, and what the shell completes."""
